"""DARE with TIES (Yu et al. 2023, arXiv 2311.03099, section 3; Yadav et al. 2023, arXiv 2306.01708, sections 3.2 and 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk
from mergekit_vl.merging.coefficients import Coefficient, coefficient, per_model
from mergekit_vl.options import option
from mergekit_vl.strategies.dare_linear import AT_RANDOM, Rescale
from mergekit_vl.strategies.sparse import Ratios, elected, sparse


@sparse("dare_ties", AT_RANDOM, alone={"density": 1.0})
@dataclass(frozen=True)
class DareTies:
    """base + scale * disjoint mean of the task vectors, each dropped at random and rescaled, over the models of the elected sign.

    Departure: the random drop replaces TIES' trim, as in mergekit and PEFT; DARE's released code also trims after it.
    mergekit's variant: rescale=l1 elect=weighted mean=false. PEFT's: rescale=density elect=raw.
    """

    density: Coefficient = coefficient(0.1, "share that is kept; the paper drops 0.9 and more", low=0, high=1)
    densities: tuple[Coefficient, ...] = per_model("one per tuned model, instead of `density`", instead_of="density")
    weights: tuple[Coefficient, ...] = per_model("one per tuned model; empty: all 1")
    scale: Coefficient = coefficient(1.0, "lambda, of the merged task vector")
    rescale: Rescale = option("density", "divide by density, or match the task vector's L1 norm in each tensor")
    elect: Literal["raw", "weighted"] = option("raw", "elect the sign before or after the weights")
    mean: bool = option(True, "mean over the agreeing models; false: their sum")

    grid = {"density": (0.1, 0.3, 0.5), "scale": (0.3, 0.6, 1.0)}

    def merge_chunk(self, chunk: Chunk, stats: Ratios | None) -> Array:
        return elected(self, chunk, AT_RANDOM.vectors(self, chunk, stats))
