"""DARE with task arithmetic (Yu et al. 2023, "Language models are super Mario", arXiv 2311.03099, section 3: drop and rescale)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mergekit_vl.coefficients import Coefficient
from mergekit_vl.dtypes import Array
from mergekit_vl.options import option
from mergekit_vl.pieces import Models, Piece, Run
from mergekit_vl.task_vectors import add_to_base, check_task_vectors, keep_at_random, l1_ratios, per_model, weighted_sum
from mergekit_vl.weights import merge_adapters

WHERE = "strategy dare_linear"
Rescale = Literal["density", "l1", "none"]


@dataclass(frozen=True)
class DareLinear:
    """base + scale * sum_i w_i * DARE(task vector i): each element is dropped with probability 1 - density, the rest divided by density.

    Draws are counter-based (`task_vectors.draw`), so the result depends on the seed and on nothing of the machine.
    mergekit's variant: rescale=l1 scale=1, weights per model. PEFT's and the paper's: rescale=density.
    """

    density: Coefficient = option(0.1, "share that is kept; the paper drops 0.9 and more")
    densities: tuple[Coefficient, ...] = option((), "one per tuned model, instead of `density`")
    weights: tuple[Coefficient, ...] = option((), "one per tuned model; empty: all 1")
    scale: Coefficient = option(0.4, "of the sum, as in task arithmetic")
    rescale: Rescale = option("density", "divide by density, or match the task vector's L1 norm in each tensor")

    form, averages = "elementwise", False

    @property
    def passes(self) -> int:
        return int(self.rescale == "l1")

    def held(self, n: int) -> int:
        return 2 * n + 4

    def check(self, models: Models) -> None:
        check_task_vectors(WHERE, models, self.scale, self.weights, {})
        for density in per_model(self.density, self.densities, models, WHERE, "densities"):
            models.check_coefficient(WHERE, density, "density", 0, 1)

    merge = merge_adapters

    def survey(self, models: Models, run: Run, chunk: int) -> Any:
        return l1_ratios(models, self._dropped, run, chunk, self.form) if self.rescale == "l1" else None

    def _dropped(self, piece: Piece, i: int) -> Array:
        return drop(piece, i, self.densities[i] if self.densities else self.density)

    def merge_piece(self, piece: Piece, facts: Any) -> Array:
        vectors = dropped_and_rescaled(piece, self.densities, self.density, self.rescale, facts)
        return add_to_base(piece, weighted_sum(vectors, piece.weights(self.weights)), piece.at(self.scale))


def drop(piece: Piece, i: int, density: Coefficient) -> Array:
    """The task vector of model i without the elements that its draws drop."""
    vector = piece.delta(i)
    vector *= keep_at_random(piece, i, piece.at(density))
    return vector


def dropped_and_rescaled(
    piece: Piece, densities: tuple[Coefficient, ...], density: Coefficient, rescale: Rescale, facts: Any
) -> list[Array]:
    """DARE of every model's task vector."""
    vectors = []
    for i in range(len(piece.models.tuned)):
        kept = densities[i] if densities else density
        vector = drop(piece, i, kept)
        share = piece.at(kept)
        if rescale == "density" and 0 < share < 1:
            vector *= vector.dtype.type(1 / share)
        elif rescale == "l1":
            vector *= vector.dtype.type(facts[piece.tensor.name][i])
        vectors.append(vector)
    return vectors
