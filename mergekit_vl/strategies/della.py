"""DELLA-Merging (Deep et al. 2024, arXiv 2406.11617, section 3: MagPrune drops, then signs are elected and the rest is fused)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import UserError
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.merging.coefficients import Coefficient, coefficient, per_model, value_at
from mergekit_vl.merging.prepass import magnitude
from mergekit_vl.merging.task_vectors import draw
from mergekit_vl.options import option
from mergekit_vl.strategies.sparse import (
    Drop,
    Ratios,
    Rescales,
    density_at,
    each_density,
    elected,
    l1_ratios,
    sparse,
)

Rescale = Literal["probability", "l1", "none"]


class MagPrunes(Rescales, Protocol):
    @property
    def epsilon(self) -> float: ...


def check_window(where: str, method: MagPrunes, models: Models) -> None:
    """Raise UserError unless every probability of the window lies in 0..1."""
    half = method.epsilon / 2
    for density in each_density(method, models):
        for tensor in models.tensors:
            if not half <= value_at(density, tensor.name, tensor.depth) <= 1 - half:
                told = f"density +- epsilon/2 leaves 0 .. 1 at epsilon={method.epsilon:g}"
                raise UserError(told, where=where, hint="lower epsilon")


def thinned(method: MagPrunes, chunk: Chunk, i: int) -> tuple[Array, Array]:
    """The task vector of model i in a chunk of whole rows without what MagPrune drops, and the probability with which each element was kept."""
    vector = chunk.task_vectors[i]
    n = chunk.tensor.row
    keys = magnitude(vector).view(np.uint32).astype(np.uint64).reshape(-1, n)
    keys <<= np.uint64(32)
    keys |= np.arange(chunk.size, dtype=np.uint64).reshape(-1, n)  # equal magnitudes rank by position, on every machine
    keys.sort(axis=1)
    keys &= np.uint64(2**32 - 1)
    keep = np.empty(chunk.size, np.float32)
    keep[keys.view(np.int64)] = np.arange(n, dtype=np.float32)  # its rank, for now
    density = density_at(method, chunk, i)
    keep *= np.float32(method.epsilon / max(1, n - 1))
    keep += np.float32(density - method.epsilon / 2 if n > 1 else density)
    vector *= draw(chunk, i) < keep.astype(np.float64) * 2**32
    return vector, keep


def magprune(method: MagPrunes, chunk: Chunk, i: int, ratios: Ratios | None) -> Array:
    """The same, rescaled."""
    vector, keep = thinned(method, chunk, i)
    if method.rescale == "probability":
        vector /= np.where(keep > 0, keep, 1)
    elif ratios is not None:
        vector *= vector.dtype.type(ratios[chunk.tensor.name][i])
    return vector


def ratios(method: MagPrunes, models: Models, run: Run, chunk_size: int) -> Ratios | None:
    return l1_ratios(method, models, lambda *chunk: thinned(*chunk)[0], "rows", run, chunk_size)


MAGPRUNE = Drop(magprune, ratios, passes=lambda method: int(method.rescale == "l1"), check=check_window, chunks="rows")


@sparse("della", MAGPRUNE, alone={"density": 1.0, "epsilon": 0.0})
@dataclass(frozen=True)
class Della:
    """base + scale * disjoint mean of the task vectors, thinned by MagPrune, over the models of the elected sign.

    MagPrune ranks the magnitudes within each row (the inputs of one neuron) and keeps the element of rank r of n with probability
    density - epsilon/2 + epsilon * r / (n - 1); what is kept is divided by its probability. Departures: the paper counts epsilon * r / n,
    which misses the upper end of the window by epsilon / n; a vector (a bias, a norm) is one row; the defaults of density and
    epsilon are ours, the paper searches them.
    mergekit's variant: its epsilon is half of ours, rescale=l1 elect=weighted.
    """

    density: Coefficient = coefficient(0.3, "mean share that is kept", low=0, high=1)
    densities: tuple[Coefficient, ...] = per_model("one per tuned model, instead of `density`", instead_of="density")
    epsilon: float = option(0.2, "width of the window of probabilities around density")
    weights: tuple[Coefficient, ...] = per_model("one per tuned model; empty: all 1")
    scale: Coefficient = coefficient(1.0, "lambda, of the merged task vector")
    rescale: Rescale = option("probability", "divide by the probability, or match the L1 norm in each tensor")
    elect: Literal["raw", "weighted"] = option("raw", "elect the sign before or after the weights")
    mean: bool = option(True, "mean over the agreeing models; false: their sum")

    grid = {"density": (0.3, 0.5, 0.7), "scale": (0.3, 0.6, 1.0)}

    def merge_chunk(self, chunk: Chunk, stats: Ratios | None) -> Array:
        return elected(self, chunk, MAGPRUNE.vectors(self, chunk, stats))
