"""Finished runs and plain backbones as models to be used: what `eval` and `predict` start from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_vl import options
from mergekit_vl.adapters import before_tuning
from mergekit_vl.backbones.huggingface_names import config_of_clip_model
from mergekit_vl.checkpoints.configs import read_config
from mergekit_vl.checkpoints.foreign import hub_hint
from mergekit_vl.checkpoints.reader import taking
from mergekit_vl.errors import UserError, unknown
from mergekit_vl.models.model import Classes, Single
from mergekit_vl.recipes.loading import load_recipe
from mergekit_vl.recipes.recipe import Recipe
from mergekit_vl.reports.render import notebook_table
from mergekit_vl.storage import model_files
from mergekit_vl.storage.tuned import load_tuned
from mergekit_vl.system.atomic_files import slug
from mergekit_vl.system.regular_files import read_json, user_path

if TYPE_CHECKING:
    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.backbones.base import BackboneOptions
    from mergekit_vl.models.model import Model
    from mergekit_vl.registry.plugins import Registry

FORMS = "a run folder, micro, photo, clip:ARCH:PRETRAINED, vision:ARCH, or a folder that open_clip wrote"


@dataclass(frozen=True, repr=False)
class LoadedModel:
    """A model with the classes that it was tested on, where they are known."""

    model: Model
    label: str
    classes: Classes | None = None
    recipe: Recipe | None = None

    def table(self) -> list[tuple[str, str]]:
        """(what, which) in a few lines."""
        encoders = ", ".join(dict.fromkeys(encoder.backbone.spec for encoder in self.model.encoders))
        told = [("model", self.label), ("backbone", encoders), ("parameters", f"{self.model.parameters:,}")]
        if self.recipe is not None:
            told.insert(1, ("run", self.recipe.name))
        return told + ([("classes", str(len(self.classes.names)))] if self.classes is not None else [])

    def __repr__(self) -> str:
        return f"<{', '.join(f'{what} {which}' for what, which in self.table())}>"

    def _repr_html_(self) -> str:
        return notebook_table(self.table())


def open_model(
    given: str,
    registry: Registry,
    *,
    row: str | None,
    device: str,
    checkpoint: Path | None = None,
    allow_env: Sequence[str] = (),
    weights: str | None = None,
) -> LoadedModel:
    """A row of a finished run, or a backbone as it is, or that backbone with a tuned checkpoint on it.

    `weights` says which weights are taken of a file that holds several: plain, ema, or the key of one.
    """
    with taking(weights):
        return _opened(given, registry, row, device, checkpoint, allow_env)


def _opened(
    given: str, registry: Registry, row: str | None, device: str, checkpoint: Path | None, allow_env: Sequence[str]
) -> LoadedModel:
    folder = user_path(given)
    if (folder / "recipe.yaml").is_file() and (folder / "state").is_dir():
        return _of_run(folder, registry, row, device, allow_env)
    if row is not None:
        raise UserError("--row is for runs", where=given, hint="give a run folder")
    backbone = _built(registry, *backbone_options(given, registry), device)
    for note in backbone.notes:
        warnings.warn(note, stacklevel=2)
    if checkpoint is not None:
        return LoadedModel(Single(backbone, load_tuned(checkpoint, backbone, registry)), checkpoint.name)
    label = backbone.spec if backbone.text is None else f"{backbone.spec}, zero-shot"
    own = Classes(backbone.classes) if backbone.classes else None
    return LoadedModel(before_tuning.of_backbone(backbone), label, own)


def _of_run(folder: Path, registry: Registry, row: str | None, device: str, allow_env: Sequence[str]) -> LoadedModel:
    recipe = load_recipe(str(folder / "recipe.yaml"), allow_env=allow_env)
    report = folder / "report.json"
    if not report.is_file():
        raise UserError(
            "this run is not finished", where=str(folder), hint="finish it with the command that started it"
        )
    main, rows, dataset, seed = read_json(report, _first_cell)
    label = row or main
    if label not in rows:
        raise unknown("row", label, rows, where=str(folder))
    from mergekit_vl.system.atomic_files import cell_name

    state = folder / "state" / cell_name(dataset, seed)
    backbone = _built(registry, recipe.backbone.name, recipe.backbone.options, device)
    model = model_files.load(state, slug(label), backbone, registry.adapter)
    if model is None:
        raise UserError(
            f"the run keeps no file of its row {label!r}",
            where=str(state),
            hint="towers of closed forms are kept for the main strategy alone: put it first in the recipe and run again",
        )
    return LoadedModel(model, label, read_json(state / "shots.json", _classes), recipe)


def _first_cell(report: Any) -> tuple[str, list[str], str, int]:
    """The main row, the rows, the data set and the seed."""
    cell = report["cells"][0]
    rows, seed = [row["row"] for row in cell["rows"]], cell["seed"]
    if not all(isinstance(text, str) for text in (report["main"], cell["dataset"], *rows)) or not isinstance(seed, int):
        raise ValueError("labels are text, a seed is a number")
    return report["main"], rows, cell["dataset"], seed


def _classes(shots: Any) -> Classes:
    names, templates = tuple(shots["classes"]), tuple(shots["templates"])
    if not names or not templates or not all(isinstance(text, str) for text in (*names, *templates)):
        raise ValueError("classes and templates are texts")
    return Classes(names, templates)


def backbone_options(given: str, registry: Registry) -> tuple[str, dict[str, object]]:
    """The backbone that a model's name or folder stands for: its registered name and options. Raises UserError for what is no model."""
    folder = user_path(given)
    if (folder / "open_clip_config.json").is_file() or config_of_clip_model(folder) is not None:
        return "clip", {"arch": f"local-dir:{given}"}
    config = read_config(folder, "config.json")
    if isinstance(config.get("architecture"), str):
        return "vision", {"arch": config["architecture"], "pretrained": given}
    if folder.is_dir():
        named = ", ".join(map(str, config.get("architectures") or [])) or "nothing tells its architecture"
        hint = "name it: clip:ARCH:FOLDER for open_clip's, vision:ARCH:FOLDER for timm's"
        raise UserError(f"a folder that is no model here: {named}", where=given, hint=hint)
    name, _, rest = given.partition(":")
    if name not in registry.entries["backbones"]:
        hint = f"a model of the hub is clip:hf-hub:{given}" if hub_hint(given) else f"give {FORMS}"
        raise UserError(f"{given!r} is no model", where="command line", hint=hint)
    if not rest:
        return name, {}
    if user_path(rest).is_dir() and (user_path(rest) / "open_clip_config.json").is_file():
        return name, {"arch": f"local-dir:{rest}"}
    prefix = next((p for p in ("local-dir:", "hf-hub:") if rest.startswith(p)), "")
    arch, _, pretrained = rest.removeprefix(prefix).partition(":")
    chosen: dict[str, object] = {"arch": prefix + arch}
    return name, chosen | ({"pretrained": pretrained} if pretrained else {})


def _built(registry: Registry, name: str, given: Mapping[str, object], device: str) -> Backbone:
    cls: type[BackboneOptions] = registry.find("backbones", name).resolve()
    return options.build(cls, given, where=f"backbone {name}").build(device)
