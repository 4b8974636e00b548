"""Iso-CTS, isotropic merging in common and task-specific subspaces (Marczak et al. 2025, arXiv 2502.04959, section 4)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk
from mergekit_vl.merging.coefficients import Coefficient, coefficient
from mergekit_vl.merging.method import MethodInfo
from mergekit_vl.merging.svd import (
    AVERAGED,
    add_matrix,
    add_mean,
    check_averaged,
    is_matrix,
    orthogonal,
    sum_of_tasks,
    svd,
    task_matrix,
    whole_matrix,
    zeros,
)
from mergekit_vl.options import option
from mergekit_vl.strategies.closed_form import closed_form


@closed_form("iso_cts", chunks="tensor", needs_base=True, at_least=2, alone="all singular values become their mean")
@dataclass(frozen=True)
class IsoCTS:
    """base + scale * s U V^T: the first singular vectors of the sum of the task matrices, then those of what each adds to them.

    Of r = min(rows, columns) places `common` goes to the sum's vectors U_c, V_c; the rest is shared out equally among the first
    singular vectors of D_t - U_c U_c^T D_t for the task matrices D_t. U and V are the nearest orthonormal matrices to what was put
    together, and s the mean of all its singular values. The share of a task is rounded as in the released code. common=1 is Iso-C.
    Whatever is no matrix and what `averaged` names takes scale * the mean of the task vectors, as in the released code. Departures: as
    Iso-C's, and the tasks never take more places than there are.
    """

    common: float = coefficient(0.8, "share of the places that the sum's vectors take", low=0, high=1)
    scale: Coefficient = coefficient(1.0, "alpha, of the merged task matrix")
    averaged: tuple[str, ...] = option(AVERAGED, "matrices that are averaged, as vectors are: parts of their names")

    grid = {"common": (0.6, 0.8), "scale": (0.4, 0.7, 1.0, 1.3)}

    info: ClassVar[MethodInfo]
    whole, check = whole_matrix, check_averaged

    def describe(self, n: int) -> MethodInfo:
        return replace(self.info, svds=n + 3)

    def merge_chunk(self, chunk: Chunk, stats: object) -> Array:
        scale = chunk.at(self.scale)
        if not is_matrix(chunk.tensor, self.averaged):
            return add_mean(chunk, scale)
        (rows, columns), n = chunk.tensor.shape, len(chunk.tuned)
        places = min(rows, columns)
        own = own_places(places, n, self.common)
        total = sum_of_tasks(chunk)
        left, values, right = zeros(total, rows, places), zeros(total, places), zeros(total, places, columns)
        taken = 0

        def put(u: Array, s: Array, vt: Array, at_most: int) -> None:
            nonlocal taken
            count = min(at_most, len(s))
            span = slice(taken, taken + count)
            left[:, span], values[span], right[span] = u[:, :count], s[:count], vt[:count]
            taken += count

        put(*svd(chunk, total), places - n * own)
        shared = left[:, :taken]
        for i in range(n if own else 0):
            matrix = task_matrix(chunk, i)
            matrix -= shared @ (shared.T @ matrix)
            put(*svd(chunk, matrix), own)
        merged = orthogonal(chunk, left[:, :taken]) @ orthogonal(chunk, right[:taken])
        if taken:
            merged *= values[:taken].mean()
        return add_matrix(chunk, merged, scale)


def own_places(places: int, n: int, common: float) -> int:
    """How many singular vectors of its own each of n task matrices brings."""
    return min(places // n, round((places - int(places * common)) / n))
