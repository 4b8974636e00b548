"""EMR-Merging (Huang et al. 2024, "EMR-Merging: Tuning-Free High-Performance Model Merging", arXiv 2405.17461: elect, mask, rescale)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.merging.method import MethodInfo
from mergekit_vl.merging.prepass import absolute_sums
from mergekit_vl.merging.task_vectors import add_to_base, chosen_task, sign, weighted_sum
from mergekit_vl.options import check_effect, option
from mergekit_vl.strategies.closed_form import closed_form
from mergekit_vl.strategies.in_memory import merge_by_task

if TYPE_CHECKING:
    from jaxtyping import Float


@closed_form("emr", needs_base=True)
@dataclass(frozen=True)
class Emr:
    """For task t: base + r_t * the unified task vector where its sign is that of task vector t, 0 elsewhere. Not one model: it needs the task.

    Elect: each element of the unified vector has the sign of the sum over the models and the largest magnitude among those of that sign.
    Mask: by that sign. Rescale: r_t is the L1 norm of task vector t over that of the masked unified vector. `run` (protocol multi_task)
    makes a model of all tasks that is bound to one by its class names; `merge` writes the model of the task that `task` names, and without
    it base + the unified vector, which the paper does not use alone. Departures: a sum of exactly zero elects no sign, where the released code
    takes the negative sign; its ViT code takes the norms as sums of the tensors' means, which gives small tensors more to say
    (norm=tensors; the paper's formula and its code for 30 ViTs: norm=model).
    """

    task: str | int | None = option(None, "label or number (from 0) of the tuned model whose task the result is for")
    norm: Literal["model", "tensors"] = option("model", "L1 norms of the whole model, or sums of its tensors' means")

    grid = {"norm": ("model", "tensors")}

    info: ClassVar[MethodInfo]

    def describe(self, n: int) -> MethodInfo:
        return replace(self.info, passes=int(self.task is not None), by_task=self.task is None)

    def check(self, models: Models) -> None:
        why = "without a task: there is no rescaling"
        check_effect(self, ("norm",), where=self.info.where, why=why, read=self.task is not None)
        chosen_task(self.info.where, self.task, models)

    merge = merge_by_task

    def prepass(self, models: Models, run: Run, chunk_size: int) -> tuple[int, float] | None:
        """The rescaler of the task, with its number; none without a task."""
        t = chosen_task(self.info.where, self.task, models)
        if t is None:
            return None

        def both(chunk: Chunk) -> list[Array]:
            vectors = list(chunk.task_vectors)
            return [vectors[t], masked(unified(vectors), vectors[t])]

        sums = absolute_sums(models, both, run, chunk_size)
        counted = [tensor for tensor in models.tensors if tensor.size and not tensor.tied_to]
        each = [sums[tensor.name] / (tensor.size if self.norm == "tensors" else 1) for tensor in counted]
        own, ours = np.sum(each, 0) if each else (0.0, 0.0)
        return t, float(own / ours) if ours else 1.0

    def merge_chunk(self, chunk: Chunk, stats: tuple[int, float] | None) -> Array:
        vectors = list(chunk.task_vectors)
        merged = unified(vectors)
        if stats is None:
            return add_to_base(chunk, merged, 1.0)
        t, rescaler = stats
        return add_to_base(chunk, masked(merged, vectors[t]), rescaler)


def unified(vectors: list[Array]) -> Array:
    """The elected vector of several task vectors, which stay as they are."""
    elected = sign(weighted_sum((vector.copy() for vector in vectors), (1.0,) * len(vectors)))
    largest = np.zeros_like(elected)
    for vector in vectors:
        np.maximum(largest, vector * elected, out=largest)
    largest *= elected
    return largest


def masked(vector: Float[Array, " n"], task: Float[Array, " n"]) -> Float[Array, " n"]:
    """The elements that have the sign of the task's."""
    kept: Array = vector * (sign(vector) == sign(task))
    return kept
