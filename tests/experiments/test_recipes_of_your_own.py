"""The recipes for models, checkpoints and data of one's own, run small: what their heads ask for is made here."""

import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from recording import Recording
from safetensors.torch import load_file, save_file

from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.backbones import clip
from mergekit_vl.backbones.micro import Micro
from mergekit_vl.errors import UserError
from mergekit_vl.experiments import experiment
from mergekit_vl.experiments.open_run import open_model
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.models.model import Classes, Single
from mergekit_vl.recipes import recipe
from mergekit_vl.recipes.loading import load_recipe
from mergekit_vl.registry import plugins

NAMES = ("dog", "apple", "car", "swan")


def run(plain, name, out):
    plan = recipe.parse(plain, name=name, where=name)
    ready = experiment.build(plan, plugins.load_plugins())
    store, notes = FeatureStore(out / "cache"), []
    experiment.run(ready, out / "run", device="cpu", store=store, reporter=Recording(notes))
    return {row["row"]: row for row in json.loads((out / "run" / "report.json").read_text())["summary"]}, notes


def images(folder, count):
    draw = np.random.default_rng(0)
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draw.integers(0, 255, (48, 60, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")


def test_mergetune_from_coop_checkpoint(tmp_path):
    """On the micro CLIP, which any recipe can name instead of a model that must be fetched."""
    images(tmp_path / "oxford_pets" / "images", 4)
    split = {
        part: [[f"{name}/{i}.png", label, name] for label, name in enumerate(NAMES) for i in rows]
        for part, rows in (("train", (0, 1)), ("val", (2,)), ("test", (3,)))
    }
    (tmp_path / "oxford_pets" / "split_zhou_OxfordPets.json").write_text(json.dumps(split))
    micro = Micro().build("cpu")
    ctx = micro.embed("a photo of a") + 0.02
    state = OrderedDict(ctx=ctx, token_prefix=micro.text.before().expand(2, 1, -1).clone())
    torch.save({"state_dict": state, "epoch": 50}, tmp_path / "model.pth.tar-50")
    plain = dict(load_recipe("mergetune_from_coop_checkpoint").plain)
    plain["backbone"] = {"name": "micro"}
    plain["dataset"] = plain["dataset"] | {"root": str(tmp_path)}
    plain["tuned"] = [plain["tuned"][0] | {"checkpoint": str(tmp_path / "model.pth.tar-50")}]
    plain["strategy"] = [plain["strategy"][0] | {"epochs": 1}, *plain["strategy"][1:]]
    rows, _ = run(plain, "mergetune_from_coop_checkpoint", tmp_path)
    assert list(rows) == ["zero-shot", "coop", "continued", "CE only", "mergetune", "wise_ft", "ensemble"]
    assert rows["coop"]["parameters"] == 4 * 128


def test_siglip_coop(tmp_path, monkeypatch):
    """On a small SigLIP in a folder: open_clip's classes, a tokenizer of Hugging Face without a start token."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "</s>", "<unk>", "x", "y", "cat", "a", "photo", "of", "very", *NAMES]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    model = tmp_path / "siglip"
    fast.save_pretrained(model)
    config = {
        "embed_dim": 16,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": len(words),
            "hf_tokenizer_name": "org/siglip",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": 32,
            "heads": 2,
            "layers": 1,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    }
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (model / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(clip.construct(config, "siglip").state_dict(), model / "open_clip_model.safetensors")
    images(tmp_path / "pets", 12)

    backbone = clip.Clip(f"local-dir:{model}").build("cpu")
    prompts = backbone.tokenize(["dog.", "swan."], 4)
    assert prompts.start == 0 and prompts.ids.shape == (2, 16) and backbone.preprocess["resize_mode"] == "squash"
    context = backbone.embed("a photo of a")
    assert torch.allclose(backbone.encode_prompts(prompts, context), backbone.encode_texts(["a photo of a dog", "a photo of a swan"]), atol=1e-5)  # fmt: skip

    plain = dict(load_recipe("siglip_coop").plain)
    plain["backbone"] = {"name": "clip", "arch": f"local-dir:{model}"}
    plain["dataset"] = {"name": "folder", "path": str(tmp_path / "pets")}
    plain["tuned"] = [{"tuner": {"name": "coop", "epochs": 2}}]
    plain["strategy"] = [plain["strategy"][0] | {"epochs": 1}, *plain["strategy"][1:]]
    rows, notes = run(plain, "siglip_coop", tmp_path)
    assert {"zero-shot", "coop", "mergetune"} <= rows.keys() and rows["coop"]["parameters"] == 4 * 32 and not notes

    scope: dict = {}  # the card's lines, in plain open_clip
    monkeypatch.chdir(tmp_path / "run")
    exec((tmp_path / "run" / "README.md").read_text().split("```python")[1].split("```")[0], scope)  # noqa: S102
    merged = Single(backbone, Prompt.load(tmp_path / "run" / "merged.safetensors"))
    ours = torch.nn.functional.normalize(merged.text_features(Classes(("dog", "cat"))), dim=-1)
    assert (scope["text"] - ours).abs().max() < 1e-5


SMALL_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """A small CLIP as open_clip's own folder, and the same one fine-tuned, as open_clip's training checkpoint writes it."""
    place = tmp_path_factory.mktemp("models")
    model = clip.construct(SMALL_CLIP, "small")
    (place / "zs").mkdir()
    (place / "zs" / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL_CLIP, "preprocess_cfg": {}}))
    save_file(model.state_dict(), place / "zs" / "open_clip_model.safetensors")
    tuned = {f"module.{name}": tensor + 0.01 * torch.sign(tensor) for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": tuned}, place / "epoch_3.pt")
    images(place / "pets", 8)
    return place


def own_recipe(small_clip, **tuned):
    plain = dict(load_recipe("wise_ft_own").plain)
    plain["backbone"] = {"name": "clip", "arch": f"local-dir:{small_clip / 'zs'}"}
    plain["dataset"] = {"name": "folder", "path": str(small_clip / "pets")}
    plain["tuned"] = [plain["tuned"][0] | {"checkpoint": str(small_clip / "epoch_3.pt")} | tuned]
    return plain


def test_wise_ft_own(small_clip, tmp_path):
    """The merged folder loads in plain open_clip, and its tensors lie between the two models' at the alpha that is told."""
    import open_clip

    rows, _ = run(own_recipe(small_clip), "wise_ft_own", tmp_path)
    assert list(rows) == ["zero-shot", "fine-tuned", "wise_ft", "wise_ft 0.5", "wise_ft 0.3", "ensemble"]
    ((told,),) = rows["wise_ft"]["chosen"].values()
    assert told["split"] == "val" and 0 <= told["value"] <= 1
    results = [json.loads(file.read_text()) for file in (tmp_path / "run" / "results").glob("*.json")]
    assert {(r["model"], r["pretrained"]) for r in results} == {(f"local-dir:{small_clip / 'zs'}",) * 2}
    merged, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'run' / 'merged'}")
    start, _, _ = open_clip.create_model_and_transforms(f"local-dir:{small_clip / 'zs'}")
    assert preprocess.transforms[0].size == 16
    for (name, tensor), other in zip(merged.state_dict().items(), start.state_dict().values()):
        torch.testing.assert_close(tensor, other + told["value"] * 0.01 * torch.sign(other), msg=name)


def test_the_alpha_of_the_model_that_is_deployed_is_chosen_over_all_data_sets(small_clip, tmp_path):
    images(tmp_path / "flowers", 9)
    plain = own_recipe(small_clip)
    plain["dataset"] = [plain["dataset"], {"name": "folder", "path": str(tmp_path / "flowers")}]
    rows, made = run(plain, "wise_ft_own", tmp_path)
    ((told,),) = rows["wise_ft"]["chosen"].values()
    assert told["cells"] == 2  # one alpha for both
    for row in rows.values():
        assert [each["dataset"] for each in row["datasets"]] == ["pets", "flowers"]
        both = [each["columns"]["test"] for each in row["datasets"]]
        assert row["columns"]["test"]["acc1"] == pytest.approx(sum(each["acc1"] for each in both) / 2)
        assert (
            row["columns"]["test"]["interval"] is None
        )  # across two data sets there is none; over their images there are
        assert all(low <= each["acc1"] <= high for each in both for low, high in [each["interval"]])
        assert row["columns"]["test"]["n"] == sum(each["n"] for each in both)


def test_weights_of_another_architecture_are_named_before_anything_is_computed(small_clip, tmp_path):
    torch.save({"visual.conv1.weight": torch.zeros(3, 3)}, tmp_path / "other.pt")
    with pytest.raises(
        UserError, match=r"other.pt: a checkpoint of another architecture .*visual.class_embedding is missing"
    ):
        run(own_recipe(small_clip, checkpoint=str(tmp_path / "other.pt")), "wise_ft_own", tmp_path)
    assert not list((tmp_path / "run").glob("state/*"))


@pytest.mark.parametrize("tuner", [{"name": "linear_probe"}, {"name": "full", "epochs": 1, "batch": 8, "lr": 1e-3}])
def test_linear_head_timm(small_clip, tmp_path, tuner):
    """With random weights; what a full tuning leaves loads in plain timm and answers as ours does."""
    import timm

    plain = dict(load_recipe("linear_head_timm").plain)
    plain["backbone"] = {"name": "vision", "arch": "test_resnet"}
    plain["dataset"] = {"name": "folder", "path": str(small_clip / "pets")}
    plain["protocol"] = {"name": "few_shot", "shots": 4}
    plain["tuned"] = [{"tuner": tuner}]
    plain["strategy"] = [plain["strategy"][0] | {"epochs": 1, "batch": 8}, *plain["strategy"][1:]]
    rows, _ = run(plain, "linear_head_timm", tmp_path)
    assert list(rows) == ["class means", tuner["name"], "mergetune", "wise_ft", "ensemble"]
    result = json.loads(next((tmp_path / "run" / "results").glob("*.json")).read_text())
    assert (result["model"], result["pretrained"]) == ("test_resnet", "random")
    if tuner["name"] == "linear_probe":
        assert load_file(tmp_path / "run" / "merged.safetensors")["weight"].shape[0] == len(NAMES)
        return
    file = tmp_path / "run" / "merged" / "model.safetensors"
    model = timm.create_model("test_resnet", num_classes=len(NAMES), checkpoint_path=str(file)).eval()
    used = open_model(str(tmp_path / "run"), plugins.load_plugins(), row=None, device="cpu")
    draw = torch.randn(2, 3, *timm.data.resolve_model_data_config(model)["input_size"][1:])
    path = used.model.encoders[0]
    with torch.no_grad():
        ours = used.model.bind(used.classes)({path.key: path.encode(draw, block=2)})
        torch.testing.assert_close(ours, model(draw), atol=1e-5, rtol=1e-4)
    again = timm.create_model(f"local-dir:{file.parent}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(draw), model(draw))


SHORT = {
    "robust_micro": ["tuned.0.tuner.epochs=1", "strategy.0.epochs=1", "protocol.shots=2", "dataset.shifts=[clean]"],
    "robust_micro_probe": ["strategy.0.epochs=2", "protocol.shots=2", "dataset.shifts=[clean]"],
    "multi_task_micro": ["tuned.0.tuner.epochs=1", "protocol.shots=1"],
}


@pytest.mark.parametrize("name", SHORT)
def test_recipes_of_the_microworld_run_small(name, tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_vl.microworld.tasks.PER_CLASS", {"train": 3, "val": 2, "test": 3})
    monkeypatch.setattr(experiment, "LINE_POINTS", 3)
    short = ["controls=false", *SHORT[name]]
    plain = dict(load_recipe(name, short).plain)
    if name == "multi_task_micro":
        plain["dataset"], plain["strategy"] = plain["dataset"][:2], plain["strategy"][:2]
    rows, _ = run(plain, name, tmp_path)
    if name != "multi_task_micro":
        assert list(rows["mergetune"]["columns"]) == ["ID", "OOD"]
        mean = sum(column["acc1"] for column in rows["mergetune"]["columns"].values()) / 2
        assert rows["mergetune"]["score"] == pytest.approx(mean)
        return
    tuned = ["full on sea_and_sky_emboss", "full on household_scatter"]
    assert list(rows) == ["zero-shot", *tuned, "task_arithmetic", "uniform_soup"]
    columns = ["sea_and_sky_emboss", "household_scatter"]
    own = [rows[row]["columns"][column]["acc1"] for row, column in zip(tuned, columns)]
    merged = [rows["uniform_soup"]["columns"][column]["acc1"] for column in columns]
    assert rows["uniform_soup"]["normalised"] == pytest.approx(50 * (merged[0] / own[0] + merged[1] / own[1]))
