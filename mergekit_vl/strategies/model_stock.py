"""Model Stock (Jang et al. 2024, arXiv 2403.19522, eq. 5: the ratio for N models from the angle between their task vectors)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.merging.method import MethodInfo
from mergekit_vl.merging.prepass import products
from mergekit_vl.merging.task_vectors import weighted_sum
from mergekit_vl.options import option
from mergekit_vl.strategies.closed_form import closed_form

if TYPE_CHECKING:
    from jaxtyping import Float


@closed_form("model_stock", needs_base=True, at_least=2)
@dataclass(frozen=True)
class ModelStock:
    """t * mean(tuned) + (1 - t) * base, with t = N cos / (1 + (N - 1) cos) and cos the mean cosine between the N task vectors.

    Per tensor; `along=row` has one t for each slice along the first axis (mergekit's filter_wise). Departures: for N > 2 the cosine is
    the mean over all pairs (the paper has one angle); where 1 + (N - 1) cos vanishes the base is kept.
    """

    along: Literal["tensor", "row"] = option("tensor", "what has a ratio of its own")

    grid = {"along": ("tensor", "row")}

    info: ClassVar[MethodInfo]

    def describe(self, n: int) -> MethodInfo:
        if self.along == "row":
            return replace(self.info, chunks="rows")
        return replace(self.info, chunks="accumulating", passes=1)

    def prepass(self, models: Models, run: Run, chunk_size: int) -> dict[str, float] | None:
        if self.along == "row":
            return None
        grams = products(models, lambda chunk: chunk.task_vectors, run, chunk_size)
        return {name: float(ratio(gram)) for name, gram in grams.items()}

    def merge_chunk(self, chunk: Chunk, stats: dict[str, float] | None) -> Array:
        n = len(chunk.tuned)
        if stats is not None:
            t = stats[chunk.tensor.name]
            return weighted_sum(chunk.members, (1 - t, *(t / n,) * n))
        deltas = np.array(list(chunk.task_vectors), np.float64).reshape(n, -1, chunk.tensor.row)
        rows = ratio(np.einsum("irk,jrk->ijr", deltas, deltas))[:, None]
        merged: Array = (rows * deltas.mean(0)).reshape(-1) + chunk.base
        return merged.astype(chunk.tensor.wide, copy=False)


def ratio(gram: Float[Array, "N N *rows"]) -> Float[Array, "*rows"]:
    """t from the products [N, N, ...] of the task vectors."""
    n = len(gram)
    norms = np.sqrt(np.array([gram[i, i] for i in range(n)]))
    cosines = [gram[i, j] / np.maximum(norms[i] * norms[j], 1e-300) for i, j in combinations(range(n), 2)]
    cosine = np.clip(np.mean(cosines, axis=0), -1, 1)
    below = 1 + (n - 1) * cosine
    singular = np.abs(below) < 1e-6
    return np.where(singular, 0.0, n * cosine / np.where(singular, 1, below))
