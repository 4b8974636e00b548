"""Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_vl.errors import UserError
from mergekit_vl.model import Model
from mergekit_vl.options import option
from mergekit_vl.strategy import MergeInputs
from mergekit_vl.weights import anchors, as_model, linear_sum


@dataclass(frozen=True)
class TaskArithmetic:
    """base + sum_i scale_i * (tuned_i - base). A negative scale forgets a task."""

    scale: float = option(0.4, "the same for every task vector (the paper's rule of thumb is 0.3 to 0.5)")
    scales: tuple[float, ...] = option((), "one per tuned model, instead of `scale`")

    def merge(self, inputs: MergeInputs) -> Model:
        base, tuned = anchors(inputs)
        scales = self.scales or (self.scale,) * len(tuned)
        if len(scales) != len(tuned):
            raise UserError(
                f"{len(scales)} scales for {len(tuned)} tuned models",
                where="strategy task_arithmetic",
                mend="one each, in recipe order",
            )
        weights = (1 - sum(scales), *scales)
        return as_model(base, linear_sum([m.adapter.tensors for m in (base, *tuned)], weights))
