"""The recorded means of the embedded world's suite, beside a run on one of its tasks with the same settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_vl.experiments.experiment import Experiment, build
from mergekit_vl.recipes.loading import load_recipe

if TYPE_CHECKING:
    from mergekit_vl.registry.plugins import Registry

RECIPE = "mergetune_suite"


def beside(made: Experiment, registry: Registry) -> str | None:
    """One line with the recorded means of the rows that `made` has in common with the suite; None where the two cannot be compared."""
    file = Path(__file__).parent.parent / "assets" / "suite.json"
    if len(made.datasets) != 1 or made.recipe.datasets[0].name != "microworld" or not file.exists():
        return None
    suite = build(load_recipe(RECIPE), registry)
    if _settings(made) != _settings(suite):
        return None
    recorded = json.loads(file.read_text())
    scores = {row["row"]: row["score"] for row in recorded["summary"]}
    theirs, ours = _rows(suite), _rows(made)
    common = [made.base_label, *made.tuned_labels]
    common += [label for label, row in theirs.items() if row in ours.values()]
    means = ", ".join(f"{label} {scores[label]:.1f}" for label in common)
    return (
        f"recorded mean HM of the whole suite with these settings ({recorded['tasks']} tasks, {recorded['seeds']} seeds; "
        f"run {RECIPE} repeats it): {means}"
    )


def _settings(made: Experiment) -> list[Any]:
    """What two runs must share, so that a task of the one can stand beside the mean of the other."""
    return [made.backbone, made.protocol, made.tuners, made.tuned_labels]


def _rows(made: Experiment) -> dict[str, Any]:
    """Controls and strategies by label, with all that makes them what they are."""
    specs = zip(made.strategies, made.recipe.strategies)
    strategies = {label: (strategy, spec.input, spec.batch_norm) for (label, strategy), spec in specs}
    return {label: (control, None, "images") for label, control in made.controls} | strategies
