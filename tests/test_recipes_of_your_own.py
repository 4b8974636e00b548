"""The recipes for models, checkpoints and data of one's own, run small: what their heads ask for is made here."""

import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mergekit_vl import experiment, plugins, recipe
from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.backbones import clip
from mergekit_vl.backbones.micro import Micro
from mergekit_vl.features import FeatureStore
from mergekit_vl.model import Classes, Single

NAMES = ("dog", "apple", "car", "swan")


def run(plain, name, out):
    plan = recipe.parse(plain, name=name, where=name)
    ready = experiment.build(plan, plugins.load_plugins())
    store, notes = FeatureStore(out / "cache"), []
    experiment.run(ready, out / "run", device="cpu", store=store, progress=lambda *_: None, warn=notes.append)
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
    plain = dict(recipe.load_recipe("mergetune_from_coop_checkpoint").plain)
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

    plain = dict(recipe.load_recipe("siglip_coop").plain)
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
