"""TALL-masks as compression (Wang et al. 2024, "Localizing Task Information for Improved Model Merging and Compression",
arXiv 2405.07813): the model of a task, from the multi-task vector and one bit per element.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.merging.coefficients import Coefficient, coefficient, per_model
from mergekit_vl.merging.method import MethodInfo
from mergekit_vl.merging.task_vectors import add_to_base, chosen_task
from mergekit_vl.options import check_effect, option
from mergekit_vl.strategies.closed_form import closed_form
from mergekit_vl.strategies.consensus import Vector, check_masks, multi_task_vector, passes, trim_thresholds, uses
from mergekit_vl.strategies.in_memory import merge_by_task
from mergekit_vl.strategies.ties import Thresholds


@closed_form("tall_mask", needs_base=True, at_least=2, alone={"scale": 0.5})
@dataclass(frozen=True)
class TallMask:
    """For task t: base + scale * the multi-task vector where task t uses it, 0 elsewhere. Not one model: it needs the task.

    The masks and their departures are those of `consensus`. `run` (protocol multi_task) makes a model of all tasks that is bound to one by its
    class names; `merge` writes the model of the task that `task` names, and without it base + scale * the multi-task vector.
    """

    task: str | int | None = option(None, "label or number (from 0) of the tuned model whose task the result is for")
    lambda_: Coefficient = coefficient(0.4, "the larger, the fewer elements a task uses", low=0)
    lambdas: tuple[Coefficient, ...] = per_model("one per tuned model, instead of `lambda`", instead_of="lambda_")
    vector: Vector = option("sum", "the multi-task vector: sum of the task vectors, or TIES' disjoint sum")
    density: float = coefficient(0.2, "with vector=ties, share of each task vector that its trim keeps", low=0, high=1)
    scale: Coefficient = coefficient(1.0, "of the masked multi-task vector")

    grid = {"lambda": (0.2, 0.3, 0.5, 0.6, 0.8)}

    info: ClassVar[MethodInfo]

    def describe(self, n: int) -> MethodInfo:
        return replace(self.info, passes=passes(self), by_task=self.task is None)

    def check(self, models: Models) -> None:
        why = "without a task: there is no mask"
        check_effect(self, ("lambda_", "lambdas"), where=self.info.where, why=why, read=self.task is not None)
        check_masks(self.info.where, self)
        chosen_task(self.info.where, self.task, models)

    merge = merge_by_task

    def prepass(self, models: Models, run: Run, chunk_size: int) -> Thresholds | None:
        return trim_thresholds(self, models, run, chunk_size)

    def merge_chunk(self, chunk: Chunk, stats: Thresholds | None) -> Array:
        vectors = list(chunk.task_vectors)
        merged = multi_task_vector(self, chunk, vectors, stats)
        t = chosen_task(self.info.where, self.task, chunk.models)
        if t is not None:
            merged *= uses(self, chunk, t, vectors[t], merged)
        return add_to_base(chunk, merged, chunk.at(self.scale))
