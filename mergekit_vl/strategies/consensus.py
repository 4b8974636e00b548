"""Consensus merging by TALL-masks (Wang et al. 2024, "Localizing Task Information for Improved Model Merging and Compression",
arXiv 2405.07813: TALL-masks, and the consensus of them).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import Unsuitable
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.merging.coefficients import Coefficient, coefficient, per_model
from mergekit_vl.merging.method import MethodInfo
from mergekit_vl.merging.task_vectors import add_to_base, agreeing, weighted_sum
from mergekit_vl.options import Options, check_effect, option
from mergekit_vl.strategies.closed_form import closed_form
from mergekit_vl.strategies.ties import TRIM, Thresholds, Ties

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Vector = Literal["sum", "ties"]


@closed_form("consensus", needs_base=True, at_least=2, alone={"scale": 0.5})
@dataclass(frozen=True)
class Consensus:
    """base + scale * the multi-task vector, at the elements that at least k tasks use; 0 at the others.

    Consensus TA (vector=sum: the sum of the task vectors) and Consensus TIES (vector=ties: trim, elect, disjoint sum). Task t uses an element
    where |task vector t| >= lambda_t * |multi-task vector - task vector t|: its TALL-mask. k=2 takes away what one task alone uses
    ("selfish") and what none does ("catastrophic"); k=1 the latter alone, k=0 nothing. Departures: the released code compares with >,
    which drops an element that is equal in two models at lambda=1; a sum of zero elects no sign. The authors choose lambda_t (from 0.2
    to 0.6) and scale (from 0.1 to 1) on validation images; the defaults here are our choice.
    """

    lambda_: Coefficient = coefficient(0.4, "the larger, the fewer elements a task uses", low=0)
    lambdas: tuple[Coefficient, ...] = per_model("one per tuned model, instead of `lambda`", instead_of="lambda_")
    k: int = option(2, "tasks that must use an element")
    vector: Vector = option("sum", "the multi-task vector: sum of the task vectors, or TIES' disjoint sum")
    density: float = coefficient(0.2, "with vector=ties, share of each task vector that its trim keeps", low=0, high=1)
    scale: Coefficient = coefficient(0.4, "alpha, of the masked multi-task vector")

    grid = {"lambda": (0.2, 0.4, 0.6), "scale": (0.3, 0.6, 1.0)}

    info: ClassVar[MethodInfo]

    def describe(self, n: int) -> MethodInfo:
        return replace(self.info, passes=passes(self))

    def check(self, models: Models) -> None:
        check_masks(self.info.where, self)
        if not 0 <= self.k <= len(models.tuned):
            raise Unsuitable(
                f"k={self.k} of {len(models.tuned)} tasks", where=self.info.where, hint="from 0 to their number"
            )

    def prepass(self, models: Models, run: Run, chunk_size: int) -> Thresholds | None:
        return trim_thresholds(self, models, run, chunk_size)

    def merge_chunk(self, chunk: Chunk, stats: Thresholds | None) -> Array:
        vectors = list(chunk.task_vectors)
        merged = multi_task_vector(self, chunk, vectors, stats)
        users = np.zeros(chunk.size, np.int32)
        for i, vector in enumerate(vectors):
            users += uses(self, chunk, i, vector, merged)
        merged *= users >= self.k
        return add_to_base(chunk, merged, chunk.at(self.scale))


class Masks(Options, Protocol):
    """The options that methods on TALL-masks share."""

    @property
    def lambda_(self) -> Coefficient: ...
    @property
    def lambdas(self) -> tuple[Coefficient, ...]: ...
    @property
    def vector(self) -> Vector: ...
    @property
    def density(self) -> float: ...
    @property
    def scale(self) -> Coefficient: ...


def check_masks(where: str, method: Masks) -> None:
    check_effect(method, ("density",), where=where, why=f"with vector={method.vector}", read=method.vector == "ties")


def each_lambda(method: Masks, models: Models) -> tuple[Coefficient, ...]:
    """lambda_t of every tuned model: `lambdas`, or `lambda` for all."""
    return method.lambdas or (method.lambda_,) * len(models.tuned)


def passes(method: Masks) -> int:
    return 2 if method.vector == "ties" else 0


def trim_thresholds(method: Masks, models: Models, run: Run, chunk_size: int) -> Thresholds | None:
    """With vector=ties, the smallest magnitude of each task vector that is kept."""
    return TRIM.prepass(Ties(method.density), models, run, chunk_size) if method.vector == "ties" else None


def multi_task_vector(method: Masks, chunk: Chunk, vectors: list[Array], stats: Thresholds | None) -> Array:
    """Of the task vectors, which stay as they are; `stats` are `trim_thresholds`."""
    if stats is not None:
        return agreeing(
            list(TRIM.vectors(Ties(method.density), chunk, stats)), (1.0,) * len(vectors), elect="raw", mean=False
        )
    return weighted_sum((vector.copy() for vector in vectors), (1.0,) * len(vectors))


def uses(
    method: Masks, chunk: Chunk, i: int, vector: Float[Array, " n"], merged: Float[Array, " n"]
) -> Bool[Array, " n"]:
    """The TALL-mask of task i: where its vector counts in the multi-task vector."""
    rest = np.abs(merged - vector)
    rest *= rest.dtype.type(chunk.at(each_lambda(method, chunk.models)[i]))
    mask: Array = np.abs(vector) >= rest
    return mask
