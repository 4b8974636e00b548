"""Multi-task merging (Ilharco et al. 2023, "Editing models with task arithmetic", arXiv 2212.04089, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_vl.datasets.base import Dataset
from mergekit_vl.models.inputs import TaskData
from mergekit_vl.models.model import Classes
from mergekit_vl.options import option
from mergekit_vl.protocols.base import Metric, Task
from mergekit_vl.protocols.base_to_novel import draw_shots


@dataclass(frozen=True)
class MultiTask:
    """One model tuned on each dataset, merged into one model that is tested on all of them, each against its own class names.

    The headline is the mean accuracy over the tasks; beside it the mean of the accuracies divided by those of each task's own
    tuned model (normalised accuracy). What is tuned takes any class names: tuner full with head=text, prompts; or a linear head with
    unseen=zero_shot, which the merge knows by the names of all tasks.
    """

    shots: int | None = option(None, "images per class to tune on; none: the whole train splits")

    joint = True
    """All datasets of the recipe make one cell."""

    def task(self, datasets: Sequence[Dataset], seed: int) -> Task:
        data, tests = [], []
        for dataset in datasets:
            classes = Classes(dataset.classes, dataset.templates)
            train, val = draw_shots(dataset, self.shots, seed)
            data.append(TaskData(classes, train, val))
            tests.append((dataset.name, classes, dataset.test))
        metric = Metric("mean accuracy", {name: (name,) for name, _, _ in tests}, normalised=True)
        return Task(tuple(data), tuple(tests), metric)
