"""The contract of datasets (classes, templates, splits), and the few-shot selection of CoOp."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from mergekit_vl.errors import UserError
from mergekit_vl.options import Options
from mergekit_vl.reporter import Reporter

if TYPE_CHECKING:
    from PIL.Image import Image

Template = str | Callable[[str], str]
"""A prompt around a class name: a text with `{}` or `{c}`, or a function of the name, as in open_clip."""


class ImageSource(Protocol):
    """The images that a split takes rows from."""

    @property
    def key(self) -> str:
        """Identifies the images (content, not place); part of every cache key."""
        ...

    def __len__(self) -> int: ...
    def load(self, index: int) -> Image:
        """One RGB image."""
        ...


@runtime_checkable
class HasFiles(Protocol):
    @property
    def files(self) -> Sequence[str]:
        """The file of each image, relative to the folder of the image source."""
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
    templates: tuple[Template, ...]
    train: Split
    val: Split
    test: Split
    shuffled_halves: bool = False
    """Base and novel halves are redrawn per seed (the microworld) instead of sorted (real data)."""
    few_give_all: bool = False
    """A class with fewer images than shots gives all its images (CoOp's datasets) instead of being refused."""
    shifts: Mapping[str, Split] = field(default_factory=dict)
    """Test images of the same classes, or of some of them, under other distributions (protocol `robust`)."""

    def of_classes(self, name: str, classes: Sequence[int]) -> Dataset:
        """Only the given classes, relabelled 0.. in their order, under a name; without shifts."""
        train, val, test = (split.of_classes(classes) for split in (self.train, self.val, self.test))
        names = tuple(self.classes[i] for i in classes)
        return replace(self, name=name, classes=names, train=train, val=val, test=test, shifts={})


class DatasetOptions(Options, Protocol):
    """A frozen dataclass whose fields are its options."""

    def load(self, reporter: Reporter) -> Dataset: ...


@runtime_checkable
class CanBeWhole(Protocol):
    """A dataset that can be scored as it is, all of its images, where no split is asked for."""

    @property
    def divided(self) -> bool:
        """Whether it has a test split of its own."""
        ...

    def whole(self, reporter: Reporter) -> Dataset:
        """All images as test."""
        ...


@runtime_checkable
class HasPlace(Protocol):
    """A dataset that knows without reading an image whether it is there."""

    def check_there(self) -> None:
        """Raise UserError where it is not."""
        ...


@runtime_checkable
class HasNamedBy(Protocol):
    @property
    def named_by(self) -> str:
        """The option that distinguishes datasets of this kind; `--datasets` takes its values."""
        ...


def named_by(dataset: DatasetOptions | type[DatasetOptions]) -> str | None:
    return dataset.named_by if isinstance(dataset, HasNamedBy) else None


@dataclass(frozen=True)
class Augment:
    """The training transform: RandomResizedCrop with this smallest share of the area, then a flip half of the time.

    CoOp's code takes 0.08, CLIP's own training 0.9. Small pictures and pictures of one product suffer from 0.08: a twelfth of such
    a picture shows a texture, and no longer what it is.
    """

    crop: float = 0.5
    flip: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise UserError(f"crop={self.crop}", hint="a share of the area: above 0, 1 at most")


def few_shot(
    split: Split,
    shots: int,
    seed: int | random.Random,
    *,
    name: str,
    classes: Sequence[str] = (),
    at_most: bool = False,
) -> Split:
    """`shots` images per class as the field draws them (CoOp): `random.seed(seed)`, then `random.sample` class by class, in the
    order in which the classes first appear in the split. A generator instead of a seed goes on where it stands.

    Raises UserError for a class with fewer images, unless `at_most` lets it give what it has (nothing is drawn for it then).
    """
    if shots < 1:
        raise UserError(f"shots={shots}", hint="at least 1")
    draw = seed if isinstance(seed, random.Random) else random.Random(seed)
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(split.labels.tolist()):
        rows.setdefault(label, []).append(row)
    chosen: list[int] = []
    for label, of_class in rows.items():
        if len(of_class) >= shots:
            chosen += draw.sample(of_class, shots)
        elif at_most:
            chosen += of_class
        else:
            raise UserError(
                f"class {repr(classes[label]) if classes else label} has {len(of_class)} images, {shots} shots were asked for",
                where=name,
                hint="lower protocol.shots",
            )
    return replace(split, rows=split.rows[chosen], labels=split.labels[chosen])
