"""NuSLERP: SLERP of two models by their weights, of whole tensors or of their rows or columns, or of task vectors.

A method of mergekit (2024), without a paper; the arc is Shoemake's, see `slerp`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.merging.coefficients import Coefficient, per_model
from mergekit_vl.merging.method import Chunks, MethodInfo
from mergekit_vl.merging.prepass import products
from mergekit_vl.merging.task_vectors import weighted_sum
from mergekit_vl.options import option
from mergekit_vl.strategies.closed_form import closed_form
from mergekit_vl.strategies.slerp import slerp_coefficients, slerp_rows

CHUNKS: dict[str, Chunks] = {"tensor": "accumulating", "last": "rows", "first": "tensor"}
"""By `along`."""


@closed_form("nuslerp", at_least=2, at_most=2)
@dataclass(frozen=True)
class NuSlerp:
    """The arc between two tuned models, or from the base between their task vectors, at t = w_2 / (w_1 + w_2).

    `along=tensor` takes flattened tensors, `last` each vector along the last axis by its own angle, `first` each along the first.
    Departure from mergekit: a base alone does not switch to task vectors, task_vectors=true does; its `nuslerp_row_wise` is
    along=first.
    """

    weights: tuple[Coefficient, ...] = per_model("one per tuned model; empty: equal")
    along: Literal["tensor", "last", "first"] = option("tensor", "what turns by one angle")
    task_vectors: bool = option(False, "interpolate tuned minus base, and add it to the base")

    info: ClassVar[MethodInfo]

    def describe(self, n: int) -> MethodInfo:
        return replace(
            self.info,
            chunks=CHUNKS[self.along],
            passes=int(self.along == "tensor"),
            needs_base=self.task_vectors,
            ignores_base=not self.task_vectors,
        )

    def check(self, models: Models) -> None:
        models.check_sum(self.info.where, self.weights, 2, hint="change them")

    def _ends(self, chunk: Chunk) -> list[Array]:
        return list(chunk.task_vectors if self.task_vectors else chunk.tuned)

    def prepass(self, models: Models, run: Run, chunk_size: int) -> dict[str, Array] | None:
        return products(models, self._ends, run, chunk_size) if self.along == "tensor" else None

    def merge_chunk(self, chunk: Chunk, stats: dict[str, Array] | None) -> Array:
        first, second = chunk.weights(self.weights)
        t = second / (first + second)
        a, b = self._ends(chunk)
        if stats is not None:
            merged = weighted_sum((a, b), slerp_coefficients(stats[chunk.tensor.name], t))
        else:
            merged = self._by_vector(chunk, a, b, t).astype(chunk.tensor.wide)
        if self.task_vectors:
            merged += chunk.base
        return merged

    def _by_vector(self, chunk: Chunk, a: Array, b: Array, t: float) -> Array:
        shape = chunk.tensor.shape
        if len(shape) < 2:
            return slerp_rows(a, b, t)
        if self.along == "last":
            return slerp_rows(a.reshape(-1, shape[-1]), b.reshape(-1, shape[-1]), t).reshape(-1)
        a, b = (np.moveaxis(x.reshape(shape), 0, -1) for x in (a, b))
        return np.moveaxis(slerp_rows(a, b, t), -1, 0).reshape(-1)
