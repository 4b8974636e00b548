"""The microworld's tasks as datasets: rendered when asked for, no files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mergekit_vl.data import Dataset, Progress, Split, silent
from mergekit_vl.errors import unknown
from mergekit_vl.microworld.tasks import TASKS
from mergekit_vl.options import option

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


@dataclass(frozen=True)
class Microworld:
    """One task of the microworld's suite."""

    task: str = option("animals_emboss", "a task: its classes and its shift")

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise unknown("microworld task", self.task, TASKS, where="dataset.task")

    def load(self, progress: Progress = silent) -> Dataset:
        spec = TASKS[self.task]
        splits = []
        for name in ("train", "val", "test"):
            images, labels = spec.images(name)
            source = RenderedImages(images, hashlib.sha256(images.tobytes()).hexdigest())
            splits.append(Split(source, np.arange(len(labels)), labels))
        names = tuple(name for name, _, _ in spec.members)
        return Dataset(self.task, names, ("a photo of a {}.",), *splits, shuffled_halves=True)
