"""Robust fine-tuning (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv 2109.01903, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_vl.datasets.base import Dataset
from mergekit_vl.errors import UserError
from mergekit_vl.models.inputs import TaskData
from mergekit_vl.models.model import Classes
from mergekit_vl.options import option
from mergekit_vl.protocols.base import Metric, Task
from mergekit_vl.protocols.base_to_novel import draw_shots

ID = "ID"


@dataclass(frozen=True)
class Robust:
    """Tune on the reference distribution; test on it (ID) and on each of the dataset's shifts (OOD is their plain mean).

    A shift that shows only some of the classes is tested against the names of those, as the field tests ImageNet-A and -R.
    The headline is the mean of ID and OOD, the paper's "avg. ref., shifts".
    """

    shots: int | None = option(None, "images per class to tune on; none: the whole train split")

    def task(self, dataset: Dataset, seed: int) -> Task:
        classes = Classes(dataset.classes, dataset.templates)
        if not dataset.shifts:
            raise UserError(
                f"{dataset.name} has no shifted test images",
                where="protocol robust",
                hint="name them: dataset.shifts, see `mergekit-vl show` of the dataset",
            )
        train, val = draw_shots(dataset, self.shots, seed)
        tests = [(ID, classes, dataset.test)]
        for name, split in dataset.shifts.items():
            shown = tuple(sorted(set(split.labels.tolist())))
            tests.append((name, classes.subset(shown), split.of_classes(shown)))
        metric = Metric("ID/OOD mean", {ID: (ID,), "OOD": tuple(dataset.shifts)})
        return Task((TaskData(classes, train, val),), tuple(tests), metric)
