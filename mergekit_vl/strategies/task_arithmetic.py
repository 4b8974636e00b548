"""Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models
from mergekit_vl.merging.coefficients import Coefficient
from mergekit_vl.merging.task_vectors import weighted_sum
from mergekit_vl.options import check_effect, option
from mergekit_vl.strategies.in_memory import merge_adapters


@dataclass(frozen=True)
class TaskArithmetic:
    """base + sum_i scale_i * (tuned_i - base).

    Addition: positive scales. Negation, to forget a task: a negative scale. Analogy ("A is to B as C is to what"): scales
    -s, s, s for A, B, C. Computed as (1 - sum scale_i) * base + sum scale_i * tuned_i, which is the same number rounded less often.
    """

    scale: Coefficient = option(0.4, "the same for every task vector (the paper's rule of thumb is 0.3 to 0.5)")
    scales: tuple[Coefficient, ...] = option((), "one per tuned model, instead of `scale`")

    grid = {"scale": (0.1, 0.2, 0.3, 0.5, 0.6, 0.8, 1.0)}

    form, averages, per_model = "accumulating", False, "scales"

    def held(self, n: int) -> int:
        return 3

    def check(self, models: Models) -> None:
        if self.scales:
            check_effect(self, ("scale",), where="strategy task_arithmetic", why="beside scales")
        models.check_count("strategy task_arithmetic", base=True)
        models.check_weights(
            "strategy task_arithmetic",
            self.scales or (self.scale,) * len(models.tuned),
            models.labels,
            "scales" if self.scales else "scale",
        )

    merge = merge_adapters

    def merge_chunk(self, chunk: Chunk, stats: Any) -> Array:
        scales = chunk.weights(self.scales or (self.scale,) * len(chunk.models.tuned))
        return weighted_sum(chunk.members(), (1 - sum(scales), *scales))
