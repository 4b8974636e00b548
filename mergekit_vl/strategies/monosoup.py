"""MonoSoup (Abdollahpoorrostam et al. 2026, "Model soups need only one ingredient", arXiv 2602.09689), as the authors' code has it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models, Tensor
from mergekit_vl.merging.coefficients import matches
from mergekit_vl.merging.method import MethodInfo
from mergekit_vl.merging.svd import Matrix, add_matrix, add_mean, check_averaged, namespace, svd, task_matrix
from mergekit_vl.options import check, option
from mergekit_vl.strategies.closed_form import closed_form

ROUNDING = 1e-9
"""Of the effective rank: n equal singular values have the rank n, and not n + 1."""


@closed_form(
    "monosoup",
    chunks="tensor",
    svds=1,
    needs_base=True,
    at_most=1,
    alone="one model is what it edits: its matrices change",
)
@dataclass(frozen=True)
class MonoSoup:
    """base + (1 - w) * high + w * low, of one tuned model, without images: high holds the first k singular directions of the update.

    The update U S V^T of each matrix is cut at its effective rank, k = ceil(exp(H)), with H the entropy of S / sum(S) (Roy & Vetterli
    2007). With P the share of the energy (squares of S) in the first k, and rho = (s_{k+1} / s_1)^2, or 0 where k is all of them,
    w = rho + (1 - rho) sqrt(1 - P). `energy` takes for k the least number of directions with this share of the energy (the
    authors' `variance`, where they use 0.8). Convolutions are matrices [out, in * h * w]; vectors are those of the tuned model.

    Departures from the released code: singular values below 1e-6 of the largest count as zero; it copies the tuned model's matrix where
    the update is below 1e-6 of the base's norm, and adds 1e-12 to what it divides by.
    """

    energy: float | None = option(
        None, "share of the update's energy in the first directions; empty: by effective rank"
    )
    averaged: tuple[str, ...] = option(
        (), "matrices that are taken from the tuned model, as vectors are: parts of their names"
    )

    grid = {"energy": (0.8, 0.9)}

    info: ClassVar[MethodInfo]

    def whole(self, tensor: Tensor, n: int) -> bool:
        return len(tensor.shape) > 1 and tensor.size > 0 and not any(matches(tensor.name, key) for key in self.averaged)

    def check(self, models: Models) -> None:
        energy = self.energy is None or 0 < self.energy <= 1
        check(self, where=self.info.where, energy=(energy, "a share above 0, at most 1"))
        check_averaged(self, models)

    def merge_chunk(self, chunk: Chunk, stats: object) -> Array:
        if not self.whole(chunk.tensor, 1):
            return add_mean(chunk, 1.0)
        update = task_matrix(chunk, 0).reshape(chunk.tensor.shape[0], -1)
        u, s, vt = svd(chunk, update)
        if len(s):
            k, low = self.split(s)
            u = u[:, :k] * (s[:k] * (1 - 2 * low))  # high counts (1 - low), of which `update` below has low
            update = update * low + u @ vt[:k]
        return add_matrix(chunk, update.reshape(chunk.tensor.shape), 1.0)

    def split(self, s: Matrix) -> tuple[int, float]:
        """k and the weight of what comes after the first k, for singular values s [r] from the largest, all above 0."""
        squares = s * s
        total = float(squares.sum())
        if self.energy is None:
            p = s / s.sum()
            entropy = -float((p * namespace(s).log(p)).sum())
            k = min(len(s), math.ceil(math.exp(entropy) - ROUNDING))
        else:
            shares = (squares.cumsum(0) / total).tolist()
            k = next((i for i, share in enumerate(shares, 1) if share >= self.energy), len(shares))
        if k == len(s):
            return k, 0.0
        rest, rho = float(squares[k:].sum()) / total, float(s[k] / s[0]) ** 2
        return k, rho + (1 - rho) * math.sqrt(rest)
