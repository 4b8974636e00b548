"""DELLA-Merging (Deep et al. 2024, arXiv 2406.11617, section 3: MagPrune drops, then signs are elected and the rest is fused)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import UserError
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.merging.coefficients import Coefficient, value_at
from mergekit_vl.merging.prepass import magnitude
from mergekit_vl.merging.task_vectors import add_to_base, agreeing, check_task_vectors, draw, each_density, l1_ratios
from mergekit_vl.options import option
from mergekit_vl.strategies.in_memory import merge_adapters

WHERE = "strategy della"
Rescale = Literal["probability", "l1", "none"]


@dataclass(frozen=True)
class Della:
    """base + scale * disjoint mean of the task vectors, thinned by MagPrune, over the models of the elected sign.

    MagPrune ranks the magnitudes within each row (the inputs of one neuron) and keeps the element of rank r of n with probability
    density - epsilon/2 + epsilon * r / (n - 1); what is kept is divided by its probability. Departures: the paper counts epsilon * r / n,
    which misses the upper end of the window by epsilon / n; a vector (a bias, a norm) is one row; the defaults of density and
    epsilon are ours, the paper searches them.
    mergekit's variant: its epsilon is half of ours, rescale=l1 elect=weighted.
    """

    density: Coefficient = option(0.3, "mean share that is kept")
    densities: tuple[Coefficient, ...] = option((), "one per tuned model, instead of `density`")
    epsilon: float = option(0.2, "width of the window of probabilities around density")
    weights: tuple[Coefficient, ...] = option((), "one per tuned model; empty: all 1")
    scale: Coefficient = option(1.0, "lambda, of the merged task vector")
    rescale: Rescale = option("probability", "divide by the probability, or match the L1 norm in each tensor")
    elect: Literal["raw", "weighted"] = option("raw", "elect the sign before or after the weights")
    mean: bool = option(True, "mean over the agreeing models; false: their sum")

    grid = {"density": (0.3, 0.5, 0.7), "scale": (0.3, 0.6, 1.0)}

    form, averages = "rows", False

    @property
    def passes(self) -> int:
        return int(self.rescale == "l1")

    def held(self, n: int) -> int:
        return 2 * n + 9

    def check(self, models: Models) -> None:
        check_task_vectors(WHERE, self, models)
        check_window(WHERE, self, models)

    merge = merge_adapters

    def prepass(self, models: Models, run: Run, chunk_size: int) -> Any:
        return l1_ratios(models, self, thinned, run, chunk_size) if self.rescale == "l1" else None

    def merge_chunk(self, chunk: Chunk, stats: Any) -> Array:
        vectors = [magprune(self, chunk, i, stats) for i in range(len(chunk.models.tuned))]
        merged = agreeing(vectors, chunk.weights(self.weights), elect=self.elect, mean=self.mean)
        return add_to_base(chunk, merged, chunk.at(self.scale))


def check_window(where: str, method: Any, models: Models) -> None:
    """Raise UserError unless every probability of the window lies in 0..1."""
    half = method.epsilon / 2
    for density in each_density(method, models):
        for tensor in models.tensors:
            if not half <= value_at(density, tensor.name, tensor.depth) <= 1 - half:
                raise UserError(
                    f"density +- epsilon/2 leaves 0 .. 1 at epsilon={method.epsilon:g}",
                    where=where,
                    hint="lower epsilon",
                )


def thinned(method: Any, chunk: Chunk, i: int) -> Array:
    """The task vector of model i in a chunk of whole rows, without the elements that MagPrune drops."""
    return _thin(method, chunk, i)[0]


def magprune(method: Any, chunk: Chunk, i: int, stats: Any) -> Array:
    """The same, rescaled; `method` is this or `della_linear`."""
    vector, keep = _thin(method, chunk, i)
    if method.rescale == "probability":
        vector /= np.where(keep > 0, keep, 1)
    elif method.rescale == "l1":
        vector *= vector.dtype.type(stats[chunk.tensor.name][i])
    return vector


def _thin(method: Any, chunk: Chunk, i: int) -> tuple[Array, Array]:
    """The thinned vector, and the probability with which each element was kept."""
    vector = chunk.delta(i)
    n = chunk.tensor.row
    keys = magnitude(vector).view(np.uint32).astype(np.uint64).reshape(-1, n)
    keys <<= np.uint64(32)
    keys |= np.arange(chunk.size, dtype=np.uint64).reshape(-1, n)  # equal magnitudes rank by position, on every machine
    keys.sort(axis=1)
    keys &= np.uint64(2**32 - 1)
    keep = np.empty(chunk.size, np.float32)
    keep[keys.view(np.int64)] = np.arange(n, dtype=np.float32)  # its rank, for now
    density = chunk.at(each_density(method, chunk.models)[i])
    keep *= np.float32(method.epsilon / max(1, n - 1))
    keep += np.float32(density - method.epsilon / 2 if n > 1 else density)
    vector *= draw(chunk, i) < keep.astype(np.float64) * 2**32
    return vector, keep
