"""Code for model cards that uses a saved adapter without mergekit-vl."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mergekit_vl.models.adapter import Usage
from mergekit_vl.printable import in_markdown

LOAD_FILE = "from safetensors.torch import load_file"
PROMPT = """
ctx = load_file("merged.safetensors")["ctx"]  # [M, W]
embedding = next(m for m in getattr(model, "text", model).modules() if isinstance(m, torch.nn.Embedding))
start = int((tokenizer(["x"]) != tokenizer(["y"])).nonzero()[0, 1])  # the position of the first word


def classifier(names):
    \"\"\"Class names to normalised text features [K, D].\"\"\"
    ids = tokenizer([" ".join(["x"] * len(ctx)) + f" {name}." for name in names])

    def insert(module, arguments, words):  # the learnt context takes the place of the x's
        return torch.cat([words[:, :start], ctx.expand(len(words), -1, -1), words[:, start + len(ctx) :]], 1)

    hook = embedding.register_forward_hook(insert)
    with torch.no_grad():
        text = model.encode_text(ids, normalize=True)
    hook.remove()
    return text


text = classifier(["dog", "cat"])
# logits = model.logit_scale.exp() * model.encode_image(images, normalize=True) @ text.T    (a SigLIP adds its logit_bias)
"""
HEAD = """
head = load_file("{file}")  # weight [K, D] and bias [K]
# features = {features}
# logits = features @ head["weight"].T + head["bias"]
"""
TEXT_TOWER = """
tokenizer = open_clip.get_tokenizer("local-dir:merged")
# text = model.encode_text(tokenizer([f"a photo of a {name}." for name in names]), normalize=True)
# logits = model.logit_scale.exp() * model.encode_image(images, normalize=True) @ text.T
"""


def of_prompt() -> Usage:
    told = "`merged.safetensors` holds the context vectors that {main} made in the first cell. They go before a class name:"
    return Usage(told, (LOAD_FILE, PROMPT.rstrip()), ("import torch",))


def of_head(names: Sequence[str], *, normalise: bool) -> Usage:
    told = (
        f"`merged.safetensors` holds the linear head that {{main}} made in the first cell; its classes: {some(names)}."
    )
    features = "model.encode_image(images, normalize=True)" if normalise else "what the timm model's classifier reads"
    return Usage(told, (LOAD_FILE, HEAD.format(file="merged.safetensors", features=features).rstrip()))


def of_timm_tower(arch: str, names: Sequence[str], rows: int) -> Usage:
    told = f"`merged/` holds the whole model that {{main}} made in the first cell; its classes: {some(names)}."
    made = (
        f'model = timm.create_model({json.dumps(arch)}, num_classes={rows}, checkpoint_path="merged/model.safetensors")'
    )
    return Usage(told, (made,), ("import timm",), on_backbone=False)


def of_clip_tower(names: Sequence[str] | None) -> Usage:
    """`names` of its linear head's classes; None: its text tower makes the classifier."""
    told = "`merged/` holds the whole model that {main} made in the first cell, as open_clip's own folder."
    load = 'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:merged")'
    if names is None:
        return Usage(told, (load, TEXT_TOWER.rstrip()), ("import open_clip",), on_backbone=False)
    told += f" Its classifier is a linear head; its classes: {some(names)}."
    head = HEAD.format(file="linear_head.safetensors", features="model.encode_image(images, normalize=True)")
    return Usage(told, (load, LOAD_FILE, head.rstrip()), ("import open_clip",), on_backbone=False)


def some(names: Sequence[str]) -> str:
    """The first ten, as Markdown shows them."""
    return in_markdown(", ".join(names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
