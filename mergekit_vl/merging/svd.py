"""What the SVD methods share: SVDs, task matrices, and the choice of the tensors that are decomposed.

numpy computes every SVD in float64, whatever it is given, so these methods stay in float64 until a matrix is merged. Singular values
below `NULL` of the largest are zero to float32's precision and their vectors arbitrary: they are left out. The bits of an SVD depend
on the BLAS that numpy was built with, and not on threads: each has one.

Matrices are numpy's on the CPU and torch's on a GPU, and a method is written once for both (`namespace`). A GPU agrees with the CPU to
rounding, not bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import Failed
from mergekit_vl.merging.chunks import Chunk, Models, Tensor
from mergekit_vl.merging.coefficients import Coefficient, check_filters, matches
from mergekit_vl.merging.method import MethodInfo
from mergekit_vl.merging.task_vectors import weighted_sum

if TYPE_CHECKING:
    import torch

Matrix = Any
"""A numpy array or a torch tensor."""
NULL = 1e-6
AVERAGED = ("text_projection",)
"""What the released code of TSV-M and of Iso-C averages although it is a matrix."""


def is_matrix(tensor: Tensor, averaged: Sequence[str]) -> bool:
    """Whether a tensor has two axes and no filter of `averaged` covers it."""
    return len(tensor.shape) == 2 and not any(matches(tensor.name, key) for key in averaged)


class LeavesOut(Protocol):
    """A closed form with an option that says which matrices are averaged all the same."""

    @property
    def info(self) -> MethodInfo: ...
    @property
    def averaged(self) -> tuple[str, ...]: ...


def whole_matrix(method: LeavesOut, tensor: Tensor, n: int) -> bool:
    """The `whole` of a method whose option `averaged` leaves matrices out."""
    return is_matrix(tensor, method.averaged)


def check_averaged(method: LeavesOut, models: Models) -> None:
    """Raise UserError for a filter of `averaged` that covers no tensor, except the default's: not every model has a text tower."""
    given: Coefficient = {key: 0.0 for key in method.averaged if key not in AVERAGED}
    check_filters(given, [t.name for t in models.tensors], where=f"{method.info.where}: averaged")


def add_mean(chunk: Chunk, scale: float) -> Array:
    """base + scale * the mean of the task vectors, read one by one."""
    n = len(chunk.models.tuned)
    return weighted_sum(chunk.members, (1 - scale, *(scale / n,) * n))


def add_matrix(chunk: Chunk, matrix: Matrix, scale: float) -> Array:
    """base + scale * matrix, in the tensor's own precision."""
    matrix *= scale
    matrix += placed(chunk, chunk.base)
    wide = chunk.tensor.wide
    merged: Array = matrix if isinstance(matrix, np.ndarray) else matrix.to(dtype=_torch_dtype(wide)).cpu().numpy()
    return merged.reshape(-1).astype(wide, copy=False)


def placed(chunk: Chunk, values: Array) -> Matrix:
    """Values of the chunk as a matrix on the models' device: numpy's on the CPU, elsewhere torch's."""
    matrix = values.reshape(chunk.tensor.shape)
    if chunk.models.device == "cpu":
        return matrix
    import torch

    return torch.from_numpy(matrix).to(chunk.models.device)


def zeros(like: Matrix, *shape: int) -> Matrix:
    """A matrix of zeros of the kind, and on the device, of another."""
    return np.zeros(shape) if isinstance(like, np.ndarray) else like.new_zeros(shape)


def namespace(matrix: Matrix) -> Any:
    """numpy or torch: whose functions take the matrix. What both have under one name is all that methods use."""
    if isinstance(matrix, np.ndarray):
        return np
    import torch

    return torch


def task_matrix(chunk: Chunk, i: int) -> Matrix:
    """The task vector of model i as a matrix of float64."""
    matrix = placed(chunk, chunk.task_vectors[i])
    return matrix.astype(np.float64, copy=False) if isinstance(matrix, np.ndarray) else matrix.double()


def sum_of_tasks(chunk: Chunk) -> Matrix:
    """The sum of the task vectors as a matrix of float64: task arithmetic's."""
    total = task_matrix(chunk, 0)
    for i in range(1, len(chunk.models.tuned)):
        total += placed(chunk, chunk.task_vectors[i])
    return total


def svd(chunk: Chunk, matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """U [m, r], the singular values [r] from the largest, V^T [r, n]; r is the rank, 0 for a matrix of zeros.

    Not finite in, not finite out: the caller's result then names the model.
    """
    xp = namespace(matrix)
    if not len(matrix.reshape(-1)):
        return matrix[:, :0], matrix.reshape(-1)[:0], matrix[:0]
    if not xp.isfinite(matrix).all():
        lost = matrix * xp.nan
        return lost[:, :1], lost[0, :1], lost[:1]
    try:
        u, s, vt = xp.linalg.svd(matrix, full_matrices=False)
    except xp.linalg.LinAlgError:
        raise Failed(
            f"the SVD of {chunk.tensor.name} does not converge", hint=f"average it: averaged=[{chunk.tensor.name}]"
        ) from None
    rank = int((s > NULL * s[0]).sum())
    return u[:, :rank], s[:rank], vt[:rank]


def orthogonal(chunk: Chunk, matrix: Matrix) -> Matrix:
    """The nearest matrix with orthonormal columns or rows (orthogonal Procrustes): P Q^T of the SVD P D Q^T."""
    p, _, qt = svd(chunk, matrix)
    return p @ qt


def _torch_dtype(kind: np.dtype) -> torch.dtype:
    import torch

    return {"f4": torch.float32, "f8": torch.float64}[kind.str[1:]]
