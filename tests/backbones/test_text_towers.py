"""Text towers of every kind: what we feed them gives what the library's own encode_text gives, and the traps are shown to be traps."""

import open_clip
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mergekit_vl.backbones import clip, text
from mergekit_vl.backbones.text import OpenClipText
from mergekit_vl.errors import UserError

NAMES = ("dog", "great white shark", "apple", "ice cream")
WORDS = "a photo of a"


class WordTokenizer:
    """A stand-in for the hub's tokenizers: one id a word, and what each of them puts around and behind the words."""

    def __init__(self, length, *, start=(), end=(1,), padding=1, strip=""):
        self.length, self.start, self.end, self.padding, self.strip = length, list(start), list(end), padding, strip
        self.ids = {}

    def __call__(self, texts, context_length=None):
        length = context_length or self.length
        rows = []
        for line in texts:
            words = [w for w in "".join(" " if c in self.strip else c for c in line).replace(".", " . ").split()]
            ids = [self.ids.setdefault(w, 5 + len(self.ids)) for w in words]
            room = length - len(self.start) - len(self.end)
            row = self.start + ids[:room] + self.end
            rows.append(row + [self.padding] * (length - len(row)))
        return torch.tensor(rows)


VISION = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
TIMM = {"timm_model_name": "mobilenetv3_small_050", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
BPE = {"width": 32, "heads": 2, "layers": 2, "context_length": 24}
FEW = BPE | {"vocab_size": 64}
MULTIMODAL = {"width": 32, "heads": 2, "layers": 1, "context_length": 24, "attn_pooler_heads": 2}
KINDS = {
    "classic": {"vision_cfg": VISION, "text_cfg": BPE},
    "resnet, quickgelu": {
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": BPE,
        "quick_gelu": True,
    },
    "custom text, timm image, projection with bias": {
        "vision_cfg": TIMM,
        "text_cfg": BPE | {"proj_bias": True},
        "custom_text": True,
    },
    "siglip": {
        "vision_cfg": VISION,
        "text_cfg": FEW | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
        "custom_text": True,
        "init_logit_bias": -10,
    },
    "clipa": {"vision_cfg": VISION, "text_cfg": FEW | {"no_causal_mask": True, "pool_type": "last"}},
    "mobileclip": {"vision_cfg": TIMM, "text_cfg": BPE | {"no_causal_mask": True}, "custom_text": True},
    "coca": {
        "vision_cfg": VISION | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": BPE | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": MULTIMODAL,
        "custom_text": True,
    },
    "worldwide": {"vision_cfg": VISION, "text_cfg": FEW | {"pool_type": "eos", "eos_id": 2}},
    "hugging face": {"vision_cfg": VISION, "text_cfg": {"context_length": 24, "hf_model_name": "HERE"}},
}
TOKENIZERS = {
    "siglip": lambda: WordTokenizer(24, strip=".,_"),
    "clipa": lambda: WordTokenizer(24, start=[3], end=[0], padding=0),
    "worldwide": lambda: WordTokenizer(24, start=[0], end=[2]),
    "hugging face": lambda: WordTokenizer(24, start=[0], end=[2]),
}
TRIMMED = {"classic", "resnet, quickgelu", "custom text, timm image, projection with bias", "worldwide", "hugging face"}


def tower(kind, folder=None, device="cpu"):
    config = {"embed_dim": 16, **KINDS[kind]}
    if kind == "hugging face":
        transformers = pytest.importorskip("transformers")
        transformers.RobertaConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        ).save_pretrained(folder)
        config["text_cfg"] = config["text_cfg"] | {"hf_model_name": str(folder)}
    model = clip.construct(config, kind)
    tokenizer = TOKENIZERS.get(kind, lambda: open_clip.SimpleTokenizer(context_length=24))()
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # open_clip's initial text weights are so small that everything looks alike
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return clip.backbone_of(model, tokenizer, spec=kind, preprocess={}, device=device)


@pytest.fixture(scope="module", params=list(KINDS))
def backbone(request, tmp_path_factory):
    torch.backends.mha.set_fastpath_enabled(False)
    return tower(request.param, tmp_path_factory.mktemp("hf"))


def library(backbone, texts):
    with torch.no_grad():
        return backbone.model.encode_text(backbone.text.tokenizer(texts), normalize=False)


def test_texts_and_prompts_are_the_librarys(backbone):
    """Whole texts, and the same words as a context, to 1e-5 of open_clip's encode_text."""
    texts = [f"{WORDS} {name}." for name in NAMES]
    expected = library(backbone, texts)
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    assert (backbone.encode_texts(texts) - expected).abs().max() < 1e-5
    prompts = backbone.tokenize([f"{name}." for name in NAMES], 4)
    context = backbone.embed(WORDS)
    assert context.shape == (4, backbone.token_width)
    for given in (context, context.expand(4, -1, -1)):
        assert (backbone.encode_prompts(prompts, given) - expected).abs().max() < 1e-5
    longest = int((backbone.text.tokenizer(texts) != backbone.text.tokenizer([""])[0, -1]).sum(-1).max())
    assert prompts.ids.shape[1] == (longest if backbone.spec in TRIMMED else 24)


def test_any_context_is_as_if_its_vectors_were_words(backbone):
    """The reference puts the vectors into the rows of four words of the embedding table; features and gradients."""
    prompts = backbone.tokenize([f"{name}." for name in NAMES], 4)
    context = torch.randn(2, 4, 4, backbone.token_width, generator=torch.Generator().manual_seed(2))  # [S, K, M, W]
    context = (0.3 * context).requires_grad_(True)
    ours = backbone.encode_prompts(prompts, context)
    assert ours.shape == (2, 4, 16)
    words = ["red", "green", "blue", "black"]
    rows = backbone.text.tokenizer([" ".join([*words, f"{name}."]) for name in NAMES])
    spots = slice(prompts.start, prompts.start + 4)
    table = backbone.text.embedding.weight
    for s in range(2):
        for k in range(4):
            kept = table.detach().clone()
            table.data[rows[k, spots]] = context[s, k].detach()
            with torch.no_grad():
                expected = backbone.model.encode_text(rows[k : k + 1], normalize=False)[0]
            table.data.copy_(kept)
            assert (ours[s, k] - expected).abs().max() < 1e-5
    (gradient,) = torch.autograd.grad(ours.sum(), context)
    assert gradient.abs().sum() > 1e-3
    assert not backbone.text.embedding._forward_hooks


def test_chunks_with_recomputation_change_nothing(backbone, monkeypatch):
    prompts = backbone.tokenize([f"{name}." for name in NAMES], 4)
    context = backbone.embed(WORDS).requires_grad_(True)

    def run():
        features = backbone.encode_prompts(prompts, context.expand(3, 1, -1, -1))
        (gradient,) = torch.autograd.grad(features.square().sum(), context)
        return features.detach(), gradient

    whole = run()
    calls = []
    inner = backbone.text._encode
    monkeypatch.setattr(backbone.text, "rows_at_once", lambda length: 5)
    monkeypatch.setattr(backbone.text, "_encode", lambda *args: calls.append(len(args[0])) or inner(*args))
    chunked = run()
    assert calls[:3] == [5, 5, 2] and sorted(calls[3:]) == [2, 5, 5]  # once forward, once again in the backward
    for a, b in zip(whole, chunked):
        assert (a - b).abs().max() <= 1e-5 * max(1, a.abs().max())
    with torch.no_grad():
        assert (backbone.encode_prompts(prompts, context.expand(3, 1, -1, -1)) - whole[0]).abs().max() < 1e-5


def test_what_a_tokenizer_cannot_take_is_said(backbone):
    with pytest.raises(UserError, match="the tokenizer maps ' ' to nothing"):
        backbone.tokenize(["dog", " "], 4)
    with pytest.raises(UserError, match="is longer than the 24 tokens of"):
        backbone.tokenize(["dog", "very " * 22 + "big dog"], 4)
    assert backbone.tokenize(["very " * 16 + "dog"], 4).ids.shape[1] <= 24


def test_a_tower_that_was_moved_or_given_other_weights_uses_those():
    backbone = tower("classic")
    prompts, context = backbone.tokenize(["dog.", "cat."], 4), backbone.embed(WORDS)
    before = backbone.encode_prompts(prompts, context)
    given = {"encode.model.positional_embedding": 2 * backbone.model.positional_embedding}
    assert (torch.func.functional_call(backbone.text, given, (prompts, context)) - before).abs().max() > 0.1
    seen = []
    hook = backbone.model.transformer.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["attn_mask"].dtype), with_kwargs=True
    )
    backbone.text.double()
    after = backbone.encode_prompts(prompts, context.double())
    hook.remove()
    assert after.dtype == torch.float64 and seen == [torch.float64] and (after - before).abs().max() < 1e-5


def test_trap_a_hook_outside_the_checkpoint_gives_wrong_gradients():
    """The recomputation runs after the hook is gone, and nothing says so: why `_encode` holds both."""
    backbone = tower("classic")
    prompts = backbone.tokenize([f"{name}." for name in NAMES], 4)
    context = backbone.embed("a sketch of a").requires_grad_(True)

    def place(module, args, words):
        return torch.cat([words[:, :1], context.expand(4, -1, -1), words[:, 5:]], 1)

    def gradient(features):
        return torch.autograd.grad(features.square().sum(), context)[0]

    right = gradient(backbone.encode_prompts(prompts, context))
    backbone.text.embedding.weight.requires_grad_(True)  # where nothing of the tower is tuned, torch notices at least
    hook = backbone.text.embedding.register_forward_hook(place)
    features = checkpoint(backbone.text._encode, prompts.ids, None, 1, use_reentrant=False)
    hook.remove()
    wrong = gradient(features)
    assert (features - backbone.encode_prompts(prompts, context)).abs().max() < 1e-5  # the features are right
    assert (wrong - right).norm() > 0.1 * right.norm()


@pytest.mark.parametrize("kind", ["siglip", "clipa", "mobileclip", "coca"])
def test_trap_towers_that_may_not_be_cut_are_wrong_when_they_are(kind):
    backbone = tower(kind)
    texts = [f"{WORDS} {name}." for name in NAMES]
    ids = backbone.text.tokenizer(texts)
    short = ids[:, : int((ids != ids[0, -1]).sum(-1).max()) + 1]
    sliced = {}
    if kind == "clipa":  # the others slice their positions themselves, so that nothing stops a short text
        sliced = {"model.positional_embedding": backbone.model.positional_embedding[: short.shape[1]]}
    with torch.no_grad():
        cut = torch.func.functional_call(backbone.text.encode, sliced, (short,))
    assert (cut - library(backbone, texts)).abs().max() > 0.05
    assert backbone.text._end is None


def test_trap_a_classic_tower_refuses_short_ids_of_its_own():
    backbone = tower("classic")
    with pytest.raises(RuntimeError, match="size of tensor"):
        backbone.model.encode_text(backbone.text.tokenizer(["a dog"])[:, :5])


def test_trap_siglips_logits_are_a_softmax_of_scale_cosine_and_bias():
    from mergekit_vl.adapters.zero_shot import ZeroShot
    from mergekit_vl.models.model import Classes, Ensemble, Single

    backbone = tower("siglip")
    model, classes = Single(backbone, ZeroShot()), Classes(NAMES)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features = {backbone.key: backbone.encode_image(images)}
    with torch.no_grad():
        ids = backbone.text.tokenizer([f"a photo of a {name}." for name in NAMES])
        expected, _ = backbone.model.get_logits(images, ids)
    logits = model.bind(classes)(features)
    assert (logits - expected).abs().max() < 1e-4 and logits.max() < 10  # the bias of -10 is in
    ensemble = Ensemble((model, model), (0.5, 0.5)).bind(classes)(features).exp()
    assert (ensemble - expected.softmax(-1)).abs().max() < 1e-5
    assert (ensemble - expected.sigmoid()).abs().max() > 0.1


class NoInitialValues(torch.overrides.TorchFunctionMode):
    """In-place functions on meta tensors change nothing: leaving them out makes building three times as fast."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in (
            "normal_",
            "uniform_",
            "fill_",
            "zero_",
            "mul_",
            "add_",
            "erfinv_",
            "clamp_",
            "copy_",
            "trunc_normal_",
        ):
            return (args or (kwargs["tensor"],))[0]
        return function(*args, **(kwargs or {}))


def test_every_architecture_that_needs_no_network_builds():
    """All of open_clip's, on the meta device, where nothing is allocated; prints those it cannot build, with the reason."""
    built, cannot = [], {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        needed = config["text_cfg"].get("hf_tokenizer_name")
        if needed:
            cannot[name] = needed
        if "hf_model_name" in config["text_cfg"]:
            continue
        with torch.device("meta"), NoInitialValues():
            model = clip.construct(config, name)
        tower = OpenClipText(model, None, name)
        causal = not config["text_cfg"].get("no_causal_mask") and not config["text_cfg"].get("embed_cls")
        assert (tower._end is not None) == causal, name
        assert tower.width == config["text_cfg"].get("width", 512), name
        assert 0 < tower.rows_at_once(77) < text.ACTIVATIONS, name
        built.append(name)
    assert len(built) > 100 and len(cannot) > 30
    print(f"\nbuilt {len(built)} on the meta device")
    for name, needed in cannot.items():
        part = "text tower and tokenizer" if name not in built else "tokenizer"
        print(
            f"{name}: its {part} are files of {needed} on the hub (backbone.hf_text, backbone.tokenizer take a folder)"
        )
