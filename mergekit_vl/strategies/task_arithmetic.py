"""Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk
from mergekit_vl.merging.coefficients import Coefficient, coefficient, per_model
from mergekit_vl.merging.task_vectors import weighted_sum
from mergekit_vl.strategies.closed_form import closed_form


@closed_form("task_arithmetic", chunks="accumulating", needs_base=True, weights="scales", alone={"scale": 1.0})
@dataclass(frozen=True)
class TaskArithmetic:
    """base + sum_i scale_i * (tuned_i - base).

    Addition: positive scales. Negation, to forget a task: a negative scale. Analogy ("A is to B as C is to what"): scales
    -s, s, s for A, B, C. Computed as (1 - sum scale_i) * base + sum scale_i * tuned_i, which is the same number rounded less often.
    """

    scale: Coefficient = coefficient(0.4, "the same for every task vector (the paper's rule of thumb is 0.3 to 0.5)")
    scales: tuple[Coefficient, ...] = per_model("one per tuned model, instead of `scale`", instead_of="scale")

    grid = {"scale": (0.1, 0.2, 0.3, 0.5, 0.6, 0.8, 1.0)}

    def merge_chunk(self, chunk: Chunk, stats: object) -> Array:
        scales = chunk.weights(self.scales or (self.scale,) * len(chunk.tuned))
        return weighted_sum(chunk.members, (1 - sum(scales), *scales))
