"""Consensus merging by TALL-masks (Wang et al. 2024, "Localizing Task Information for Improved Model Merging and Compression",
arXiv 2405.07813: TALL-masks, and the consensus of them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import Unsuitable
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.merging.coefficients import Coefficient
from mergekit_vl.merging.task_vectors import add_to_base, agreeing, weighted_sum
from mergekit_vl.options import check_effect, option
from mergekit_vl.strategies.in_memory import merge_adapters
from mergekit_vl.strategies.ties import Ties, trimmed

WHERE = "strategy consensus"
Vector = Literal["sum", "ties"]


@dataclass(frozen=True)
class Consensus:
    """base + scale * the multi-task vector, at the elements that at least k tasks use; 0 at the others.

    Consensus TA (vector=sum: the sum of the task vectors) and Consensus TIES (vector=ties: trim, elect, disjoint sum). Task t uses an element
    where |task vector t| >= lambda_t * |multi-task vector - task vector t|: its TALL-mask. k=2 takes away what one task alone uses
    ("selfish") and what none does ("catastrophic"); k=1 the latter alone, k=0 nothing. Departures: the released code compares with >,
    which drops an element that is the same in two models at lambda=1; a sum of zero elects no sign. The authors choose lambda_t (of 0.2
    to 0.6) and scale (of 0.1 to 1) on validation images; these defaults are ours.
    """

    lambda_: Coefficient = option(0.4, "the larger, the fewer elements a task uses")
    lambdas: tuple[Coefficient, ...] = option((), "one per tuned model, instead of `lambda`")
    k: int = option(2, "tasks that must use an element")
    vector: Vector = option("sum", "the multi-task vector: sum of the task vectors, or TIES' disjoint sum")
    density: float = option(0.2, "with vector=ties, share of each task vector that its trim keeps")
    scale: Coefficient = option(0.4, "alpha, of the masked multi-task vector")

    grid = {"lambda": (0.2, 0.4, 0.6), "scale": (0.3, 0.6, 1.0)}

    form, averages = "elementwise", False

    @property
    def passes(self) -> int:
        return 2 if self.vector == "ties" else 0

    def held(self, n: int) -> int:
        return 2 * n + 6

    def check(self, models: Models) -> None:
        check_masks(WHERE, self, models)
        if not 0 <= self.k <= len(models.tuned):
            raise Unsuitable(f"k={self.k} of {len(models.tuned)} tasks", where=WHERE, hint="from 0 to their number")

    merge = merge_adapters

    def prepass(self, models: Models, run: Run, chunk_size: int) -> Any:
        return trim_thresholds(self, models, run, chunk_size)

    def merge_chunk(self, chunk: Chunk, stats: Any) -> Array:
        vectors = chunk.deltas()
        merged = multi_task_vector(self, chunk, vectors, stats)
        users = np.zeros(chunk.size, np.int32)
        for i, vector in enumerate(vectors):
            users += uses(self, chunk, i, vector, merged)
        merged *= users >= self.k
        return add_to_base(chunk, merged, chunk.at(self.scale))


class Masks(Protocol):
    """The options that methods on TALL-masks share."""

    lambda_: Coefficient
    lambdas: tuple[Coefficient, ...]
    vector: Vector
    density: float
    scale: Coefficient


def check_masks(where: str, method: Masks, models: Models) -> None:
    models.check_count(where, at_least=2, base=True)
    models.check_weights(where, method.lambdas, models.labels, "lambdas")
    for value in each_lambda(method, models):
        models.check_coefficient(where, value, "lambda", 0)
    models.check_coefficient(where, method.density, "density", 0, 1)
    models.check_coefficient(where, method.scale, "scale")
    if method.lambdas:
        check_effect(method, ("lambda_",), where=where, why="beside lambdas")
    if method.vector != "ties":
        check_effect(method, ("density",), where=where, why=f"with vector={method.vector}")


def each_lambda(method: Masks, models: Models) -> tuple[Coefficient, ...]:
    """lambda_t of every tuned model: `lambdas`, or `lambda` for all."""
    return method.lambdas or (method.lambda_,) * len(models.tuned)


def trim_thresholds(method: Masks, models: Models, run: Run, chunk_size: int) -> Any:
    """With vector=ties, the smallest magnitude of each task vector that is kept."""
    return Ties(method.density).prepass(models, run, chunk_size) if method.vector == "ties" else None


def multi_task_vector(method: Masks, chunk: Chunk, vectors: list[Array], stats: Any) -> Array:
    """Of the task vectors, which stay as they are; `facts` are `trim_thresholds`."""
    if method.vector == "ties":
        return agreeing(trimmed(chunk, stats), (1.0,) * len(vectors), elect="raw", mean=False)
    return weighted_sum((vector.copy() for vector in vectors), (1.0,) * len(vectors))


def uses(method: Masks, chunk: Chunk, i: int, vector: Array, merged: Array) -> Array:
    """The TALL-mask of task i: where its vector counts in the multi-task vector."""
    rest = np.abs(merged - vector)
    rest *= rest.dtype.type(chunk.at(each_lambda(method, chunk.models)[i]))
    return np.abs(vector) >= rest
