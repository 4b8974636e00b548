"""Datasets: classes, templates and splits; the field's few-shot selection."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mergekit_vl.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


Progress = Callable[[int, int, str], None]
"""(done, total, what): called as work goes on; a total of 0 means that nobody knows how much there is."""


def silent(done: int, total: int, what: str) -> None: ...


class ImageSource(Protocol):
    """Where the images of a split come from."""

    key: str
    """Identifies the images (content, not place); part of every cache key."""

    def __len__(self) -> int: ...
    def load(self, index: int) -> Image:
        """One RGB image."""
        ...


@dataclass(frozen=True)
class Split:
    """Rows of an image source with their labels (0-based indices into `Dataset.classes`)."""

    source: ImageSource
    rows: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def key(self) -> str:
        return hashlib.sha256(self.source.key.encode() + np.asarray(self.rows, dtype=np.int64).tobytes()).hexdigest()[
            :16
        ]

    def of_classes(self, classes: Sequence[int]) -> Split:
        """Only the given classes, relabelled 0.. in their order."""
        to = {old: new for new, old in enumerate(classes)}
        keep = np.array([label in to for label in self.labels], dtype=bool)
        return replace(
            self, rows=self.rows[keep], labels=np.array([to[label] for label in self.labels[keep]], dtype=np.int64)
        )


@dataclass(frozen=True)
class Dataset:
    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    shuffled_halves: bool = False
    """Base and novel halves are redrawn per seed (the microworld) instead of sorted (real data)."""


@dataclass(frozen=True)
class Augment:
    """The field's training transform: RandomResizedCrop with this smallest share of the area, then a flip half of the time."""

    crop: float = 0.08
    flip: bool = True


def few_shot(
    split: Split, shots: int, seed: int, *, name: str, classes: Sequence[str] = (), at_most: bool = False
) -> Split:
    """`shots` images per class as the field draws them (CoOp): `random.seed(seed)`, then `random.sample` class by class in label order.

    Raises UserError for a class with fewer images, unless `at_most` lets it give what it has.
    """
    if shots < 1:
        raise UserError(f"shots={shots}", mend="at least 1")
    draw = random.Random(seed)
    chosen: list[int] = []
    for label in range(int(split.labels.max()) + 1):
        of_class = np.flatnonzero(split.labels == label).tolist()
        if len(of_class) < shots and not at_most:
            raise UserError(
                f"class {repr(classes[label]) if classes else label} has {len(of_class)} images, {shots} shots were asked for",
                where=name,
                mend="lower protocol.shots",
            )
        chosen += draw.sample(of_class, min(shots, len(of_class)))
    return replace(split, rows=split.rows[chosen], labels=split.labels[chosen])
