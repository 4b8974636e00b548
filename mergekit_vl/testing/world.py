"""What things are checked on: the embedded CLIP, a task of a few drawn images, and models tuned by nobody."""

from __future__ import annotations

import atexit
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mergekit_vl.datasets.base import Dataset, Split
from mergekit_vl.models.inputs import MergeInputs, TaskData
from mergekit_vl.models.model import Classes, Model, Single

if TYPE_CHECKING:
    from PIL.Image import Image

    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.features import FeatureStore

CLASSES = Classes(("dog", "car", "apple"))
LATE = Classes(("cat", "tree"))
"""Class names that nothing was tuned on."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Noise with a tint for each class, 48 x 48."""

    n: int
    seed: int
    pictures: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        drawn = np.random.default_rng(self.seed).integers(0, 155, (self.n, 48, 48, 3), dtype=np.uint8)
        drawn[np.arange(self.n), ..., np.arange(self.n) % 3] += np.uint8(100)
        object.__setattr__(self, "pictures", drawn)

    @property
    def key(self) -> str:
        return f"conformance:{self.n}:{self.seed}"

    def __len__(self) -> int:
        return self.n

    def load(self, index: int) -> Image:
        from PIL import Image

        return Image.fromarray(self.pictures[index])


def split(n: int, seed: int) -> Split:
    """n images of the three classes in turn."""
    return Split(Pictures(n, seed), np.arange(n), np.arange(n) % len(CLASSES.names))


def dataset(name: str = "drawn", seed: int = 0) -> Dataset:
    return Dataset(
        name, CLASSES.names, CLASSES.templates, split(12, 3 * seed), split(6, 3 * seed + 1), split(6, 3 * seed + 2)
    )


@cache
def backbone() -> Backbone:
    from mergekit_vl.backbones.micro import Micro

    return Micro().build("cpu")


@cache
def store() -> FeatureStore:
    """Features that are kept until the process ends."""
    from mergekit_vl.models.features import FeatureStore

    folder = tempfile.TemporaryDirectory(prefix="mergekit-vl-")
    atexit.register(folder.cleanup)
    return FeatureStore(Path(folder.name))


def task(seed: int = 0) -> TaskData:
    given = dataset(seed=seed)
    return TaskData(CLASSES, given.train.of_classes((0, 1, 2)), given.val)


def inputs(tuned: tuple[Model, ...] = ()) -> MergeInputs:
    """Of these models, all tuned on one task."""
    from mergekit_vl.adapters.zero_shot import ZeroShot

    data = (task(),) * max(1, len(tuned))
    return MergeInputs(Single(backbone(), ZeroShot()), tuned, data, store(), seed=3)


def prompts(n: int, by: float = 0.05) -> tuple[Single, ...]:
    """Prompts as far from their words as tuning takes them; `by` 0: the words themselves."""
    import torch

    from mergekit_vl.adapters.prompt import Prompt

    draw = torch.Generator().manual_seed(1)
    words = Prompt(backbone().embed("a photo of a"), "a photo of a").untuned(backbone())
    (name, start), *_ = words.tensors.items()
    return tuple(
        Single(backbone(), words.with_tensors({name: start + by * torch.randn(start.shape, generator=draw)}))
        for _ in range(n)
    )


def heads(n: int, by: float = 0.05) -> tuple[Single, ...]:
    """Linear heads near the zero-shot one; `by` 0: that one itself."""
    import torch

    from mergekit_vl.adapters.linear_head import zero_shot
    from mergekit_vl.adapters.zero_shot import ZeroShot

    draw = torch.Generator().manual_seed(2)
    first = zero_shot(backbone(), CLASSES).started_from(ZeroShot(), backbone(), CLASSES)
    return tuple(
        Single(
            backbone(),
            first.with_tensors({k: t + by * torch.randn(t.shape, generator=draw) for k, t in first.tensors.items()}),
        )
        for _ in range(n)
    )
