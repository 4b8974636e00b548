"""DELLA-Merging (Deep et al. 2024, arXiv 2406.11617, section 3: MagPrune drops, then signs are elected and the rest is fused)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mergekit_vl.coefficients import Coefficient
from mergekit_vl.dtypes import Array
from mergekit_vl.errors import UserError
from mergekit_vl.options import option
from mergekit_vl.pieces import Models, Piece, Run
from mergekit_vl.surveys import magnitude
from mergekit_vl.task_vectors import add_to_base, agreeing, check_task_vectors, draw, l1_ratios, per_model
from mergekit_vl.weights import merge_adapters

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

    form, averages = "rows", False

    @property
    def passes(self) -> int:
        return int(self.rescale == "l1")

    def held(self, n: int) -> int:
        return 2 * n + 9

    def check(self, models: Models) -> None:
        check_task_vectors(WHERE, models, self.scale, self.weights, {})
        check_window(WHERE, models, per_model(self.density, self.densities, models, WHERE, "densities"), self.epsilon)

    merge = merge_adapters

    def survey(self, models: Models, run: Run, chunk: int) -> Any:
        return l1_ratios(models, self._thin, run, chunk, self.form) if self.rescale == "l1" else None

    def _thin(self, piece: Piece, i: int) -> Array:
        return magprune(
            piece, i, self.densities[i] if self.densities else self.density, self.epsilon, self.rescale, None
        )

    def merge_piece(self, piece: Piece, facts: Any) -> Array:
        vectors = [
            magprune(piece, i, self.densities[i] if self.densities else self.density, self.epsilon, self.rescale, facts)
            for i in range(len(piece.models.tuned))
        ]
        merged = agreeing(vectors, piece.weights(self.weights), elect=self.elect, mean=self.mean)
        return add_to_base(piece, merged, piece.at(self.scale))


def check_window(where: str, models: Models, densities: list[Coefficient], epsilon: float) -> None:
    """Raise UserError unless every probability of the window lies in 0..1."""
    for density in densities:
        models.check_coefficient(where, density, "density", 0, 1)
        try:
            models.check_coefficient(where, density, "density", epsilon / 2, 1 - epsilon / 2)
        except UserError:
            raise UserError(
                f"density +- epsilon/2 leaves 0 .. 1 at epsilon={epsilon:g}", where=where, mend="lower epsilon"
            ) from None


def magprune(piece: Piece, i: int, density: Coefficient, epsilon: float, rescale: Rescale, facts: Any) -> Array:
    """The task vector of model i in a piece of whole rows, thinned and rescaled."""
    vector = piece.delta(i)
    n = piece.tensor.row
    keys = magnitude(vector).view(np.uint32).astype(np.uint64).reshape(-1, n)
    keys <<= np.uint64(32)
    keys |= np.arange(n, dtype=np.uint64)  # equal magnitudes rank by position, on every machine
    keys.sort(axis=1)
    ranks = np.empty(keys.shape, np.float32)
    np.put_along_axis(ranks, (keys & np.uint64(2**32 - 1)).astype(np.int64), np.arange(n, dtype=np.float32), axis=1)
    share = piece.at(density)
    ranks *= np.float32(epsilon / max(1, n - 1))
    ranks += np.float32(share - epsilon / 2 if n > 1 else share)
    keep = ranks.reshape(-1)
    vector *= draw(piece, i) < keep.astype(np.float64) * 2**32
    if rescale == "probability":
        np.divide(vector, keep, out=vector, where=keep > 0)
    elif rescale == "l1" and facts is not None:
        vector *= vector.dtype.type(facts[piece.tensor.name][i])
    return vector
