"""DELLA's MagPrune with task arithmetic (Deep et al. 2024, arXiv 2406.11617, section 3.1, without the election of signs)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.merging.coefficients import Coefficient
from mergekit_vl.merging.task_vectors import add_to_base, check_task_vectors, l1_ratios, weighted_sum
from mergekit_vl.options import option
from mergekit_vl.strategies.della import Rescale, check_window, magprune, thinned
from mergekit_vl.strategies.in_memory import merge_adapters

WHERE = "strategy della_linear"


@dataclass(frozen=True)
class DellaLinear:
    """base + scale * sum_i w_i * MagPrune(task vector i); MagPrune and its departures as in `della`.

    mergekit's variant: its epsilon is half of ours, rescale=l1 scale=1.
    """

    density: Coefficient = option(0.3, "mean share that is kept")
    densities: tuple[Coefficient, ...] = option((), "one per tuned model, instead of `density`")
    epsilon: float = option(0.2, "width of the window of probabilities around density")
    weights: tuple[Coefficient, ...] = option((), "one per tuned model; empty: all 1")
    scale: Coefficient = option(0.4, "of the sum, as in task arithmetic")
    rescale: Rescale = option("probability", "divide by the probability, or match the L1 norm in each tensor")

    grid = {"density": (0.3, 0.5, 0.7), "scale": (0.2, 0.4, 0.7)}

    form, averages = "rows", False

    @property
    def passes(self) -> int:
        return int(self.rescale == "l1")

    def held(self, n: int) -> int:
        return 2 * n + 9

    def check(self, models: Models) -> None:
        check_task_vectors(WHERE, self, models)
        check_window(WHERE, self, models)

    merge = merge_adapters

    def prepass(self, models: Models, run: Run, chunk_size: int) -> Any:
        return l1_ratios(models, self, thinned, run, chunk_size) if self.rescale == "l1" else None

    def merge_chunk(self, chunk: Chunk, stats: Any) -> Array:
        vectors = [magprune(self, chunk, i, stats) for i in range(len(chunk.models.tuned))]
        return add_to_base(chunk, weighted_sum(vectors, chunk.weights(self.weights)), chunk.at(self.scale))
