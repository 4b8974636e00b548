"""Base-to-novel generalisation (Zhou et al. 2022, CoCoOp, section 4.1): tune on half of the classes, test on both halves."""

from __future__ import annotations

import random
from dataclasses import dataclass

from mergekit_vl.datasets.base import Dataset, Split, few_shot
from mergekit_vl.errors import UserError
from mergekit_vl.models.inputs import TaskData
from mergekit_vl.models.model import Classes
from mergekit_vl.options import option
from mergekit_vl.protocols.base import Metric, Task

METRIC = Metric("HM", {"base": ("base",), "novel": ("novel",)}, harmonic=True)


def draw_shots(dataset: Dataset, shots: int | None, seed: int) -> tuple[Split, Split]:
    """Train and validation as CoOp draws them: one generator for both, min(shots, 4) images a class for validation; all without shots."""
    if shots is None:
        return dataset.train, dataset.val
    draw = random.Random(seed)
    name = dataset.name
    train = few_shot(dataset.train, shots, draw, name=name, classes=dataset.classes, at_most=dataset.few_give_all)
    return train, few_shot(dataset.val, min(shots, 4), draw, name=f"{name} (validation)", at_most=True)


@dataclass(frozen=True)
class BaseToNovel:
    """Base is the first ceil(n/2) of the sorted labels and novel the rest, each relabelled from 0 and tested against its own names.

    On the microworld the classes are shuffled by the seed before they are halved, and reports say so. Shots are drawn over all
    classes and then cut to base, as the field does; validation has min(shots, 4) images a class. The headline is the harmonic
    mean (HM) of both accuracies.
    """

    shots: int = option(16, "images per class to tune on")

    def task(self, dataset: Dataset, seed: int) -> Task:
        n = len(dataset.classes)
        if n < 2:
            raise UserError(f"{dataset.name} has one class", hint="base-to-novel needs at least two")
        order = list(range(n))
        if dataset.shuffled_halves:
            random.Random(f"halves:{seed}").shuffle(order)
        half = (n + 1) // 2
        base, novel = tuple(sorted(order[:half])), tuple(sorted(order[half:]))
        classes = Classes(dataset.classes, dataset.templates)
        train, val = draw_shots(dataset, self.shots, seed)
        halves = {"base": base, "novel": novel}
        tests = tuple((name, classes.subset(half), dataset.test.of_classes(half)) for name, half in halves.items())
        data = TaskData(classes.subset(base), train.of_classes(base), val.of_classes(base))
        parts = {name: classes.subset(half).names for name, half in halves.items()}
        note = "halves redrawn per seed" if dataset.shuffled_halves else "halves of the sorted labels"
        return Task((data,), tests, METRIC, parts, note)
