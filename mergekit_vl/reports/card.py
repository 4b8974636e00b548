"""The model card of a run: the table, the gain, and the few lines that use the merged model in plain open_clip or timm."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mergekit_vl import __version__
from mergekit_vl.adapters.linear_head import LinearHead
from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.adapters.tower import Tower
from mergekit_vl.models import choices
from mergekit_vl.printable import in_code, in_markdown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mergekit_vl.models.model import Model
    from mergekit_vl.reports.results import Report

USE = """
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


def card(report: Report, backbone: Mapping[str, Any], gain: str, model: Model) -> str:
    """Markdown; `backbone` is the recipe's mapping, `model` the main one of the first cell."""
    columns = report.metric.columns
    headline = [report.metric.headline] * (len(columns) > 1)
    chosen = ["chosen"] * any(r.chosen for r in report.summary)
    lines = [
        f"# {in_markdown(report.recipe)}: {in_markdown(report.main)}",
        "",
        f"Made by mergekit-vl {__version__}; repeat it with `mergekit-vl run recipe.yaml`.",
        "",
        "| row | " + " | ".join(map(in_markdown, [*columns, *headline, "heads a sample", *chosen])) + " |",
        "|---" * (2 + len(columns) + len(headline) + len(chosen)) + "|",
    ]
    for r in report.summary:
        cells = [f"{c.acc1:.1f}" for c in r.columns.values()] + [f"{r.score:.1f}"] * len(headline)
        cells += [str(r.forwards), *([in_markdown(choices.told(r.chosen))] * len(chosen))]
        lines.append(f"| {in_markdown(r.row)} | {' | '.join(cells)} |")
    selection = report.selection[0].upper() + report.selection[1:]
    lines += ["", f"{in_markdown(selection)}."]
    return "\n".join([*lines, "", f"{in_markdown(gain)}.", "", *_use(report.main, backbone, model)]) + "\n"


def _use(main: str, backbone: Mapping[str, Any], model: Model) -> list[str]:
    """How to use the model without this toolkit."""
    adapter, main = getattr(model, "adapter", None), in_code(main)
    space = getattr(adapter, "space", "")
    if isinstance(adapter, Prompt):
        told = f"`merged.safetensors` holds the context vectors that {main} made in the first cell. They go before a class name:"
        return _code(
            told, ["import torch", *_loading(backbone), "from safetensors.torch import load_file", USE.rstrip()]
        )
    if isinstance(adapter, LinearHead):
        told = f"`merged.safetensors` holds the linear head that {main} made in the first cell; its classes: {_names(adapter)}."
        features = (
            "model.encode_image(images, normalize=True)"
            if adapter.normalise
            else "what the timm model's classifier reads"
        )
        lines = [*_loading(backbone), "from safetensors.torch import load_file"]
        return _code(told, [*lines, HEAD.format(file="merged.safetensors", features=features).rstrip()])
    if isinstance(adapter, Tower) and model.backbone.text is None:  # type: ignore[union-attr]
        told = (
            f"`merged/` holds the whole model that {main} made in the first cell; its classes: {_names(adapter.head)}."
        )
        arch = model.backbone.config["architecture"]  # type: ignore[union-attr]
        made = f'model = timm.create_model({json.dumps(arch)}, num_classes={len(adapter.head.weight)}, checkpoint_path="merged/model.safetensors")'
        return _code(told, ["import timm", made])
    if isinstance(adapter, Tower):
        told = f"`merged/` holds the whole model that {main} made in the first cell, as open_clip's own folder."
        lines = ["import open_clip", 'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:merged")']
        if adapter.head is None:
            return _code(told, [*lines, TEXT_TOWER.rstrip()])
        told += f" Its classifier is a linear head; its classes: {_names(adapter.head)}."
        head = HEAD.format(file="linear_head.safetensors", features="model.encode_image(images, normalize=True)")
        return _code(told, [*lines, "from safetensors.torch import load_file", head.rstrip()])
    return [
        f"{main} makes a model of several{f' ({space})' if space else ''}, so there is no single file of it; `mergekit-vl predict` and "
        "`mergekit-vl eval` use it from this folder."
    ]


def _names(head: LinearHead | None) -> str:
    names = head.names if head is not None else ()
    return in_markdown(", ".join(names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _code(told: str, lines: list[str]) -> list[str]:
    return [told, "", "```python", *lines, "```"]


def _loading(backbone: Mapping[str, Any]) -> list[str]:
    if backbone["name"] == "micro":
        return ["from mergekit_vl.backbones import micro", "model, tokenizer = micro.load(), micro.tokenizer()"]
    if backbone["name"] == "vision":
        return ["import timm", f"model = timm.create_model({backbone.get('arch')!r}, num_classes=0).eval()"]
    import open_clip

    arch, pretrained = backbone.get("arch"), backbone.get("pretrained")
    tag = open_clip.get_pretrained_cfg(arch, pretrained or "")
    options = ", force_quick_gelu=True" if backbone.get("quick_gelu", tag.get("quick_gelu")) else ""
    return [
        "import open_clip",
        f"model, _, preprocess = open_clip.create_model_and_transforms({arch!r}, pretrained={pretrained!r}{options})",
        f"model, tokenizer = model.eval(), open_clip.get_tokenizer({arch!r})",
    ]
