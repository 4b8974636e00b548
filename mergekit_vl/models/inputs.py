"""The inputs of strategies and tuners: models, training and validation images, features, seed and device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mergekit_vl.errors import Unsuitable
from mergekit_vl.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mergekit_vl.datasets.base import Split
    from mergekit_vl.models.features import FeatureStore
    from mergekit_vl.models.model import Classes, Model, Single


@dataclass(frozen=True)
class TaskData:
    """The few-shot images that a tuner or a strategy may read; never the test split."""

    classes: Classes
    train: Split
    val: Split | None = None


@dataclass(frozen=True)
class Validation:
    """Images on which something is chosen, with their class names."""

    classes: Classes
    val: Split


@dataclass(frozen=True)
class MergeInputs:
    """`base` is the model before fine-tuning (zero-shot; class means where there is no text tower); `tuned` the fine-tuned ones in recipe order, base never among them; `data` aligned with `tuned`."""

    base: Single
    tuned: tuple[Model, ...]
    data: tuple[TaskData, ...]
    features: FeatureStore
    seed: int = 0
    device: str = "cpu"
    reporter: Reporter = SILENT
    scratch: Path | None = None
    """A folder for what a long training needs to go on after a kill; none: it starts again."""

    everywhere: tuple[TaskData, ...] = ()
    """The tasks of all data sets, where the same models are tested on each: what is chosen for them is chosen on all; empty: `data`."""
    kept: tuple[TaskData, ...] = ()
    """What the base knows and must not be forgotten: nothing is tuned on it, and what is chosen is chosen on it too."""
    labels: tuple[str, ...] = ()
    """What reports call the tuned models, aligned with `tuned`; empty: nothing."""
    batch_norm: Literal["images", "mean"] = "images"
    """Running statistics of a merged tower: estimated again on the training images, or as the strategy makes them of the models'."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tuned models: their labels, or tuned.0 and so on."""
        return self.labels or tuple(f"tuned.{i}" for i in range(len(self.tuned)))

    @property
    def tasks(self) -> tuple[TaskData, ...]:
        """`data` with each task once."""
        return tuple({id(task): task for task in self.data}.values())

    def only(self, where: str, hint: str) -> Model:
        """The tuned model; raises Unsuitable for any other number than one."""
        if len(self.tuned) != 1:
            raise Unsuitable(f"one tuned model, not {len(self.tuned)}", where=where, hint=hint)
        return self.tuned[0]

    def validated(self, where: str, hint: str) -> Validation:
        """The one task of all models, on whose validation images something can be chosen; raises UserError where there is none."""
        if len(self.tasks) != 1:
            raise Unsuitable(
                f"nothing can be chosen on validation images of {len(self.tasks)} tasks at once", where=where, hint=hint
            )
        val = self.data[0].val
        if val is None or not len(val):
            raise Unsuitable(
                "there are no validation images", where=where, hint=f"give the dataset a val split, or {hint}"
            )
        return Validation(self.data[0].classes, val)

    def to_choose_on(self, where: str, hint: str) -> tuple[Validation, ...]:
        """The tasks with validation images on which a single model is chosen; raises Unsuitable where one has none."""
        tasks = self.everywhere or (*self.tasks, *self.kept)
        return tuple(Validation(*each) for each in _with_images(tasks, "validation", where, hint))

    def unlabelled(self, images: Literal["train", "validation"], where: str, hint: str) -> list[tuple[Classes, Split]]:
        """Every task's images, with its classes; raises Unsuitable where one has none."""
        return _with_images(self.tasks, images, where, hint)


def _with_images(
    tasks: Sequence[TaskData], images: Literal["train", "validation"], where: str, hint: str
) -> list[tuple[Classes, Split]]:
    given = [(task.classes, task.train if images == "train" else task.val) for task in tasks]
    found = [(classes, split) for classes, split in given if split is not None and len(split)]
    if not found or len(found) < len(given):
        raise Unsuitable(f"there are no {images} images", where=where, hint=hint)
    return found
