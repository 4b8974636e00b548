"""Model Stock (Jang et al. 2024, arXiv 2403.19522, eq. 5: the ratio for N models from the angle between their task vectors)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.merging.prepass import products
from mergekit_vl.merging.task_vectors import weighted_sum
from mergekit_vl.options import option
from mergekit_vl.strategies.in_memory import merge_adapters


@dataclass(frozen=True)
class ModelStock:
    """t * mean(tuned) + (1 - t) * base, with t = N cos / (1 + (N - 1) cos) and cos the mean cosine between the N task vectors.

    Per tensor; `along=row` has one t for each slice along the first axis (mergekit's filter_wise). Departures: for N > 2 the cosine is
    the mean over all pairs (the paper has one angle); where 1 + (N - 1) cos vanishes the base is kept.
    """

    along: Literal["tensor", "row"] = option("tensor", "what has a ratio of its own")

    grid = {"along": ("tensor", "row")}

    averages = False

    @property
    def form(self) -> str:
        return "accumulating" if self.along == "tensor" else "rows"

    @property
    def passes(self) -> int:
        return int(self.along == "tensor")

    def held(self, n: int) -> int:
        return 3 * n + 4

    def check(self, models: Models) -> None:
        models.check_count("strategy model_stock", at_least=2, base=True)

    merge = merge_adapters

    def prepass(self, models: Models, run: Run, chunk_size: int) -> Any:
        if self.along == "row":
            return None
        grams = products(models, Chunk.deltas, run, chunk_size)
        return {name: float(ratio(gram)) for name, gram in grams.items()}

    def merge_chunk(self, chunk: Chunk, stats: Any) -> Array:
        n = len(chunk.models.tuned)
        if self.along == "tensor":
            t = stats[chunk.tensor.name]
            return weighted_sum(chunk.members(), (1 - t, *(t / n,) * n))
        deltas = np.array(chunk.deltas(), np.float64).reshape(n, -1, chunk.tensor.row)
        rows = ratio(np.einsum("irk,jrk->ijr", deltas, deltas))[:, None]
        merged = (rows * deltas.mean(0)).reshape(-1) + chunk.base
        return merged.astype(chunk.tensor.wide, copy=False)


def ratio(gram: Array) -> Array:
    """t from the products [N, N, ...] of the task vectors."""
    n = len(gram)
    norms = np.sqrt(np.array([gram[i, i] for i in range(n)]))
    cosines = [gram[i, j] / np.maximum(norms[i] * norms[j], 1e-300) for i, j in combinations(range(n), 2)]
    cosine = np.clip(np.mean(cosines, axis=0), -1, 1)
    below = 1 + (n - 1) * cosine
    singular = np.abs(below) < 1e-6
    return np.where(singular, 0.0, n * cosine / np.where(singular, 1, below))
