"""Multi-SLERP: a weighted mean on the sphere for any number of models (Goddard, "MultiSLERP", 2025; mergekit's `multislerp`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import Unsuitable
from mergekit_vl.merging.chunks import Chunk, Models, PerModel, Run
from mergekit_vl.merging.coefficients import Coefficient, per_model
from mergekit_vl.merging.method import MethodInfo
from mergekit_vl.merging.prepass import products
from mergekit_vl.merging.task_vectors import add_to_base, weighted_sum
from mergekit_vl.options import option
from mergekit_vl.strategies.closed_form import closed_form

if TYPE_CHECKING:
    from jaxtyping import Float

WHERE = "strategy multislerp"


@closed_form("multislerp", chunks="accumulating", at_least=2, passes=1)
@dataclass(frozen=True)
class MultiSlerp:
    """(sum_i w_i |x_i|) * m / |m|, with m = sum_i w_i x_i / |x_i|, on flattened tensors.

    The source projects to the tangent space at m, averages there and projects back. Its average in the tangent space,
    sum_i w_i (u_i - (u_i . m/|m|) m/|m|), is exactly zero, so what remains is this closed form; for two models of equal weight and
    length it is SLERP at 1/2, for other weights it is not SLERP. `karcher` iterates to the mean on the sphere.
    """

    weights: tuple[Coefficient, ...] = per_model("one per tuned model; empty: equal")
    normalise: bool = option(True, "divide the weights by their sum")
    task_vectors: bool = option(False, "of tuned minus base, added to the base (mergekit: where a base is given)")

    info: ClassVar[MethodInfo]

    def describe(self, n: int) -> MethodInfo:
        return replace(self.info, needs_base=self.task_vectors, ignores_base=not self.task_vectors)

    def check(self, models: Models) -> None:
        if self.normalise:
            models.check_sum(WHERE, self.weights, len(models.tuned))

    def _vectors(self, chunk: Chunk) -> PerModel:
        return chunk.task_vectors if self.task_vectors else chunk.tuned

    def prepass(self, models: Models, run: Run, chunk_size: int) -> dict[str, Array]:
        return products(models, self._vectors, run, chunk_size)

    def merge_chunk(self, chunk: Chunk, stats: dict[str, Array]) -> Array:
        weights = np.array(chunk.weights(self.weights))
        if self.normalise:
            weights /= weights.sum()
        merged = weighted_sum(self._vectors(chunk), coefficients(stats[chunk.tensor.name], weights, chunk.tensor.name))
        return add_to_base(chunk, merged, 1.0) if self.task_vectors else merged


def coefficients(gram: Float[Array, "N N"], weights: Float[Array, " N"], name: str) -> list[float]:
    """The factor of each vector."""
    norms = np.sqrt(np.diag(gram))
    unit = np.where(norms > 0, 1 / np.where(norms > 0, norms, 1), 0)
    directions = weights * unit
    length = math.sqrt(max(0.0, directions @ gram @ directions))
    if length < 1e-8:
        if len(weights) == 2 or not norms.any():
            return [float(w) for w in weights]  # opposite vectors, or all zero: the straight line
        raise Unsuitable(f"the models' directions cancel in {name}", where=WHERE, hint="change the weights")
    return [float(c) for c in directions / length * (weights @ norms)]
