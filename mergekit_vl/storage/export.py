"""A whole tuned or merged model as a folder that plain open_clip or timm loads, without this toolkit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_vl.adapters import stored
from mergekit_vl.backbones.vision import CROP_MODES
from mergekit_vl.errors import UserError
from mergekit_vl.models.model import Single
from mergekit_vl.system.regular_files import read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.adapter import Whole
    from mergekit_vl.models.model import Model

OPEN_CLIP, TIMM = "open_clip_model.safetensors", "model.safetensors"


def is_whole(model: Model) -> bool:
    """Whether the model is weights of its backbone (and not a prompt, a head alone, or several models)."""
    return isinstance(model, Single) and model.adapter.whole(model.backbone) is not None


def export(model: Model, folder: Path) -> None:
    """Write the folder whole, or not at all.

    open_clip: weights and open_clip_config.json, for `create_model_and_transforms("local-dir:FOLDER")`; a tokenizer of Hugging Face
    beside them. timm: model.safetensors with the classifier under its own name, for `create_model(arch, num_classes=K,
    checkpoint_path=FILE)`, and config.json with the class names. A linear head on a CLIP is no part of open_clip's model: it goes
    into linear_head.safetensors beside the folder.
    """
    from safetensors.torch import save_file

    assert isinstance(model, Single)
    whole = model.adapter.whole(model.backbone)
    assert whole is not None
    backbone = whole.backbone
    tensors = backbone.model.state_dict()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if "model_cfg" in backbone.config:
            save_file(stored.separate(tensors), partial / OPEN_CLIP, metadata={"format": "pt"})
            _write(partial / "open_clip_config.json", _open_clip_config(backbone))
            tokenizer = getattr(backbone.require_text().tokenizer, "tokenizer", None)
            save_pretrained: Callable[[Path], object] | None = getattr(tokenizer, "save_pretrained", None)
            if save_pretrained is not None:
                save_pretrained(partial)
        else:
            tensors = {**tensors, **_classifier(whole)}
            save_file(stored.separate(tensors), partial / TIMM, metadata={"format": "pt"})
            _write(partial / "config.json", _timm_config(whole))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"cannot be written: {error.strerror}", where=str(folder), hint="make room, or choose another --out"
        ) from None
    if whole.head is not None and backbone.text is not None:
        whole.head.save(folder.with_name("linear_head.safetensors"), backbone=backbone.spec)


def loading(folder: Path, run: Path) -> str:
    """One line of Python that loads what a run exported into `folder`, by the library that the folder is for; else what the run keeps."""
    if (folder / "open_clip_config.json").is_file():
        place = f"local-dir:{folder}"
        return f"import open_clip; model, _, preprocess = open_clip.create_model_and_transforms({place!r})"
    if (folder / "config.json").is_file():
        told = read_json(folder / "config.json", dict)
        given = f"{told['architecture']!r}, num_classes={told['num_classes']}, checkpoint_path={str(folder / TIMM)!r}"
        return f"import timm; model = timm.create_model({given})"
    return f"import mergekit_vl; model = mergekit_vl.load_model({str(run)!r})"


def _write(file: Path, value: Mapping[str, object]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _open_clip_config(backbone: Backbone) -> dict[str, object]:
    keys = ("mean", "std", "interpolation", "resize_mode", "fill_color")
    preprocess = {key: value for key, value in backbone.preprocess.items() if key in keys}
    return {"model_cfg": backbone.config["model_cfg"], "preprocess_cfg": preprocess}


def _classifier(whole: Whole) -> dict[str, Tensor]:
    names, head = whole.backbone.config["classifier"], whole.head
    if head is None:
        return {}
    if head.normalise or len(names) != 1:
        raise UserError(
            f"the head of {whole.backbone.spec} cannot be written as timm's own classifier",
            hint="use the run's state folder with mergekit-vl, or an architecture with one classifier on raw features",
        )
    return {f"{names[0]}.weight": head.weight, f"{names[0]}.bias": head.bias}


def _timm_config(whole: Whole) -> dict[str, object]:
    """As timm's own `save_for_hf` writes it, so that `create_model("local-dir:FOLDER")` reads it too."""
    backbone, head = whole.backbone, whole.head
    settings = backbone.preprocess
    size = settings["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    classes = {} if head is None else {"num_classes": len(head.weight), "label_names": list(head.names)}
    pretrained = {
        "input_size": [3, height, width],
        "mean": settings["mean"],
        "std": settings["std"],
        "interpolation": settings["interpolation"],
        "crop_pct": settings["crop_pct"],
        "crop_mode": CROP_MODES[settings["resize_mode"]],
        "classifier": backbone.config["classifier"][0],
        **({"num_classes": classes["num_classes"]} if classes else {}),
    }
    return {"architecture": backbone.config["architecture"], "pretrained_cfg": pretrained, **classes}
