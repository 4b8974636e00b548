"""The model card of a run: the table, the gain, and the few lines that use the merged model in plain open_clip or timm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_vl import __version__
from mergekit_vl.models.model import Single
from mergekit_vl.printable import in_code
from mergekit_vl.reports import render
from mergekit_vl.reports.comparison import comparison

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mergekit_vl.models.model import Model
    from mergekit_vl.reports.results import Report


def card(report: Report, backbone: Mapping[str, Any], gain: str, model: Model) -> str:
    """Markdown; `backbone` is the recipe's mapping, `model` the main one of the first cell."""
    return render.card(
        "card.md",
        version=__version__,
        report=report,
        table=render.markdown(comparison(report)),
        selection=report.selection[0].upper() + report.selection[1:],
        gain=gain,
        use=render.markup("\n".join(_use(report.main, backbone, model))),
    )


def _use(main: str, backbone: Mapping[str, Any], model: Model) -> list[str]:
    """How to use the model without this toolkit."""
    single = model if isinstance(model, Single) else None
    usage, main = single.adapter.usage(single.backbone) if single is not None else None, in_code(main)
    if usage is None:
        space = f" ({single.adapter.space})" if single else ""
        return [
            f"{main} makes a model of several{space}, so there is no single file of it; `mergekit-vl predict` and "
            "`mergekit-vl eval` use it from this folder."
        ]
    loading = _loading(backbone) if usage.on_backbone else []
    code = ["```python", *usage.imports, *loading, *usage.code, "```"]
    return [usage.told.replace("{main}", main), "", *code]


def _loading(backbone: Mapping[str, Any]) -> list[str]:
    if (name := backbone["name"]) in ("micro", "photo"):
        return [f"from mergekit_vl.backbones import {name}", f"model, tokenizer = {name}.load(), {name}.tokenizer()"]
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
