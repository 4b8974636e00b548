"""DARE with TIES (Yu et al. 2023, arXiv 2311.03099, section 3; Yadav et al. 2023, arXiv 2306.01708, sections 3.2 and 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.merging.coefficients import Coefficient
from mergekit_vl.merging.task_vectors import add_to_base, agreeing, check_task_vectors, l1_ratios
from mergekit_vl.options import option
from mergekit_vl.strategies.dare_linear import Rescale, dare, dropped
from mergekit_vl.strategies.in_memory import merge_adapters

WHERE = "strategy dare_ties"


@dataclass(frozen=True)
class DareTies:
    """base + scale * disjoint mean of the task vectors, each dropped at random and rescaled, over the models of the elected sign.

    Departure: the random drop stands in the place of TIES' trim, as in mergekit and PEFT; DARE's released code trims after it.
    mergekit's variant: rescale=l1 elect=weighted mean=false. PEFT's: rescale=density elect=raw.
    """

    density: Coefficient = option(0.1, "share that is kept; the paper drops 0.9 and more")
    densities: tuple[Coefficient, ...] = option((), "one per tuned model, instead of `density`")
    weights: tuple[Coefficient, ...] = option((), "one per tuned model; empty: all 1")
    scale: Coefficient = option(1.0, "lambda, of the merged task vector")
    rescale: Rescale = option("density", "divide by density, or match the task vector's L1 norm in each tensor")
    elect: Literal["raw", "weighted"] = option("raw", "elect the sign before or after the weights")
    mean: bool = option(True, "mean over the agreeing models; false: their sum")

    grid = {"density": (0.1, 0.3, 0.5), "scale": (0.3, 0.6, 1.0)}

    form, averages = "elementwise", False

    @property
    def passes(self) -> int:
        return int(self.rescale == "l1")

    def held(self, n: int) -> int:
        return 2 * n + 5

    def check(self, models: Models) -> None:
        check_task_vectors(WHERE, self, models)

    merge = merge_adapters

    def prepass(self, models: Models, run: Run, chunk_size: int) -> Any:
        return l1_ratios(models, self, dropped, run, chunk_size) if self.rescale == "l1" else None

    def merge_chunk(self, chunk: Chunk, stats: Any) -> Array:
        vectors = [dare(self, chunk, i, stats) for i in range(len(chunk.models.tuned))]
        merged = agreeing(vectors, chunk.weights(self.weights), elect=self.elect, mean=self.mean)
        return add_to_base(chunk, merged, chunk.at(self.scale))
