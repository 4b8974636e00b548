"""What a run will cost, as far as it can be told before it starts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mergekit_vl import options
from mergekit_vl.tuners.base import moves_tower

if TYPE_CHECKING:
    from mergekit_vl.experiments.experiment import Experiment

CELL_SECONDS, EPOCH_SECONDS = 5, 0.25
"""Of a cell, and of an epoch in it: tasks of the microworld at 16 shots with prompts of the micro CLIP, on 2 cores."""


def most_epochs(trained: Iterable[options.Options]) -> int:
    """Of tuners, checkpoints and strategies: the largest option `epochs`; 0 for one that has none or leaves it to its settings."""
    return max((options.values(each).get("epochs") or 0 for each in trained), default=0)


def described(made: Experiment) -> list[str]:
    """The plan of a run in words: what takes part, how many cells, and how long they will take."""
    plan = made.recipe
    return [
        f"recipe    {plan.name} ({plan.hash})",
        f"backbone  {made.backbone}",
        *(f"dataset   {dataset}" for dataset in made.datasets),
        f"protocol  {made.protocol}",
        f"seeds     {', '.join(map(str, plan.seeds))}",
        f"rows      {', '.join(made.rows)}",
        f"cells     {made.cells}; {work(made)}",
        f"time      {time(made)}",
    ]


def work(made: Experiment) -> str:
    """How often images are encoded."""
    if any(moves_tower(tuner) for tuner in made.tuners):
        return "whole towers: every row that moves the tower encodes the test images of its own"
    epochs = _epochs(made)
    return f"a cell encodes each test image once and each shot at most {epochs} times, then trains on stored features"


def time(made: Experiment) -> str:
    if made.recipe.backbone.name != "micro" or made.recipe.protocol.name != "base_to_novel":
        return "depends on backbone, images and tuners: the progress lines say how long"
    seconds = max(1, round(made.cells * (CELL_SECONDS + _epochs(made) * EPOCH_SECONDS)))
    return f"about {seconds} s on 2 cores for microworld tasks at 16 shots; less where features are stored already"


def _epochs(made: Experiment) -> int:
    return most_epochs([*made.tuners, *(strategy for _, strategy in made.strategies)])
