"""A model that is read in another order: of its units (`rebasin.py`), or of its classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import CHUNK_SIZE, Source

Orders = dict[str, dict[int, Array]]
"""By tensor and axis: where index i of the permuted tensor is taken from."""


@dataclass(frozen=True)
class Permuted:
    """A model whose tensors' axes are reordered as they are read."""

    source: Source
    shapes: Mapping[str, tuple[int, ...]]
    orders: Orders = field(default_factory=dict)

    def read(self, name: str, start: int, stop: int, wide: np.dtype) -> Array:
        orders = self.orders.get(name)
        if not orders or start == stop:
            return self.source.read(name, start, stop, wide)
        shape = self.shapes[name]
        length = int(np.prod(shape[1:]))
        first, last = start // length, -(-stop // length)
        if shape[0] * length <= CHUNK_SIZE:
            whole = self.source.read(name, 0, shape[0] * length, wide).reshape(shape)
            rows = whole[orders[0][first:last]] if 0 in orders else whole[first:last]
        else:
            wanted = orders[0][first:last] if 0 in orders else np.arange(first, last)
            ends = np.flatnonzero(np.diff(wanted, append=-1) != 1) + 1
            runs = zip([0, *ends[:-1]], ends)
            read = [
                self.source.read(name, int(wanted[i]) * length, (int(wanted[i]) + int(j - i)) * length, wide)
                for i, j in runs
            ]
            rows = np.concatenate(read).reshape(last - first, *shape[1:])
        for axis, order in orders.items():
            rows = np.take(rows, order, axis) if axis else rows
        return rows.reshape(-1)[start - first * length : stop - first * length].copy()
