"""What a model learnt against what it must not forget: the question of `mergekit-vl repair`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_vl.datasets.base import Dataset
from mergekit_vl.errors import UserError, unknown
from mergekit_vl.models.inputs import TaskData
from mergekit_vl.models.model import Classes
from mergekit_vl.options import option
from mergekit_vl.protocols.base import Metric, Task
from mergekit_vl.protocols.base_to_novel import draw_shots

WHERE = "protocol new_and_kept"


@dataclass(frozen=True)
class NewAndKept:
    """The first data set is what is new, the others are what is kept; each is tested against its own class names.

    Models are tuned on the first data set alone. Strategies choose on the validation images of all. The headline is the harmonic mean
    of the accuracy on what is new and of the mean accuracy on what is kept.
    """

    keep: tuple[str, ...] = option(
        (), "classes of the first data set that are what is kept, instead of other data sets"
    )
    shots: int | None = option(None, "images per class of what is new; none: all")

    joint = True
    """All datasets of the recipe make one cell."""
    tunes_on_first = True

    def task(self, datasets: Sequence[Dataset], seed: int) -> Task:
        first, *rest = self._divided(datasets[0]) if self.keep else datasets
        rest += datasets[1:] if self.keep else ()
        if not rest:
            raise UserError("there is nothing to keep", where=WHERE, hint="name a second data set, or classes in keep")
        train, val = draw_shots(first, self.shots, seed)
        new = TaskData(Classes(first.classes, first.templates), train, val)
        kept = tuple(TaskData(Classes(each.classes, each.templates), each.train, each.val) for each in rest)
        tests = tuple((each.name, Classes(each.classes, each.templates), each.test) for each in (first, *rest))
        metric = Metric("HM", {"new": (first.name,), "kept": tuple(each.name for each in rest)}, harmonic=True)
        return Task((new,), tests, metric, kept=kept)

    def _divided(self, dataset: Dataset) -> tuple[Dataset, Dataset]:
        """The classes of a dataset that are new, and those that are kept."""
        for name in self.keep:
            if name not in dataset.classes:
                raise unknown("class", name, dataset.classes, where=f"{dataset.name}: classes to keep")
        kept = [i for i, name in enumerate(dataset.classes) if name in self.keep]
        new = [i for i in range(len(dataset.classes)) if i not in kept]
        if min(len(kept), len(new)) < 2:
            raise UserError(
                f"{len(kept)} of {len(dataset.classes)} classes are kept",
                where=dataset.name,
                hint="at least two classes must be kept, and two be new",
            )
        return dataset.of_classes("new", new), dataset.of_classes("kept", kept)
