"""Upper bounds of the memory of a closed form in bytes, results included, for --max-ram.

tests/merge_files/test_memory.py measures every registered method against them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_vl.merging.chunks import BLOCK, Tensor
from mergekit_vl.merging.method import MethodInfo


def flat_memory(info: MethodInfo, tensor: Tensor, n: int, chunk_size: int) -> int:
    """Bytes per thread for a flat chunk, or for whole rows, of a tensor in n tuned models."""
    itemsize = tensor.wide.itemsize
    if info.chunks in ("accumulating", "tensor"):
        return (8 * chunk_size + 4 * n * BLOCK) * itemsize  # whose products are of all models, in short stretches
    if info.chunks == "elementwise":
        return (3 * n + 12) * chunk_size * itemsize
    rows = max(1, chunk_size // max(1, tensor.row))  # each may have numbers of its own, in float64: products, angles
    return (3 * n + 12) * rows * tensor.row * itemsize + (4 * n * n + 24) * rows * 8


def whole_arrays(info: MethodInfo, tensor: Tensor) -> int:
    """Arrays of its size for a tensor that is merged whole: of a square matrix an SVD takes 8 of float64 beside its input."""
    if not info.svds:
        return 20
    sides = (tensor.shape[0], tensor.row) if len(tensor.shape) > 1 else (1, tensor.size)  # a convolution's too
    svd = min(16.0, 6 + 15 * min(sides) / max(*sides, 1))
    return math.ceil(8 + svd + 12 * (info.stacked - 1))


def prepass_memory(info: MethodInfo, tensors: Sequence[Tensor], n: int) -> int:
    """Bytes that a prepass keeps: histograms for two positions of each model and the two that are being counted; sums of rows."""
    if not info.passes:
        return 0
    rows = sum(tensor.size // max(1, tensor.row) for tensor in tensors) if info.chunks == "rows" else 0
    return (n + 2) * (5 << 18) + 32 * n * rows
