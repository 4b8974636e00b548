"""Breadcrumbs with the election of signs of TIES (Davari & Belilovsky 2023, arXiv 2312.06795, section 3; Yadav et al. 2023,
arXiv 2306.01708, sections 3.2 and 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.merging.coefficients import Coefficient
from mergekit_vl.merging.task_vectors import add_to_base, agreeing, check_task_vectors
from mergekit_vl.options import option
from mergekit_vl.strategies.breadcrumbs import check_tails, masked, tails
from mergekit_vl.strategies.in_memory import merge_adapters

WHERE = "strategy breadcrumbs_ties"


@dataclass(frozen=True)
class BreadcrumbsTies:
    """base + scale * disjoint mean of the masked task vectors over the models of the elected sign; masks as in `breadcrumbs`.

    No paper has this pair; it is mergekit's, whose variant is elect=weighted mean=false.
    """

    density: Coefficient = option(0.14, "share that is kept")
    densities: tuple[Coefficient, ...] = option((), "one per tuned model, instead of `density`")
    gamma: float = option(0.01, "share of the largest magnitudes that is masked")
    weights: tuple[Coefficient, ...] = option((), "one per tuned model; empty: all 1")
    scale: Coefficient = option(1.0, "lambda, of the merged task vector")
    elect: Literal["raw", "weighted"] = option("raw", "elect the sign before or after the weights")
    mean: bool = option(True, "mean over the agreeing models; false: their sum")

    grid = {"density": (0.14, 0.3, 0.6), "scale": (0.3, 0.6, 1.0)}

    form, averages, passes = "elementwise", False, 2

    def held(self, n: int) -> int:
        return 2 * n + 5

    def check(self, models: Models) -> None:
        check_task_vectors(WHERE, self, models)
        check_tails(WHERE, self, models)

    merge = merge_adapters

    def prepass(self, models: Models, run: Run, chunk_size: int) -> Any:
        return tails(self, models, run, chunk_size)

    def merge_chunk(self, chunk: Chunk, stats: Any) -> Array:
        vectors = [masked(chunk, i, bounds) for i, bounds in enumerate(stats[chunk.tensor.name])]
        merged = agreeing(vectors, chunk.weights(self.weights), elect=self.elect, mean=self.mean)
        return add_to_base(chunk, merged, chunk.at(self.scale))
