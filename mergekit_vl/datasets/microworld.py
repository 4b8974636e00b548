"""The microworld's tasks as datasets, whose images are rendered on demand."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mergekit_vl.datasets.base import Dataset, Split
from mergekit_vl.errors import UserError, unknown
from mergekit_vl.microworld.tasks import TASKS
from mergekit_vl.options import option
from mergekit_vl.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class RenderedImages:
    images: np.ndarray  # uint8 [N, H, W, 3]
    key: str

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image:
        from PIL import Image

        return Image.fromarray(self.images[index])


NAMES = (
    "clean", "texture", "emboss", "negative", "thermal", "mosaic", "halftone", "swirl", "blur", "scatter", "night",
    "blinds", "hue",
)  # fmt: skip
"""Shifts by name, without importing torch; a test holds them to `shifts.SHIFTS`."""


@dataclass(frozen=True)
class Microworld:
    """One task of the microworld's suite."""

    task: str = option("animals_emboss", "a task: its classes and its shift")
    shifts: tuple[str, ...] = option(
        (), "other renderings to test on, each clean or a shift with its strength: [clean, night, blur:0.6]"
    )

    named_by = "task"
    """The option that tells one dataset of this kind from another."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise unknown("microworld task", self.task, TASKS, where="dataset.task")
        for given in self.shifts:
            name, _, strength = given.partition(":")
            if name not in NAMES:
                raise unknown("shift", name, NAMES, where="dataset.shifts")
            if strength and not _is_share(strength):
                raise UserError(f"strength {strength!r}", where="dataset.shifts", hint="a number above 0, 1 at most")
        drawn = [_shift(given) for given in self.shifts]
        for i, given in enumerate(self.shifts):
            if drawn[i] in drawn[:i]:
                raise UserError(f"{given} is named twice", where="dataset.shifts", hint="name each rendering once")

    def load(self, reporter: Reporter = SILENT) -> Dataset:
        spec = TASKS[self.task]
        train, val, test = (_split(*spec.images(name)) for name in ("train", "val", "test"))
        shifts = {given: _split(*spec.images("test", shift=_shift(given))) for given in self.shifts}
        names = tuple(name for name, _, _ in spec.members)
        return Dataset(self.task, names, ("a photo of a {}.",), train, val, test, shuffled_halves=True, shifts=shifts)


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    source = RenderedImages(images, hashlib.sha256(images.tobytes()).hexdigest())
    return Split(source, np.arange(len(labels)), labels)


def _shift(given: str) -> tuple[str, float]:
    name, _, strength = given.partition(":")
    return name, float(strength or 0.5)


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False
