"""The feature store: features of test images and of augmented views, computed once and kept on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mergekit_vl.errors import UserError
from mergekit_vl.models.shards import Shards, default_folder
from mergekit_vl.models.views import eval_view, prefetched, train_view
from mergekit_vl.registry import sources
from mergekit_vl.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from jaxtyping import Float

    from mergekit_vl.datasets.base import Augment, Split
    from mergekit_vl.models.classifier import ImageEncoder

ROWS = 4096
"""Of a shard, about: as many whole blocks of the backbone as are in it, so that what goes on after a kill has the same blocks."""


ROOTS = (__name__, "mergekit_vl.models.views")
WITHOUT = ("checkpoints.dtypes", "checkpoints.torch_io")
"""What makes features: this, the backbone and the source of the images, but not how weights are read, whose hash the key has."""
Load = Callable[[int, int], Tensor]
"""The image that is row `row` of split `number`."""


@dataclass
class FeatureStore:
    """Features by (image encoder, images, transform). Features are raw float32 [N, D]."""

    folder: Path | None = field(default_factory=default_folder)
    """None: nothing is kept."""
    reporter: Reporter = SILENT
    encoded: int = 0
    """Number of images that were encoded so far."""
    seconds: float = 0.0
    """Seconds that this took, reading the images included."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    splits: dict[str, dict[str, Split]] = field(default_factory=dict)
    """By source and key, the splits that were asked for: one may be part of another."""

    def features(self, encoder: ImageEncoder, split: Split) -> Float[Tensor, "N D"]:
        """Test-time features [N, D] of the split's rows."""
        if (found := self._find(encoder, split, "test")) is not None:
            return found

        def load(number: int, row: int) -> Tensor:
            return eval_view(split.source.load(int(split.rows[row])), encoder)

        return self._made(encoder, [self._shards(encoder, split, "test")], load, "features")[0]

    def views(
        self, encoder: ImageEncoder, split: Split, *, epochs: int, seed: int, augment: Augment
    ) -> Float[Tensor, "epochs N D"]:
        """Features [epochs, N, D] of augmented views, one per (image, epoch), each seeded by (seed, image, epoch).

        Stored by epoch, so that a longer run continues a shorter one. Exact in distribution: the training step sees a
        fresh view of every image in every epoch, as it would without the bank.
        """
        transforms = [f"view:{seed}:{epoch}:{augment.crop}:{augment.flip}" for epoch in range(epochs)]
        out: dict[int, Tensor] = {}
        for epoch, transform in enumerate(transforms):
            if (found := self._find(encoder, split, transform)) is not None:
                out[epoch] = found
        missing = [epoch for epoch in range(epochs) if epoch not in out]

        def load(number: int, row: int) -> Tensor:
            image, epoch = int(split.rows[row]), missing[number]
            return train_view(split.source.load(image), encoder, augment, seed=(seed, image, epoch))

        shards = [self._shards(encoder, split, transforms[epoch]) for epoch in missing]
        for epoch, made in zip(missing, self._made(encoder, shards, load, "augmented views")):
            out[epoch] = made
        return torch.stack([out[epoch] for epoch in range(epochs)])

    def temporary(self) -> FeatureStore:
        """A store that keeps nothing on disk, for models that are evaluated once, such as the towers of single epochs."""
        return FeatureStore(None)

    def _shards(self, encoder: ImageEncoder, split: Split, transform: str) -> Shards:
        made_by = sources.modules_of((*ROOTS, encoder.backbone, encoder.backbone.image, split.source))
        code = sources.digest(sources.closure(made_by, WITHOUT))
        key = [encoder.key, split.key, transform, encoder.backbone.preprocess, encoder.backbone.precision, code]
        size = encoder.backbone.block * max(1, ROWS // encoder.backbone.block)
        return Shards(self.folder, json.dumps(key, sort_keys=True), len(split), size)

    def _find(self, encoder: ImageEncoder, split: Split, transform: str) -> Tensor | None:
        """What is kept of the split, or of a larger one that holds its images; None where these must be encoded."""
        known = self.splits.setdefault(split.source.key, {})
        known[split.key] = split
        if (own := self._read(self._shards(encoder, split, transform))) is not None:
            return own
        for other in known.values():
            if len(other) > len(split) and np.isin(split.rows, other.rows).all():
                if (found := self._read(self._shards(encoder, other, transform))) is not None:
                    order = np.argsort(other.rows)
                    return found[torch.from_numpy(order[np.searchsorted(other.rows, split.rows, sorter=order)])]
        return None

    def _read(self, shards: Shards) -> Tensor | None:
        """All rows of a split, or None where a shard is missing or damaged."""
        if shards.key not in self.memory and (found := shards.read_all()) is not None:
            self.memory[shards.key] = torch.from_numpy(found)
        return self.memory.get(shards.key)

    def _made(self, encoder: ImageEncoder, everything: Sequence[Shards], load: Load, what: str) -> list[Tensor]:
        """The rows of all these shards: those that a kill left whole, and the others encoded, each written when it is done."""
        out: dict[int, Tensor] = {}
        began = time.perf_counter()
        for number, start, rows in self._each(encoder, everything, load, what):
            if number not in out:
                out[number] = torch.empty(everything[number].n, rows.shape[1])
            out[number][start : start + len(rows)] = rows
        self.seconds += time.perf_counter() - began
        if len(out) < len(everything):
            raise UserError("there are no images to encode", hint="check the dataset's splits")
        if self.folder is not None:
            self.memory |= {everything[number].key: rows for number, rows in out.items()}
        return [out[number] for number in range(len(everything))]

    def _each(
        self, encoder: ImageEncoder, everything: Sequence[Shards], load: Load, what: str
    ) -> Iterator[tuple[int, int, Tensor]]:
        """(which of `everything`, first row, rows) of each shard; one shard is held at a time."""
        missing: list[tuple[int, int]] = []
        for number, shards in enumerate(everything):
            for start in shards.starts:
                if (kept := shards.read(start)) is None:
                    missing.append((number, start))
                else:
                    yield number, start, torch.from_numpy(kept.copy())
        if missing:
            sizes = [everything[number].rows(start) for number, start in missing]
            for (number, start), rows in zip(missing, self._encode(encoder, missing, sizes, load, what)):
                everything[number].write(start, rows.numpy())
                yield number, start, rows

    def _encode(
        self, encoder: ImageEncoder, places: Sequence[tuple[int, int]], sizes: Sequence[int], load: Load, what: str
    ) -> Iterator[Tensor]:
        """The rows of each place in turn. A block of the backbone may hold rows of several, so that small ones cost no padding."""
        ends = np.cumsum(sizes)

        def image(i: int) -> Tensor:
            at = int(np.searchsorted(ends, i, side="right"))
            number, start = places[at]
            return load(number, start + i - int(ends[at] - sizes[at]))

        left, done = list(sizes), 0
        held: list[Tensor] = []
        for batch in prefetched(image, int(ends[-1]), encoder.backbone.block):
            rows = encoder.encode(batch).cpu()
            self.encoded += len(batch)
            done += len(batch)
            self.reporter.progress(done, int(ends[-1]), what)
            while len(rows):
                held.append(rows[: left[0]])
                rows = rows[left[0] :]
                left[0] -= len(held[-1])
                if not left[0]:
                    yield torch.cat(held)
                    held, left = [], left[1:]
