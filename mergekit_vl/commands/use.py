"""`eval` and `predict`: a finished model on a dataset, and on single images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_vl import options
from mergekit_vl.errors import UserError
from mergekit_vl.recipes.overrides import set_option
from mergekit_vl.system.regular_files import read_text, user_path

if TYPE_CHECKING:
    from mergekit_vl.experiments.open_run import LoadedModel
    from mergekit_vl.models.model import Classes
    from mergekit_vl.registry.plugins import Registry
    from mergekit_vl.reporter import Reporter


def evaluate_model(
    given: str,
    words: Sequence[str],
    registry: Registry,
    *,
    dataset: str | None,
    split: str | None,
    row: str | None,
    checkpoint: Path | None,
    device: str,
    reporter: Reporter,
    allow_env: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores of a model on a split of a dataset, as CLIP_benchmark writes them, with ours beside."""
    from mergekit_vl.experiments.open_run import open_model
    from mergekit_vl.experiments.use import evaluate_on, load_for
    from mergekit_vl.models.features import FeatureStore

    reporter.progress(0, 0, "loading the model")
    used = open_model(given, registry, row=row, device=device, checkpoint=checkpoint, allow_env=allow_env)
    data, part = load_for(_dataset(used, dataset, words, registry), split, reporter, of_run=dataset is None)
    return evaluate_on(used.model, used.label, data, part, FeatureStore(reporter=reporter)).to_json()


def _dataset(used: LoadedModel, name: str | None, words: Sequence[str], registry: Registry) -> Any:
    """The named dataset with `key=value` options, or the run's own first one with those changed."""
    given: dict[str, object] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not an option", where="command line", hint="write key=value: path=~/pets")
        set_option(given, word, key, value)
    if name is None:
        if used.recipe is None:
            raise UserError("no dataset", where="command line", hint="name one: --dataset folder path=~/pets")
        spec = used.recipe.datasets[0]
        name, given = spec.name, {**spec.options, **given}
    return options.build(registry.find("datasets", name).resolve(), given, where=f"dataset {name}")


def predict_images(
    given: str,
    images: Sequence[str],
    registry: Registry,
    *,
    classes: str | None,
    top: int,
    row: str | None,
    checkpoint: Path | None,
    device: str,
    reporter: Reporter,
    max_megapixels: float | None = None,
    allow_env: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The `top` classes of each image with their probabilities."""
    from mergekit_vl.datasets.image_files import MOST_MEGAPIXELS, check_megapixels
    from mergekit_vl.experiments.open_run import open_model
    from mergekit_vl.experiments.use import best, from_files, image_files, probabilities

    megapixels = MOST_MEGAPIXELS if max_megapixels is None else max_megapixels
    check_megapixels(megapixels)
    files = image_files(images)
    reporter.progress(0, 0, "loading the model")
    used = open_model(given, registry, row=row, device=device, checkpoint=checkpoint, allow_env=allow_env)
    known = _classes(used, classes)
    found = probabilities(used.model, known, from_files(files, megapixels), len(files), reporter)
    return [
        {"image": str(file), "classes": [{"class": name, "p": p} for name, p in likeliest]}
        for file, likeliest in zip(files, best(found, known.names, top))
    ]


def _classes(used: LoadedModel, given: str | None) -> Classes:
    from mergekit_vl.models.model import Classes

    if given is None:
        if used.classes is None:
            raise UserError(
                "no class names", where="command line", hint="name them: --classes dog,cat or a file of lines"
            )
        return used.classes
    names = read_text(user_path(given)).splitlines() if os.path.exists(os.path.expanduser(given)) else given.split(",")
    names = [name.strip() for name in names if name.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"class names {given!r}", where="--classes", hint="at least two, each once")
    return Classes(tuple(names), used.classes.templates if used.classes else Classes.templates)
