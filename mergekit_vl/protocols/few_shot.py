"""Few-shot classification (CoOp's first protocol, Zhou et al. 2022, section 4.1): k images of each class, tested on all classes."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_vl.datasets.base import Dataset
from mergekit_vl.models.inputs import TaskData
from mergekit_vl.models.model import Classes
from mergekit_vl.options import option
from mergekit_vl.protocols.base import Metric, Task
from mergekit_vl.protocols.base_to_novel import draw_shots

METRIC = Metric("accuracy", {"test": ("test",)})


@dataclass(frozen=True)
class FewShot:
    """All classes are tuned on and tested. Shots and validation are drawn as the field draws them (16, 8, 4, 2 or 1 a class)."""

    shots: int | None = option(16, "images per class to tune on; null: the whole train split")

    def task(self, dataset: Dataset, seed: int) -> Task:
        classes = Classes(dataset.classes, dataset.templates)
        train, val = draw_shots(dataset, self.shots, seed)
        return Task((TaskData(classes, train, val),), (("test", classes, dataset.test),), METRIC)
