"""Multi-SLERP: a weighted mean on the sphere for any number of models (Goddard, "MultiSLERP", 2025; mergekit's `multislerp`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import Unsuitable, UserError
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.merging.coefficients import Coefficient
from mergekit_vl.merging.prepass import products
from mergekit_vl.merging.task_vectors import add_to_base, weighted_sum
from mergekit_vl.options import option
from mergekit_vl.strategies.in_memory import merge_adapters

WHERE = "strategy multislerp"


@dataclass(frozen=True)
class MultiSlerp:
    """(sum_i w_i |x_i|) * m / |m|, with m = sum_i w_i x_i / |x_i|, on flattened tensors.

    The source projects to the tangent space at m, averages there and projects back. Its average in the tangent space,
    sum_i w_i (u_i - (u_i . m/|m|) m/|m|), is exactly zero, so what remains is this closed form; for two models of equal weight and
    length it is SLERP at 1/2, for other weights it is not SLERP. `karcher` iterates to the mean on the sphere.
    """

    weights: tuple[Coefficient, ...] = option((), "one per tuned model; empty: equal")
    normalise: bool = option(True, "divide the weights by their sum")
    task_vectors: bool = option(False, "of tuned minus base, added to the base (mergekit: where a base is given)")

    form, averages, passes = "accumulating", False, 1

    def held(self, n: int) -> int:
        return 3 * n + 2

    def ignores_base(self, n: int) -> bool:
        return not self.task_vectors

    def check(self, models: Models) -> None:
        models.check_count(WHERE, at_least=2, base=self.task_vectors)
        models.check_weights(WHERE, self.weights, models.labels, "weights")
        for tensor in models.tensors:
            if self.normalise and abs(sum(models.weight_at(self.weights, tensor, len(models.tuned)))) < 1e-12:
                raise UserError("the weights sum to zero", where=WHERE, hint="change them, or set normalise=false")

    merge = merge_adapters

    def _vectors(self, chunk: Chunk) -> list[Array]:
        return list(self._each(chunk))

    def _each(self, chunk: Chunk) -> Any:
        return (chunk.delta(i) if self.task_vectors else chunk.tuned(i) for i in range(len(chunk.models.tuned)))

    def prepass(self, models: Models, run: Run, chunk_size: int) -> Any:
        return products(models, self._vectors, run, chunk_size)

    def merge_chunk(self, chunk: Chunk, stats: Any) -> Array:
        weights = np.array(chunk.weights(self.weights))
        if self.normalise:
            weights /= weights.sum()
        merged = weighted_sum(self._each(chunk), coefficients(stats[chunk.tensor.name], weights, chunk.tensor.name))
        return add_to_base(chunk, merged, 1.0) if self.task_vectors else merged


def coefficients(gram: Array, weights: Array, name: str) -> list[float]:
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
