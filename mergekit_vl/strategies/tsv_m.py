"""TSV-Merge, merging of task singular vectors (Gargiulo et al. 2025, arXiv 2412.00081, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models, Tensor
from mergekit_vl.merging.coefficients import Coefficient, coefficient
from mergekit_vl.merging.method import MethodInfo
from mergekit_vl.merging.svd import (
    AVERAGED,
    Matrix,
    add_matrix,
    add_mean,
    check_averaged,
    is_matrix,
    namespace,
    orthogonal,
    svd,
    task_matrix,
)
from mergekit_vl.options import check, option
from mergekit_vl.strategies.closed_form import closed_form


@closed_form(
    "tsv_m",
    chunks="tensor",
    needs_base=True,
    at_least=2,
    alone="a task keeps its first singular values alone, and equal tasks share their directions",
)
@dataclass(frozen=True)
class TsvM:
    """base + scale * U S V^T: the first singular vectors of each task matrix side by side, U and V made orthonormal.

    Of T task matrices each keeps the first 1/T of its singular values and vectors; U and V are the nearest orthonormal matrices to
    the collected vectors (orthogonal Procrustes, by SVD), which takes the interference between the tasks away. Whatever is no matrix
    (vectors, convolutions) and what `averaged` names takes scale * the mean of the task vectors, as in the released code, which decomposes
    embeddings too (`averaged=[text_projection, token_embedding]` saves the largest SVDs). Departures: a matrix too small for one
    singular vector of each task is averaged, where the released code leaves the base; singular values below 1e-6 of the largest count as
    zero, and directions without one stay out, where the released code fills them with arbitrary vectors (of equal models, for one).
    """

    scale: Coefficient = coefficient(1.0, "alpha, of the merged task matrix")
    rank: float | None = option(None, "share of the singular values that each task keeps; empty: 1 / number of tasks")
    averaged: tuple[str, ...] = option(AVERAGED, "matrices that are averaged, as vectors are: parts of their names")

    grid = {"scale": (0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 1.5)}

    info: ClassVar[MethodInfo]

    def describe(self, n: int) -> MethodInfo:
        return replace(self.info, svds=n + 2, stacked=max(1.0, n * (self.rank or 0)))

    def whole(self, tensor: Tensor, n: int) -> bool:
        return self._kept(tensor, n) > 0

    def check(self, models: Models) -> None:
        rank = self.rank is None or 0 < self.rank <= 1
        check(self, where=self.info.where, rank=(rank, "a share above 0, at most 1"))
        check_averaged(self, models)

    def _kept(self, tensor: Tensor, n: int) -> int:
        """Singular vectors of each task; 0 for what is averaged."""
        if not is_matrix(tensor, self.averaged):
            return 0
        return min(tensor.shape) // n if self.rank is None else int(min(tensor.shape) * self.rank)

    def merge_chunk(self, chunk: Chunk, stats: object) -> Array:
        n, scale = len(chunk.tuned), chunk.at(self.scale)
        kept = self._kept(chunk.tensor, n)
        if not kept:
            return add_mean(chunk, scale)
        left, values, right = (list(each) for each in zip(*(first_vectors(chunk, i, kept) for i in range(n))))
        xp = namespace(left[0])
        u = orthogonal(chunk, xp.concatenate(left, 1))
        del left
        u *= xp.concatenate(values)
        return add_matrix(chunk, u @ orthogonal(chunk, xp.concatenate(right)), scale)


def first_vectors(chunk: Chunk, i: int, kept: int) -> tuple[Matrix, Matrix, Matrix]:
    """The first singular vectors and values of task matrix i: copies, since views would keep all of them."""
    u, s, vt = svd(chunk, task_matrix(chunk, i))
    xp = namespace(u)
    return xp.asarray(u[:, :kept], copy=True), s[:kept], xp.asarray(vt[:kept], copy=True)
