"""DELLA's MagPrune with task arithmetic (Deep et al. 2024, arXiv 2406.11617, section 3.1, without the election of signs)."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk
from mergekit_vl.merging.coefficients import Coefficient, coefficient, per_model
from mergekit_vl.options import option
from mergekit_vl.strategies.della import MAGPRUNE, Rescale
from mergekit_vl.strategies.sparse import Ratios, sparse, summed


@sparse("della_linear", MAGPRUNE, alone={"density": 1.0, "epsilon": 0.0, "scale": 1.0})
@dataclass(frozen=True)
class DellaLinear:
    """base + scale * sum_i w_i * MagPrune(task vector i); MagPrune and its departures as in `della`.

    mergekit's variant: its epsilon is half of ours, rescale=l1 scale=1.
    """

    density: Coefficient = coefficient(0.3, "mean share that is kept", low=0, high=1)
    densities: tuple[Coefficient, ...] = per_model("one per tuned model, instead of `density`", instead_of="density")
    epsilon: float = option(0.2, "width of the window of probabilities around density")
    weights: tuple[Coefficient, ...] = per_model("one per tuned model; empty: all 1")
    scale: Coefficient = coefficient(0.4, "of the sum, as in task arithmetic")
    rescale: Rescale = option("probability", "divide by the probability, or match the L1 norm in each tensor")

    grid = {"density": (0.3, 0.5, 0.7), "scale": (0.2, 0.4, 0.7)}

    def merge_chunk(self, chunk: Chunk, stats: Ratios | None) -> Array:
        return summed(self, chunk, MAGPRUNE.vectors(self, chunk, stats))
