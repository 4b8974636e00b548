"""PCB-Merging, parameter competition balancing (Du et al. 2024, "Parameter Competition Balancing for Model Merging", arXiv 2410.02396:
intra-balancing, inter-balancing, drop, rescale).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Literal

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.merging.coefficients import Coefficient, coefficient, per_model
from mergekit_vl.merging.prepass import Vector, delta, model_ranks
from mergekit_vl.merging.task_vectors import add_to_base, sign, weighted_sum
from mergekit_vl.options import option
from mergekit_vl.strategies.closed_form import closed_form

if TYPE_CHECKING:
    from jaxtyping import Float

Bounds = tuple[float, float]


@closed_form("pcb", needs_base=True, at_least=2, passes=4, alone="the element with the least balance weighs 0")
@dataclass(frozen=True)
class Pcb:
    """base + scale * sum_i w_i b_i t_i / sum_i b_i, with b_i how well task vector t_i holds its own in the competition for an element.

    As the released `pcb-merging.py` does it, on the whole task vector of each model: magnitudes are clipped to their quantiles `clip` and
    1 - clip, n_i is their place between those, 0 to 1; b_i = exp(N n_i^2) tanh(t_i sum_j t_j) for N models; the largest `density` of them
    are rescaled to 0..1, so that the smallest weighs 0, and the others dropped. The paper writes softmax for exp and tanh, and normalised
    products t_i t_j: the nearest is inter=pairs, as in the released `pcb_ES.py`, sum_j tanh(s_i s_j) with s the signed n. Only that
    one does not depend on the scale of the weights; task vectors far below 1 (towers) are in tanh's straight part anyhow. Departure: where all
    that is kept has one b_i, it weighs 1 (0 if that is not positive); the released code divides by zero. Defaults are those of
    `pcb-merging.py`; other released scripts take density 0.05, clip 0.01 and scale 1.2, or search the w_i on validation images.
    """

    density: float = coefficient(0.1, "share of each task vector that is kept, by its balance", low=0, high=1)
    weights: tuple[Coefficient, ...] = per_model("one per tuned model; empty: all 1")
    scale: Coefficient = coefficient(1.0, "lambda, of the merged task vector")
    clip: float = coefficient(0.0001, "share of the magnitudes that is clipped at either end", low=0, high=0.5)
    inter: Literal["sum", "pairs"] = option(
        "sum", "balance with the sum of the task vectors, or normalised, pair by pair"
    )

    grid = {"density": (0.1, 0.2, 0.5), "scale": (0.6, 1.0, 1.4)}

    def prepass(self, models: Models, run: Run, chunk_size: int) -> tuple[list[Bounds], list[Bounds]]:
        """Per model: the magnitudes that its task vector is clipped to, and the balances that become 0 and 1."""
        n, size = len(models.tuned), sum(t.size for t in models.tensors if not t.tied_to)
        if not size:
            return [(0.0, 0.0)] * n, [(np.inf, np.inf)] * n
        low = min(int(self.clip * size), size - 1)
        high = max(low, size - 1 - ceil(self.clip * size))
        clips = [(least, most) for least, most in model_ranks(models, delta, [[low, high]] * n, run, chunk_size)]
        last = _Last()  # a model's balances need all models: those of a thread's chunk are computed once

        def balance(chunk: Chunk, i: int) -> Array:
            if last.chunk is not chunk:
                last.balances = []
                last.chunk, last.balances = chunk, list(self._balances(list(chunk.task_vectors), clips))
            return last.balances[i]

        dropped = int((1 - self.density) * size)
        if dropped >= size:
            return clips, [(np.inf, np.inf)] * n
        return clips, signed_ranks(models, balance, (dropped, size - 1), size, run, chunk_size)

    def merge_chunk(self, chunk: Chunk, stats: tuple[list[Bounds], list[Bounds]]) -> Array:
        clips, bounds = stats
        vectors = list(chunk.task_vectors)
        shares = [place(b, *bound) for b, bound in zip(self._balances(vectors, clips), bounds)]
        clipped = (sign(t) * np.clip(np.abs(t), *clip) * share for t, clip, share in zip(vectors, clips, shares))
        merged = weighted_sum(clipped, chunk.weights(self.weights))
        merged /= np.maximum(weighted_sum(shares, (1.0,) * len(shares)), 1e-12)
        return add_to_base(chunk, merged, chunk.at(self.scale))

    def _balances(self, vectors: list[Array], clips: list[Bounds]) -> Iterator[Array]:
        """b_i of each task vector, divided by exp(N), which does not overflow and is the same for all elements."""
        n = len(vectors)
        if self.inter == "sum":
            total = weighted_sum((vector.copy() for vector in vectors), (1.0,) * n)
            for vector, clip in zip(vectors, clips):
                x = place(np.abs(vector), *clip)
                yield np.exp(n * (x * x - 1)) * np.tanh(vector * total)
        else:
            signed = [sign(vector) * place(np.abs(vector), *clip) for vector, clip in zip(vectors, clips)]
            for x in signed:
                yield np.exp(n * (x * x - 1)) * sum(np.tanh(x * y) for y in signed)


class _Last(threading.local):
    """Of each thread, the chunk that it had last and its balances."""

    chunk: Chunk | None = None
    balances: list[Array] = []


def place(values: Float[Array, "*shape"], low: float, high: float) -> Float[Array, "*shape"]:
    """0 at `low` and below, 1 at `high` and above, a straight line between; 0 for what is not positive where they coincide."""
    if not low < high:
        return ((values >= high) & (values > 0)).astype(values.dtype)
    placed: Array = (np.clip(values, low, high) - low) / (high - low)
    return placed


def signed_ranks(
    models: Models, vector: Vector, ranks: tuple[int, int], size: int, run: Run, chunk_size: int
) -> list[Bounds]:
    """For each model, the values (not magnitudes) at two ascending positions of `size` elements; exact."""
    n = len(models.tuned)
    above = model_ranks(models, lambda chunk, i: np.maximum(vector(chunk, i), 0), [ranks] * n, run, chunk_size)
    if all(value > 0 for found in above for value in found):
        return [(low, high) for low, high in above]
    mirrored = [size - 1 - rank for rank in ranks]
    below = model_ranks(models, lambda chunk, i: np.maximum(-vector(chunk, i), 0), [mirrored] * n, run, chunk_size)
    return [(a[0] - b[0], a[1] - b[1]) for a, b in zip(above, below)]
