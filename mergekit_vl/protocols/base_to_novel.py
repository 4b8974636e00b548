"""Base-to-novel generalisation (Zhou et al. 2022, CoCoOp, section 4.1): tune on half of the classes, test on both halves."""

from __future__ import annotations

import random
from dataclasses import dataclass

from mergekit_vl.data import Dataset, Split, few_shot
from mergekit_vl.errors import UserError
from mergekit_vl.model import Classes
from mergekit_vl.options import option
from mergekit_vl.strategy import TaskData


@dataclass(frozen=True)
class Task:
    """What is tuned on and what is tested: `train` never overlaps a test, each test is (name, classes, split)."""

    train: TaskData
    tests: tuple[tuple[str, Classes, Split], ...]
    base: tuple[int, ...]
    novel: tuple[int, ...]


@dataclass(frozen=True)
class BaseToNovel:
    """Base is the first ceil(n/2) of the sorted labels and novel the rest, each relabelled from 0 and tested against its own names.

    On the microworld the classes are shuffled by the seed before they are halved, and reports say so. Shots are drawn over all
    classes and then cut to base, as the field does; validation has min(shots, 4) images a class.
    """

    shots: int = option(16, "images per class to tune on")

    def task(self, dataset: Dataset, seed: int) -> Task:
        n = len(dataset.classes)
        if n < 2:
            raise UserError(f"{dataset.name} has one class", mend="base-to-novel needs at least two")
        order = list(range(n))
        if dataset.shuffled_halves:
            random.Random(f"halves:{seed}").shuffle(order)
        half = (n + 1) // 2
        base, novel = tuple(sorted(order[:half])), tuple(sorted(order[half:]))
        classes = Classes(dataset.classes, dataset.templates)
        draw = random.Random(seed)  # one for both, as in CoOp: val is drawn from where train left off
        name = dataset.name
        train = few_shot(
            dataset.train, self.shots, draw, name=name, classes=dataset.classes, at_most=dataset.few_give_all
        )
        val = few_shot(dataset.val, min(self.shots, 4), draw, name=f"{name} (validation)", at_most=True)
        tests = tuple(
            (name, classes.subset(half), dataset.test.of_classes(half))
            for name, half in (("base", base), ("novel", novel))
        )
        return Task(TaskData(classes.subset(base), train.of_classes(base), val.of_classes(base)), tests, base, novel)
