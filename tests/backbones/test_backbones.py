"""Backbones from disk: weights of every kind, the activation they were trained with, preprocessing, keys, and what is wrong in a line."""

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import open_clip
import pytest
import timm
import torch
import torchvision
from noise import split
from PIL import Image
from safetensors.torch import save_file

from mergekit_vl.backbones import clip
from mergekit_vl.backbones.backbone import Backbone
from mergekit_vl.backbones.clip import Clip
from mergekit_vl.backbones.micro import Micro
from mergekit_vl.backbones.vision import Vision
from mergekit_vl.datasets.base import Augment
from mergekit_vl.errors import UserError
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.models.model import ImageEncoder
from mergekit_vl.models.views import eval_view as view
from mergekit_vl.models.views import train_view
from mergekit_vl.reporter import SILENT

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"width": 32, "heads": 2, "layers": 1},
}
TEXTS = ["a photo of a dog.", "a photo of a great white shark."]


@pytest.fixture(autouse=True)
def archs(monkeypatch):
    """Small architectures among open_clip's own, one with its quickgelu sister."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.factory._MODEL_CONFIGS |= {
        "small": SMALL,
        "small-quickgelu": SMALL | {"quick_gelu": True},
        "custom": SMALL | {"custom_text": True},
        "other": SMALL | {"embed_dim": 8},
    }


@pytest.fixture(scope="module")
def state():
    model = clip.construct(SMALL, "small")
    draw = torch.Generator().manual_seed(3)
    return {name: p + 0.05 * torch.randn(p.shape, generator=draw) for name, p in model.state_dict().items()}


def features(backbone):
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return backbone.encode_image(images), backbone.encode_texts(TEXTS)


def same(a, b, atol=1e-5):
    return all((x - y).abs().max() < atol for x, y in zip(features(a), features(b)))


def test_weights_of_every_kind_of_file_are_open_clips(tmp_path, state):
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "epoch_1.pt")
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": SMALL, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"}})
    )
    reference, _, _ = open_clip.create_model_and_transforms("small", pretrained=str(tmp_path / "w.safetensors"))
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference.eval().encode_image(images), reference.encode_text(open_clip.tokenize(TEXTS))
    for given in (
        Clip("small", str(tmp_path / "w.safetensors")),
        Clip("small", str(tmp_path / "epoch_1.pt")),
        Clip("small", str(folder)),
        Clip(f"local-dir:{folder}"),
        Clip("custom", str(tmp_path / "w.safetensors")),  # the same text tower under other names
    ):
        found = features(given.build("cpu"))
        assert all((x - y).abs().max() < 1e-5 for x, y in zip(found, expected)), given
    local = Clip(f"local-dir:{folder}").build("cpu")
    assert local.preprocess["mean"] == [0.1, 0.2, 0.3] and local.preprocess["interpolation"] == "bilinear"
    assert not local.notes and not same(local, Clip("small").build("cpu"))
    assert same(Clip("small").build("cpu"), Clip("small").build("cpu"), atol=1e-9)  # random, the same ones each time


def test_an_openai_archive_is_read_and_built_with_quickgelu(tmp_path, state):
    class Archive(torch.nn.Module):
        """What OpenAI's TorchScript files look like from outside."""

        def __init__(self):
            super().__init__()
            for name in ("input_resolution", "context_length", "vocab_size"):
                self.register_buffer(name, torch.tensor(1))
            for name, tensor in state.items():
                *path, last = name.split(".")
                at = self
                for part in path:
                    if not hasattr(at, part):
                        at.add_module(part, torch.nn.Module())
                    at = getattr(at, part)
                at.register_parameter(last, torch.nn.Parameter(tensor.clone()))

        def forward(self, x: torch.Tensor):
            return x

    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(Archive()), tmp_path / "ViT.pt")
    save_file(state, tmp_path / "w.safetensors")
    backbone = Clip("small", str(tmp_path / "ViT.pt")).build("cpu")
    assert backbone.notes == (f"small with {tmp_path / 'ViT.pt'} was trained with QuickGELU and is built with it",)
    quick = Clip("small-quickgelu", str(tmp_path / "w.safetensors")).build("cpu")
    assert same(backbone, quick) and not quick.notes
    plain = Clip("small", str(tmp_path / "w.safetensors"), quick_gelu=False).build("cpu")
    assert not same(backbone, plain) and plain.key != quick.key


def test_a_clip_model_of_transformers_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    layers = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=layers | {"eos_token_id": 49407},
            vision_config=layers | {"image_size": 16, "patch_size": 8},
            projection_dim=16,
        )
    ).eval()
    model.save_pretrained(tmp_path / "hf")
    open_clip.factory._MODEL_CONFIGS["two"] = SMALL | {
        "vision_cfg": SMALL["vision_cfg"] | {"layers": 2},
        "text_cfg": SMALL["text_cfg"] | {"layers": 2},
    }
    backbone = Clip("two", str(tmp_path / "hf")).build("cpu")
    assert "was trained with QuickGELU and is built with it" in backbone.notes[0]  # config.json says so
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(input_ids=open_clip.tokenize(TEXTS), pixel_values=images)
    for found, expected in zip(features(backbone), (out.image_embeds, out.text_embeds)):
        assert (torch.nn.functional.normalize(found, dim=-1) - expected).abs().max() < 1e-5


def test_a_local_file_is_prepared_as_its_architectures_tags_are():
    assert clip._usual_preprocessing("ViT-B-16-SigLIP")["mean"] == (0.5, 0.5, 0.5)
    assert clip._usual_preprocessing("ViT-B-16-SigLIP")["resize_mode"] == "squash"
    assert clip._usual_preprocessing("ViT-B-16")["mean"] == open_clip.OPENAI_DATASET_MEAN
    assert clip._usual_preprocessing("small") == {}


def test_the_activation_is_known_from_tag_or_metadata_or_asked_for(tmp_path, state, monkeypatch):
    file = tmp_path / "w.safetensors"
    save_file(state, file)
    (note,) = Clip("small", str(file)).build("cpu").notes
    assert note.splitlines()[0].endswith(
        "does not say which activation it was trained with; built with GELU. Say it with one of"
    )
    assert [line.split()[0] for line in note.splitlines()[1:]] == [
        "backbone.quick_gelu=true",
        "backbone.quick_gelu=false",
    ]
    for value in (True, False):
        assert Clip("small", str(file), quick_gelu=value).build("cpu").notes == ()
    tags = {
        "openai": {"hf_hub": "org/it/", "quick_gelu": True},
        "laion": {"hf_hub": "org/it/", "mean": (0.5, 0.5, 0.5)},
    }
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda arch, tag: tags.get(tag, {}))
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: str(file))
    openai = Clip("small", "openai").build("cpu")
    assert openai.notes == ("small with openai was trained with QuickGELU and is built with it",)
    assert same(openai, Clip("small-quickgelu", "openai").build("cpu"))
    laion = Clip("small", "laion").build("cpu")
    assert laion.notes == () and laion.preprocess["mean"] == [0.5, 0.5, 0.5]
    assert "asks for the other" in Clip("small", "openai", quick_gelu=False).build("cpu").notes[0]


def test_open_clips_own_tags_say_which_activation():
    assert open_clip.get_pretrained_cfg("ViT-B-16", "openai")["quick_gelu"] is True
    assert "quick_gelu" not in open_clip.get_pretrained_cfg("ViT-B-16", "laion2b_s34b_b88k")


def test_the_key_is_the_image_paths_and_the_digest_the_models(state):
    def build(state, **preprocess):
        model = clip.construct(SMALL, "small")
        model.load_state_dict(state)
        return clip.backbone_of(model, open_clip.SimpleTokenizer(), spec="any", preprocess=preprocess)

    one, two = build(state), build(state | {"ln_final.bias": state["ln_final.bias"] + 1})
    assert one.key == two.key and one.digest != two.digest
    assert one.digest != build(state | {"logit_scale": state["logit_scale"] + 1}).digest
    assert one.key != build(state | {"visual.proj": state["visual.proj"] + 1}).key
    assert one.key != build(state, interpolation="bilinear").key


def noise(width, height):
    draw = torch.Generator().manual_seed(width)
    return Image.fromarray(torch.randint(0, 255, (height, width, 3), generator=draw, dtype=torch.uint8).numpy())


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_views_are_open_clips_transform(mode, interpolation):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    settings = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "interpolation": interpolation, "resize_mode": mode}
    for size in (16, (16, 24)):
        theirs = image_transform_v2(PreprocessCfg(size=size, **settings), is_train=False)
        path = SimpleNamespace(backbone=SimpleNamespace(preprocess={"image_size": size, **settings}))
        for image in (noise(40, 30), noise(31, 57), noise(16, 16), noise(9, 11)):
            assert torch.equal(view(image, path), theirs(image)), (size, image.size)
        train = train_view(noise(40, 30), path, Augment(), seed=(1, 2))
        assert train.shape == (3, *((size, size) if size == 16 else size))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_views_of_a_timm_model_are_timms_transform(mode, monkeypatch):
    resolve = timm.data.resolve_model_data_config
    monkeypatch.setattr(timm.data, "resolve_model_data_config", lambda model: {**resolve(model), "crop_mode": mode})
    backbone = Vision("resnet18").build("cpu")
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(timm.create_model("resnet18")))
    for image in (noise(300, 401), noise(500, 90), noise(60, 60)):
        assert torch.equal(view(image, SimpleNamespace(backbone=backbone)), theirs(image))
    assert backbone.preprocess["crop_pct"] == 0.95


def test_a_crop_that_fits_no_ratio_is_the_largest_centre_within_them():
    """As torchvision's RandomResizedCrop: of 60 x 6 pixels with an area of 1, ten tries fail, and 8 x 6 of the centre are taken."""
    settings = {"image_size": 6, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    image = noise(60, 6)
    found = train_view(
        image, SimpleNamespace(backbone=SimpleNamespace(preprocess=settings)), Augment(1.0, False), seed=(1,)
    )
    expected = image.crop((26, 0, 34, 6)).resize((6, 6), Image.Resampling.BICUBIC)
    assert torch.equal(found, torchvision.transforms.functional.to_tensor(expected))


@pytest.mark.parametrize(
    "arch, width",
    [
        ("mobilenetv3_small_050", 1024),
        ("deit_tiny_distilled_patch16_224", 384),
        ("levit_128s", 384),
        ("convnext_atto", 320),
    ],
)
def test_a_timm_models_features_and_its_own_classifier(arch, width):
    """The width is measured (timm says 288, 192, 384 and 320), and the classifier gives the model's own logits."""
    backbone = Vision(arch, batch=2).build("cpu")
    model = timm.create_model(arch)
    model.load_state_dict(timm.create_model(arch).state_dict())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(arch).eval()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    found = backbone.encode_image(images)
    assert found.shape == (2, width)
    with torch.no_grad():
        expected = model(images)
    logits = found @ backbone.classifier.weight.T + backbone.classifier.bias
    assert (logits - expected).abs().max() < 1e-4 * max(1, expected.abs().max())
    assert float(backbone.scale) == 1 and float(backbone.bias) == 0


def test_a_backbone_tells_which_weights_were_loaded(tmp_path, state, monkeypatch):
    save_file(state, file := tmp_path / "w.safetensors")
    tags = {"laion": {"url": "u"}}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda arch, tag: tags.get(tag, {}))
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: str(file))
    assert Clip("small").build("cpu").pretrained == "random"
    assert Clip("small", "laion").build("cpu").pretrained == "laion"
    assert Clip("small", str(file)).build("cpu").pretrained == str(file)
    assert Micro().build("cpu").pretrained == "embedded"
    assert Vision("test_resnet").build("cpu").pretrained == "random"


def test_a_local_timm_checkpoint_brings_its_classes(tmp_path):
    model = timm.create_model("mobilenetv3_small_050", num_classes=7).eval()
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "best.pth.tar")
    backbone = Vision("mobilenetv3_small_050", str(tmp_path / "best.pth.tar"), batch=2).build("cpu")
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
    logits = backbone.encode_image(images) @ backbone.classifier.weight.T + backbone.classifier.bias
    assert logits.shape == (2, 7) and (logits - expected).abs().max() < 1e-4
    with pytest.raises(UserError, match="best.pth.tar: a checkpoint of another architecture, .* tensors differ: "):
        Vision("mobilenetv3_small_075", str(tmp_path / "best.pth.tar")).build("cpu")


def test_what_needs_text_refuses_an_image_classifier(tmp_path):
    from mergekit_vl.experiments import experiment
    from mergekit_vl.recipes import recipe
    from mergekit_vl.registry import plugins

    plain = {"backbone": {"name": "vision", "arch": "mobilenetv3_small_050"}, "strategy": {"name": "wise_ft"}}
    plan = recipe.parse(plain | {"dataset": {"name": "microworld", "task": "animals_emboss"}}, name="r", where="r")
    ready = experiment.build(plan, plugins.load_plugins())
    store = FeatureStore(tmp_path / "cache")
    with pytest.raises(UserError, match="vision:mobilenetv3_small_050: an image classifier has no text tower, so"):
        experiment.run(ready, tmp_path, device="cpu", store=store, reporter=SILENT)


class Greedy(torch.nn.Module):
    def __init__(self, room):
        super().__init__()
        self.room = room

    def forward(self, images):
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return images.flatten(1)


def test_out_of_memory_tells_the_batch_that_fits():
    images = torch.ones(200, 3, 2, 2)
    with pytest.raises(
        UserError, match=r"out of memory with 128 images at once on cpu; 16 fitted \(set backbone.batch=16\)"
    ):
        Backbone(Greedy(17), None, {}, "greedy").encode_image(images)
    with pytest.raises(UserError, match="not even one fits"):
        Backbone(Greedy(0), None, {}, "greedy").encode_image(images)
    fits = Backbone(Greedy(17), None, {}, "greedy", block=16)
    assert fits.encode_image(images).shape == (200, 12) and fits.key != Backbone(Greedy(17), None, {}, "greedy").key
    with pytest.raises(RuntimeError, match="another kind"):
        broken = Greedy(1)
        broken.forward = lambda images: (_ for _ in ()).throw(RuntimeError("another kind"))
        Backbone(broken, None, {}, "greedy").encode_image(images)


def test_a_block_of_any_size_gives_the_same_bytes():
    tower = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten())
    preprocess = {"image_size": 224}
    blocks = {size: Backbone(tower, None, preprocess, "conv", block=size) for size in (8, 40, 128)}
    assert {backbone.at_once for backbone in blocks.values()} == {8}
    images = torch.randn(21, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    first, *others = (backbone.encode_image(images) for backbone in blocks.values())
    assert all(torch.equal(first, other) for other in others)
    assert len({backbone.key for backbone in blocks.values()}) == 1
    assert Backbone(tower, None, {"image_size": 48}, "small").at_once == 128
    patches = torch.nn.Conv2d(3, 4, 16, stride=16)
    assert Backbone(patches, None, preprocess, "transformer").at_once == 128
    assert Backbone(tower, None, {"image_size": [1024, 2048]}, "large").at_once == 1


def test_bad_input_is_one_line(tmp_path, state):
    save_file(state, tmp_path / "w.safetensors")
    save_file(state | {"logit_scale": torch.tensor(torch.nan)}, tmp_path / "nan.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-9])
    (tmp_path / "empty").mkdir()
    cases = {
        Clip("smal"): "unknown arch 'smal' (did you mean 'small'?)",
        Clip("small", "laoin"): "unknown pretrained tag 'laoin'",
        Clip("small", str(tmp_path / "cut.safetensors")): "cut.safetensors: damaged or truncated safetensors",
        Clip("small", str(tmp_path / "nan.safetensors")): "nan.safetensors: logit_scale has values that are not finite",
        Clip("small", str(tmp_path / "empty")): "which weights? found none",
        Clip("other", str(tmp_path / "w.safetensors")): (
            "w.safetensors: a checkpoint of another architecture, 2 tensors differ: text_projection is (32, 16) in the "
            "checkpoint, (32, 8) in the model; visual.proj is (32, 16) in the checkpoint, (32, 8) in the model"
        ),
        Clip(f"local-dir:{tmp_path}"): "no open_clip_config.json",
        Clip("small", batch=0): "batch=0",
        Clip("small", tokenizer="here"): "tokenizer is of no use: small takes none from the hub (remove it)",
        Clip("small", hf_text="here"): "hf_text is of no use",
        Clip("ViT-B-32", "laion2b_s34b_b79k"): "is not on this machine and cannot be fetched",
        Clip("hf-hub:org/name"): "open_clip_config.json of org/name is not on this machine and cannot be fetched",
        Clip("ViT-B-16-SigLIP"): "the tokenizer timm/ViT-B-16-SigLIP is not on this machine",
        Clip("roberta-ViT-B-32"): "roberta-base is not on this machine",
        Vision("resnet1888"): "unknown arch 'resnet1888'",
        Vision("resnet18.a1_in2k"): "unknown pretrained tag 'a1_in2k' (did you mean 'a1_in1k'?)",
        Vision("resnet18.a1_in1k"): "timm/resnet18.a1_in1k is not on this machine and cannot be fetched",
    }
    for given, message in cases.items():
        with pytest.raises(UserError) as error:
            given.build("cpu")
        assert message in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_weights_that_are_not_there_are_told_before_anything_is_read(tmp_path):
    """By `check` too, which builds no model; a tag beside a model that brings its own weights is another model's."""
    for make, message in (
        (lambda: Clip("small", "gone/w.pt"), "gone/w.pt: no such checkpoint"),
        (lambda: Vision("resnet18", "gone.pth"), "gone.pth: no such checkpoint"),
        (lambda: Clip("local-dir:here", "openai"), "the model has weights of its own (set pretrained=null)"),
        (lambda: Clip("hf-hub:org/name", "openai"), "the model has weights of its own (set pretrained=null)"),
    ):
        with pytest.raises(UserError) as error:
            make()
        assert message in str(error.value)
    (tmp_path / "w.pt").touch()
    assert Clip("local-dir:here", str(tmp_path / "w.pt")).pretrained


def test_bfloat16_encoders_are_another_key_and_near_the_same_features(tmp_path):
    exact = Micro().build("cpu")
    assert exact.precision == "float32"
    coarse = replace(exact, precision="bfloat16")  # as on a GPU
    store, images = FeatureStore(tmp_path), split(6)
    ours, theirs = (store.features(ImageEncoder(backbone), images) for backbone in (exact, coarse))
    assert theirs.dtype == torch.float32 and len(list(tmp_path.glob("*/*"))) == 2
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
    assert not torch.equal(ours, theirs) and cosine.min() > 0.999
    assert coarse.with_weights({}).precision == "bfloat16"


def test_a_part_of_what_was_encoded_is_taken_from_it(tmp_path):
    path, whole = ImageEncoder(Micro().build("cpu")), split(7)
    part = replace(whole.of_classes([2, 0]), rows=whole.of_classes([2, 0]).rows[::-1].copy())
    drawn = dict(epochs=2, seed=1, augment=Augment())
    store, apart = FeatureStore(tmp_path / "cache"), FeatureStore(None)
    store.features(path, whole), store.views(path, whole, **drawn)
    encoded = store.encoded
    assert torch.equal(store.features(path, part), apart.features(path, part))
    assert torch.equal(store.views(path, part, **drawn), apart.views(path, part, **drawn))
    assert store.encoded == encoded == 7 + 14
    store.views(path, part, **drawn | {"seed": 2})
    store.views(path, whole, **drawn | {"seed": 2})  # the whole is not in its part
    assert store.encoded == encoded + 10 + 14
    store.features(path, replace(part, source=split(7, seed=1).source))  # the same rows of other images
    assert store.encoded == encoded + 10 + 14 + 5
