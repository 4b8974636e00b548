"""Parts that the methods on singular vectors share.

numpy computes every SVD in float64, whatever it is given, so these methods stay in float64 until a matrix is merged. Singular values
below `NULL` of the largest are zero to float32's precision and their vectors arbitrary: they are left out. The bits of an SVD depend
on the BLAS that numpy was built with and on its number of threads (OPENBLAS_NUM_THREADS), not on --threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from mergekit_vl.coefficients import check_filters, matches
from mergekit_vl.dtypes import Array
from mergekit_vl.errors import UserError
from mergekit_vl.pieces import Models, Piece, Tensor
from mergekit_vl.task_vectors import weighted_sum

NULL = 1e-6
AVERAGED = ("text_projection",)
"""What the released code of TSV-M and of Iso-C averages although it is a matrix."""


def is_matrix(tensor: Tensor, averaged: Sequence[str]) -> bool:
    """Whether a tensor has two axes and no filter of `averaged` covers it."""
    return len(tensor.shape) == 2 and not any(matches(tensor.name, key) for key in averaged)


def svd_arrays(tensor: Tensor) -> int:
    """Arrays of float32 of the matrix's size that its SVD takes beside its input: 8 of float64 for a square one, as measured."""
    return ceil(min(16.0, 6 + 15 * min(tensor.shape) / max(*tensor.shape, 1)))


def check_averaged(where: str, models: Models, averaged: Sequence[str]) -> None:
    """Raise UserError for a filter of `averaged` that covers no tensor, except the default's: not every model has a text tower."""
    given = {key: 0.0 for key in averaged if key not in AVERAGED}
    check_filters(given, [t.name for t in models.tensors], where=f"{where}: averaged")


def add_mean(piece: Piece, scale: float) -> Array:
    """base + scale * the mean of the task vectors, read one by one."""
    n = len(piece.models.tuned)
    return weighted_sum(piece.members(), (1 - scale, *(scale / n,) * n))


def add_matrix(piece: Piece, matrix: Array, scale: float) -> Array:
    """base + scale * matrix, in the tensor's own precision."""
    matrix *= scale
    matrix += piece.base.reshape(piece.tensor.shape)
    return matrix.reshape(-1).astype(piece.tensor.wide, copy=False)


def task_matrix(piece: Piece, i: int) -> Array:
    """The task vector of model i as a matrix of float64."""
    return piece.delta(i).reshape(piece.tensor.shape).astype(np.float64, copy=False)


def sum_of_tasks(piece: Piece) -> Array:
    """The sum of the task vectors as a matrix of float64: task arithmetic's."""
    total = task_matrix(piece, 0)
    for i in range(1, len(piece.models.tuned)):
        total += piece.delta(i).reshape(piece.tensor.shape)
    return total


def svd(piece: Piece, matrix: Array) -> tuple[Array, Array, Array]:
    """U [m, r], the singular values [r] from the largest, V^T [r, n]; r is the rank, 0 for a matrix of zeros.

    Not finite in, not finite out: the caller's result then names the model.
    """
    m, n = matrix.shape
    if not np.isfinite(matrix).all():
        return np.full((m, 1), np.nan), np.full(1, np.nan), np.full((1, n), np.nan)
    if not matrix.size:
        return np.zeros((m, 0)), np.zeros(0), np.zeros((0, n))
    try:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    except np.linalg.LinAlgError:
        raise UserError(
            f"the SVD of {piece.tensor.name} does not converge", mend=f"average it: averaged=[{piece.tensor.name}]"
        ) from None
    rank = int(np.count_nonzero(s > NULL * s[0]))
    return u[:, :rank], s[:rank], vt[:rank]


def orthogonal(piece: Piece, matrix: Array) -> Array:
    """The nearest matrix with orthonormal columns or rows (orthogonal Procrustes): P Q^T of the SVD P D Q^T."""
    p, _, qt = svd(piece, matrix)
    return p @ qt
