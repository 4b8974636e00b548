"""Breadcrumbs with the election of signs of TIES (Davari & Belilovsky 2023, arXiv 2312.06795, section 3; Yadav et al. 2023,
arXiv 2306.01708, sections 3.2 and 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk
from mergekit_vl.merging.coefficients import Coefficient, coefficient, per_model
from mergekit_vl.options import option
from mergekit_vl.strategies.breadcrumbs import TAILS, Bounds
from mergekit_vl.strategies.sparse import elected, sparse


@sparse("breadcrumbs_ties", TAILS, alone={"density": 1.0, "gamma": 0.0})
@dataclass(frozen=True)
class BreadcrumbsTies:
    """base + scale * disjoint mean of the masked task vectors over the models of the elected sign; masks as in `breadcrumbs`.

    No paper has this pair; it is mergekit's, whose variant is elect=weighted mean=false.
    """

    density: Coefficient = coefficient(0.14, "share that is kept", low=0, high=1)
    densities: tuple[Coefficient, ...] = per_model("one per tuned model, instead of `density`", instead_of="density")
    gamma: float = coefficient(0.01, "share of the largest magnitudes that is masked", low=0, high=1)
    weights: tuple[Coefficient, ...] = per_model("one per tuned model; empty: all 1")
    scale: Coefficient = coefficient(1.0, "lambda, of the merged task vector")
    elect: Literal["raw", "weighted"] = option("raw", "elect the sign before or after the weights")
    mean: bool = option(True, "mean over the agreeing models; false: their sum")

    grid = {"density": (0.14, 0.3, 0.6), "scale": (0.3, 0.6, 1.0)}

    def merge_chunk(self, chunk: Chunk, stats: Bounds) -> Array:
        return elected(self, chunk, TAILS.vectors(self, chunk, stats))
