"""Statistics of whole tensors that some methods need before they merge the first chunk: exact order statistics, products between models.

They read the files chunk by chunk, in memory that does not grow with the models. Results do not depend on the chunk size or
on the number of threads: counts are integers, and sums run over fixed blocks in a fixed order.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import Failed
from mergekit_vl.merging.chunks import BLOCK, Chunk, Models, Run, Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

Vector = Callable[[Chunk, int], Array]
"""The values of model i that are surveyed in a chunk, for instance its task vector."""
SEGMENT = 1 << 20
"""Elements that one job sums in order."""
HIGH, LOW = 1 << 15, 1 << 16
INFINITE = 0x7F80


def delta(chunk: Chunk, i: int) -> Array:
    return chunk.task_vectors[i]


def magnitude(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """|x| in float32: the order in which elements are trimmed."""
    return np.abs(values.astype(np.float32, copy=False))


def model_ranks(
    models: Models, vector: Vector, ranks: Sequence[Sequence[int]], run: Run, chunk_size: int
) -> list[list[float]]:
    """For model i, the magnitudes at the ascending positions ranks[i] among all elements of all tensors (0 is the smallest).

    Exact, in two passes: a histogram of the high 16 bits of |x| finds the bin that holds a position, a histogram of the low 16
    bits within that bin finds the value. Tied weights count once.
    """
    selects = [_Select(positions) for positions in ranks]

    def pass_over(count: Callable[[_Select, Array], None]) -> None:
        def job(chunk: Chunk) -> None:
            for i, select in enumerate(selects):
                count(select, magnitude(vector(chunk, i)))

        run(job, (chunk for chunk in models.chunks("elementwise", chunk_size) if not chunk.tensor.tied_to))

    pass_over(_Select.count_high)
    for label, select in zip(models.labels, selects):
        select.locate(label)
    pass_over(_Select.count_low)
    return [select.values() for select in selects]


def tensor_ranks(
    models: Models,
    vector: Vector,
    ranks: Callable[[Tensor, int], Sequence[int]],
    run: Run,
    chunk_size: int,
    labels: Sequence[str] | None = None,
) -> dict[str, list[list[float]]]:
    """The same within each tensor: by its name, for model i, the magnitudes at the positions ranks(tensor, i).

    `labels` are of the vectors, where these are not one for each model.
    """

    def job(tensor: Tensor) -> tuple[str, list[list[float]]]:
        found = []
        for i, label in enumerate(models.labels if labels is None else labels):
            select = _Select(ranks(tensor, i))
            for chunk in models.chunks("elementwise", chunk_size, tensor):
                select.count_high(magnitude(vector(chunk, i)))
            select.locate(f"{label}: {tensor.name}")
            for chunk in models.chunks("elementwise", chunk_size, tensor):
                select.count_low(magnitude(vector(chunk, i)))
            found.append(select.values())
        return tensor.name, found

    return dict(run(job, sorted(models.tensors, key=lambda tensor: -tensor.size)))


class _Select:
    """The magnitudes at given positions of an ascending order, from two histograms."""

    def __init__(self, positions: Sequence[int]) -> None:
        self.positions = list(positions)
        self.high = np.zeros(HIGH, np.int64)
        self.low: dict[int, Array] = {}
        self.places: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def count_high(self, magnitudes: Array) -> None:
        if not self.positions:
            return
        counts = np.bincount(magnitudes.view(np.uint32) >> np.uint32(16), minlength=HIGH)
        with self._lock:
            self.high += counts

    def locate(self, where: str) -> None:
        """After the first pass: the bin of each position, and the position within it."""
        if self.high[INFINITE:].any():
            raise Failed(
                "has values that are not finite in float32, in which they are ranked",
                where=where,
                hint="use an undamaged model",
            )
        edges = np.cumsum(self.high)
        for position in self.positions:
            bin_ = int(np.searchsorted(edges, position, side="right"))
            self.places.append((bin_, position - int(edges[bin_ - 1] if bin_ else 0)))
        self.low = {bin_: np.zeros(LOW, np.int64) for bin_, _ in self.places}

    def count_low(self, magnitudes: Array) -> None:
        bits = magnitudes.view(np.uint32)
        for bin_, counts in self.low.items():
            low = bits[(bits >> np.uint32(16)) == bin_] & np.uint32(LOW - 1)
            found = np.bincount(low, minlength=LOW) if low.size else 0
            with self._lock:
                counts += found

    def values(self) -> list[float]:
        edges = {bin_: np.cumsum(counts) for bin_, counts in self.low.items()}
        bits = [(b << 16) | int(np.searchsorted(edges[b], rest, side="right")) for b, rest in self.places]
        return [float(value) for value in np.array(bits, np.uint32).view(np.float32)]


def products(
    models: Models, vectors: Callable[[Chunk], Iterable[Array]], run: Run, chunk_size: int
) -> dict[str, Array]:
    """By tensor name, the Gram matrix [n, n] of the n vectors that `vectors` gives for a chunk, in float64.

    Norms, angles and everything that lies in the span of the models follow from it, so that whole tensors need not be held. All n
    vectors are there at once: of more than two models the stretches are shorter.
    """
    step = max(BLOCK, 2 * chunk_size // max(2, len(models.tuned)) // BLOCK * BLOCK)

    def job(segment: tuple[Tensor, int]) -> tuple[str, Array]:
        tensor, start = segment
        stop, total = min(start + SEGMENT, tensor.size), np.zeros((0, 0))
        for begin in range(start, stop, step):
            chunk = Chunk(models, tensor, begin, min(begin + step, stop))
            xs = [x.astype(np.float64, copy=False) for x in vectors(chunk)]
            if not total.size:
                total = np.zeros((len(xs), len(xs)))
            for i, j in zip(*np.triu_indices(len(xs))):
                total[i, j] = _dot(xs[i], xs[j], float(total[i, j]))
        return tensor.name, total

    segments = [(tensor, start) for tensor in models.tensors for start in range(0, tensor.size, SEGMENT)]
    grams: dict[str, Array] = {}
    for name, part in run(job, segments):
        grams[name] = grams[name] + part if name in grams else part
    return {name: upper + np.triu(upper, 1).T for name, upper in grams.items()}


def absolute_sums(
    models: Models, vectors: Callable[[Chunk], list[Array]], run: Run, chunk_size: int, form: str = "elementwise"
) -> dict[str, Array]:
    """By tensor name, sum |x| of each vector that `vectors` gives for a chunk, in float64.

    Summed over fixed stretches (blocks, or the rows of the form "rows") and then exactly, so the chunks' size does not matter.
    """

    def job(chunk: Chunk) -> tuple[str, Array]:
        unit = (chunk.tensor.row if form == "rows" else BLOCK) or 1
        starts = np.arange(0, chunk.size, unit)
        return chunk.tensor.name, np.array(
            [np.add.reduceat(np.abs(v.astype(np.float64)), starts) for v in vectors(chunk)]
        )

    parts: dict[str, list[Array]] = {}
    for name, sums in run(job, models.chunks(form, chunk_size)):
        parts.setdefault(name, []).append(sums)
    return {name: np.array([math.fsum(row) for row in np.concatenate(found, 1)]) for name, found in parts.items()}


def _dot(x: Array, y: Array, total: float) -> float:
    """total + x . y, block by block in order: longer products would be split among BLAS' threads as it likes."""
    whole = len(x) - len(x) % BLOCK
    for part in np.vecdot(x[:whole].reshape(-1, BLOCK), y[:whole].reshape(-1, BLOCK)):
        total += float(part)
    return total + float(np.vecdot(x[whole:], y[whole:]))
