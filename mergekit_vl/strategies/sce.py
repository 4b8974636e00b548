"""SCE: select, calculate, erase (Wan et al. 2024, "FuseChat", arXiv 2408.07990, section on merging)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models, Run, Tensor
from mergekit_vl.merging.coefficients import Coefficient, coefficient, value_at
from mergekit_vl.merging.method import MethodInfo
from mergekit_vl.merging.prepass import absolute_sums, magnitude, tensor_ranks
from mergekit_vl.merging.task_vectors import add_to_base, agreeing
from mergekit_vl.options import check, option
from mergekit_vl.strategies.closed_form import closed_form

Selected = dict[str, tuple[float, tuple[float, ...]]]
"""By tensor name: the smallest variance that is selected, and the coefficient of each model."""


@closed_form("sce", needs_base=True, at_least=2)
@dataclass(frozen=True)
class Sce:
    """base + sum_i c_i * task vector i, over the elements that vary most between the models and the models of the elected sign.

    In each tensor: select the `density` of the elements with the largest variance over the task vectors; calculate c_i, the sum of
    squares of what is selected of vector i, as a share of all models'; erase the elements whose sign is not that of the sum over the
    models. Elements that equal the threshold are all kept. Departures: a sum of exactly zero elects no sign; `scale` is not in the paper.
    The released code and mergekit divide each element by the sum of the c_i of the models that agree (mean=true), count `density` of the
    elements that vary at all (share_of=varying), and take zero as positive; the released code merges every element and selects for c_i only
    (merged=all); mergekit takes equal c_i where the mean squares sum to less than 1e-6 (equal_below=1e-6).
    mergekit's variant: density=1 share_of=varying mean=true equal_below=1e-6.
    """

    density: Coefficient = coefficient(0.1, "tau, share of the elements of a tensor that is selected", low=0, high=1)
    scale: Coefficient = coefficient(1.0, "of the merged task vector")
    share_of: Literal["all", "varying"] = option(
        "all", "what `density` is a share of: all elements, or those that vary"
    )
    merged: Literal["selected", "all"] = option("selected", "the elements that are merged, or selected for c_i only")
    mean: bool = option(False, "divide by the sum of c_i over the agreeing models")
    equal_below: float = option(0.0, "equal c_i where the mean squares of the selected sum to less")

    grid = {"density": (0.1, 0.3, 0.6, 1.0), "scale": (0.5, 1.0)}

    info: ClassVar[MethodInfo]

    def describe(self, n: int) -> MethodInfo:
        return replace(self.info, passes=1 if self.density == 1 else 3 + (self.share_of == "varying"))

    def check(self, models: Models) -> None:
        check(self, where=self.info.where, equal_below=(self.equal_below >= 0, "a number from 0"))

    def prepass(self, models: Models, run: Run, chunk_size: int) -> Selected:
        """By tensor name: the smallest variance that is selected, and the coefficient of each model."""
        n = len(models.tuned)

        def positions(tensor: Tensor, _: int) -> list[int]:
            share = value_at(self.density, tensor.name, tensor.depth)
            if share == 1 or not share:
                return []
            if self.share_of == "all":
                return [tensor.size - max(1, int(share * tensor.size))] if tensor.size else []
            varying = sum(
                np.count_nonzero(variance(list(chunk.task_vectors)))
                for chunk in models.chunks("elementwise", chunk_size, tensor)
            )
            kept = int(share * varying)
            return [tensor.size - kept] if kept else []

        thresholds = dict.fromkeys((t.name for t in models.tensors), 0.0)
        if self.density != 1:
            found = tensor_ranks(
                models, lambda chunk, _: variance(list(chunk.task_vectors)), positions, run, chunk_size, ("variance",)
            )
            for tensor in models.tensors:
                if value_at(self.density, tensor.name, tensor.depth) < 1:
                    (ranks,) = found[tensor.name]
                    thresholds[tensor.name] = ranks[0] if ranks else np.inf

        def squares(chunk: Chunk) -> list[Array]:
            vectors = selected(list(chunk.task_vectors), thresholds[chunk.tensor.name])
            return [np.square(vector, dtype=np.float64) for vector in vectors]

        sums = absolute_sums(models, squares, run, chunk_size)
        stats: Selected = {}
        for tensor in models.tensors:
            if tensor.size:
                total = sums[tensor.name].sum()
                equal = not total or total / tensor.size < self.equal_below
                shares = np.full(n, 1 / n) if equal else sums[tensor.name] / total
                stats[tensor.name] = thresholds[tensor.name], tuple(map(float, shares))
        return stats

    def merge_chunk(self, chunk: Chunk, stats: Selected) -> Array:
        threshold, coefficients = stats[chunk.tensor.name]
        vectors = list(chunk.task_vectors)
        if self.merged == "selected":
            vectors = selected(vectors, threshold)
        merged = agreeing(vectors, coefficients, elect="raw", mean=self.mean)
        return add_to_base(chunk, merged, chunk.at(self.scale))


def variance(vectors: list[Array]) -> Array:
    """The variance of each element over the models: float32's largest for a larger one, 0 for NaN, which the merge itself reports."""
    n = vectors[0].dtype.type(len(vectors))
    apart = [vector - vectors[0] for vector in vectors[1:]]  # equal vectors have no variance, to the bit
    mean = sum(apart) / n
    squares = mean * mean
    for vector in apart:
        vector -= mean
        squares += np.square(vector, out=vector)
    squares /= n
    found: Array = np.nan_to_num(magnitude(squares), copy=False, nan=0.0)
    return found


def selected(vectors: list[Array], threshold: float) -> list[Array]:
    """The elements whose variance reaches the threshold; overwrites the vectors."""
    if threshold > 0:
        keep = variance(vectors) >= threshold
        for vector in vectors:
            vector *= keep
    return vectors
