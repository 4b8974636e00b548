"""The model card of a run: the table, the gain, and the few lines that use the merged prompt in plain open_clip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_vl import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

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


def card(report: dict[str, Any], backbone: Mapping[str, Any], gain: str, *, prompt: bool) -> str:
    """Markdown; `backbone` is the recipe's mapping, `prompt` says whether merged.safetensors holds a shared context."""
    columns = report["metric"]["columns"]
    headline = [report["metric"]["headline"]] * (len(columns) > 1)
    lines = [
        f"# {report['recipe']}: {report['main']}",
        "",
        f"Made by mergekit-vl {__version__}; repeat it with `mergekit-vl run recipe.yaml`.",
        "",
        "| row | " + " | ".join([*columns, *headline]) + " | heads a sample |",
        "|---" * (2 + len(columns) + len(headline)) + "|",
    ]
    for r in report["summary"]:
        cells = [f"{c['acc1']:.1f}" for c in r["columns"].values()] + [f"{r['score']:.1f}"] * len(headline)
        lines.append(f"| {r['row']} | {' | '.join(cells)} | {r['forwards']} |")
    lines += ["", f"{gain}.", ""]
    if prompt:
        lines += [
            f"`merged.safetensors` holds the context vectors that `{report['main']}` made in the first cell. "
            "They go before a class name:",
            "",
            "```python",
            "import torch",
            *_loading(backbone),
            "from safetensors.torch import load_file",
            USE.rstrip(),
            "```",
        ]
    else:
        lines += [f"`{report['main']}` makes a model that is not one prompt, so there is no merged.safetensors."]
    return "\n".join(lines) + "\n"


def _loading(backbone: Mapping[str, Any]) -> list[str]:
    if backbone["name"] == "micro":
        return ["from mergekit_vl.backbones import micro", "model, tokenizer = micro.load(), micro.tokenizer()"]
    import open_clip

    arch, pretrained = backbone.get("arch"), backbone.get("pretrained")
    tag = open_clip.get_pretrained_cfg(arch, pretrained or "")
    options = ", force_quick_gelu=True" if backbone.get("quick_gelu", tag.get("quick_gelu")) else ""
    return [
        "import open_clip",
        f"model, _, preprocess = open_clip.create_model_and_transforms({arch!r}, pretrained={pretrained!r}{options})",
        f"model, tokenizer = model.eval(), open_clip.get_tokenizer({arch!r})",
    ]
