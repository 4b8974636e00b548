"""The recipes of the commands `repair` and `soup`, made of what a person has: models and folders of images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_vl.errors import UserError
from mergekit_vl.experiments.open_run import backbone_options
from mergekit_vl.recipes.overrides import held, overridden
from mergekit_vl.recipes.recipe import DEFAULTS, Recipe, parse
from mergekit_vl.system.atomic_files import is_a_path
from mergekit_vl.system.regular_files import user_path

if TYPE_CHECKING:
    from mergekit_vl.registry.plugins import Registry
    from mergekit_vl.reporter import Reporter

BUDGET = re.compile(r"(\d+(?:\.\d+)?) *(?:pts?|points?|%)?")
CAPTIONS = (".csv", ".tsv", ".json", ".jsonl")


def repair(
    base: str,
    tuned: str,
    *,
    new: str,
    keep: Sequence[str],
    budget: str | float | None = None,
    train: bool = False,
    overrides: Sequence[str] = (),
    registry: Registry,
) -> Recipe:
    """Of a base and a model tuned from it; `new` is a folder of images, `keep` are folders, or classes of `new`.

    Raises UserError for what is not there, and for what cannot be kept.
    """
    folders, classes = _kept(keep)
    strategy: dict[str, object] = {"name": "repair", "batch_norm": "mean"}
    if budget is not None:
        strategy["budget"] = points(budget)
    if train:
        strategy["train"] = True
    plain = {
        "backbone": _backbone(base, registry),
        "dataset": _folders([new, *folders]),
        "protocol": {"name": "new_and_kept"} | ({"keep": classes} if classes else {}),
        "tuned": [_tuned(tuned, "tuned")],
        "strategy": [strategy],
        "controls": False,
    }
    return _recipe("repair", plain, overrides)


def soup(
    models: Sequence[str], *, val: str, base: str | None = None, overrides: Sequence[str] = (), registry: Registry
) -> Recipe:
    """Of models tuned from one base, greedy first; `val` is a folder of images, `base` is by default the first model.

    Raises UserError for fewer than two models, and for what is not there.
    """
    if len(models) < 2:
        raise UserError(f"{len(models)} model", where="soup", hint="name at least two")
    if len({user_path(model).resolve() for model in models}) < len(models):
        raise UserError("the same model is given twice", where="soup", hint="leave one out")
    stems = [user_path(model).stem for model in models]
    labels = unlike([user_path(model) for model in models]) if len(set(stems)) < len(stems) else stems
    plain = {
        "backbone": _backbone(base or models[0], registry),
        "dataset": _folders([val]),
        "protocol": {"name": "few_shot", "shots": None},
        "tuned": [_tuned(model, label) for model, label in zip(models, labels)],
        "strategy": [{"name": "greedy_soup"}, {"name": "uniform_soup"}],
        "controls": False,
    }
    return _recipe("soup", plain, overrides)


def without_images(
    base: str, tuned: str, out: Path, *, device: str, force: bool, registry: Registry, reporter: Reporter
) -> Path:
    """MonoSoup of a base and a model tuned from it, which needs no images, in the folder `out`.

    The base is a model by name or an open_clip folder, or files of weights, which are merged as `merge` does.
    """
    from mergekit_vl.checkpoints.writer import claimed
    from mergekit_vl.strategies.monosoup import MonoSoup

    place = user_path(base)
    if place.exists() and not (place / "open_clip_config.json").is_file():
        from mergekit_vl.checkpoints.reader import distinct, label_of
        from mergekit_vl.merge_files import streaming
        from mergekit_vl.merge_files.plan import MergePlan
        from mergekit_vl.merging.method import as_closed_form

        labels = distinct([label_of(base), label_of(tuned)])
        plan = MergePlan("monosoup", as_closed_form(MonoSoup()), (tuned,), base, (labels[1],), labels[0])
        streaming.merge(plan, out, force=force, reporter=reporter)
        return out
    from mergekit_vl import options
    from mergekit_vl.adapters import before_tuning
    from mergekit_vl.models.features import FeatureStore
    from mergekit_vl.models.inputs import MergeInputs
    from mergekit_vl.models.model import Single
    from mergekit_vl.storage.export import export, is_whole
    from mergekit_vl.storage.tuned import load_tuned
    from mergekit_vl.strategies.in_memory import merge_adapters

    path = _there(tuned)
    name, given = backbone_options(base, registry)
    backbone = options.build(registry.find("backbones", name).resolve(), given, where=f"backbone {name}").build(device)
    model = Single(backbone, load_tuned(path, backbone, registry))
    inputs = MergeInputs(before_tuning.of_backbone(backbone), (model,), (), FeatureStore(None), device=device)
    made = merge_adapters(MonoSoup(), replace(inputs, reporter=reporter))
    if not is_whole(made):
        raise UserError(
            f"{model.adapter.about.one} is no whole model", where=tuned, hint="give images: --new FOLDER --keep FOLDER"
        )
    with claimed(out, force=force):
        export(made, out)
    return out


def points(given: str | float) -> float:
    """Points of accuracy from 2, "2pt", "2 points" or "2%"; raises UserError for anything else."""
    found = BUDGET.fullmatch(str(given).strip().lower())
    if found is None or float(found[1]) > 100:
        raise UserError(f"--budget {given}", where="command line", hint="points of accuracy, for instance 2pt")
    return float(found[1])


def unlike(paths: Sequence[Path]) -> list[str]:
    """Names that differ: as many of the last parts of each path as tell them apart."""
    parts, names = [path.resolve().parts for path in paths], list[str]()
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-n:]).lstrip("/") for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _kept(keep: Sequence[str]) -> tuple[list[str], list[str]]:
    """Folders, and names of classes."""
    folders, classes = [], []
    for given in keep:
        path = user_path(given)
        if path.is_dir():
            folders.append(given)
        elif path.suffix.lower() in CAPTIONS:
            raise UserError(
                "images with captions cannot be kept yet",
                where=f"--keep {given}",
                hint="give a folder with a folder of images for each class, or names of classes of --new",
            )
        elif is_a_path(given) or given.startswith(".") or path.exists():
            raise UserError("no such folder", where=f"--keep {given}", hint="give a folder of class folders")
        else:
            classes += [name.strip() for name in given.split(",") if name.strip()]
    return folders, classes


def _folders(paths: Sequence[str]) -> list[dict[str, object]]:
    for given in paths:
        if not user_path(given).is_dir():
            raise UserError("no such folder", where=given, hint="give a folder with a folder of images for each class")
    places = [user_path(given) for given in paths]
    if len({place.resolve() for place in places}) < len(places):
        raise UserError("the same folder is given twice", where=paths[-1], hint="keep another folder, or classes of it")
    return [{"name": "folder", "path": path, "label": label} for path, label in zip(paths, unlike(places))]


def _backbone(given: str, registry: Registry) -> dict[str, object]:
    name, chosen = backbone_options(given, registry)
    return {"name": name, **chosen}


def _tuned(given: str, label: str) -> dict[str, object]:
    return {"checkpoint": str(_there(given)), "label": label}


def _there(given: str) -> Path:
    path = user_path(given)
    if not path.exists():
        raise UserError("no such model", where=given, hint="give the weights after tuning: a file or a folder")
    if (path / "recipe.yaml").is_file() and (path / "merged").is_dir():
        return path / "merged"  # a run of ours: the model that it made
    return path


def _recipe(name: str, plain: Mapping[str, object], overrides: Sequence[str]) -> Recipe:
    given = {**DEFAULTS, **plain}
    return parse(overridden(held(given, where=name), overrides) if overrides else given, name=name, where=name)
