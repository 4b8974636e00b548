"""Iso-C, isotropic merging in the common subspace (Marczak et al. 2025, arXiv 2502.04959, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk
from mergekit_vl.merging.coefficients import Coefficient, coefficient
from mergekit_vl.merging.svd import (
    AVERAGED,
    add_matrix,
    add_mean,
    check_averaged,
    is_matrix,
    sum_of_tasks,
    svd,
    whole_matrix,
)
from mergekit_vl.options import option
from mergekit_vl.strategies.closed_form import closed_form


@closed_form("iso_c", chunks="tensor", svds=1, needs_base=True, alone="all singular values become their mean")
@dataclass(frozen=True)
class IsoC:
    """base + scale * s U V^T, with U S V^T the SVD of the sum of the task matrices and s the mean of its singular values.

    Whatever is no matrix (vectors, convolutions) and what `averaged` names takes scale * the mean of the task vectors, as in the released
    code, which decomposes embeddings too (`averaged=[text_projection, token_embedding]` saves the largest SVD). Departures: singular
    values below 1e-6 of the largest count as zero, and directions without one stay out, of the mean too, where the released code
    spreads it over arbitrary vectors; the paper searches `scale` on validation data, 1 is ours.
    """

    scale: Coefficient = coefficient(1.0, "alpha, of the merged task matrix")
    averaged: tuple[str, ...] = option(AVERAGED, "matrices that are averaged, as vectors are: parts of their names")

    grid = {"scale": (0.2, 0.4, 0.6, 0.8, 1.2, 1.4, 1.6)}

    whole, check = whole_matrix, check_averaged

    def merge_chunk(self, chunk: Chunk, stats: object) -> Array:
        scale = chunk.at(self.scale)
        if not is_matrix(chunk.tensor, self.averaged):
            return add_mean(chunk, scale)
        u, s, vt = svd(chunk, sum_of_tasks(chunk))
        merged = u @ vt
        if len(s):
            merged *= s.mean()
        return add_matrix(chunk, merged, scale)
