"""WiSE-FT (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv 2109.01903, eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mergekit_vl.errors import UserError
from mergekit_vl.model import Mixture, Model
from mergekit_vl.options import option
from mergekit_vl.strategy import MergeInputs
from mergekit_vl.weights import anchors, as_model, linear_sum


@dataclass(frozen=True)
class WiseFT:
    """(1 - alpha) * zero-shot + alpha * fine-tuned. One tuned model; the report shows the whole line of coefficients."""

    alpha: float = option(0.5, "0 is zero-shot, 1 is fine-tuned")
    space: Literal["own", "features"] = option("own", "merge the adapter's tensors, or the classifiers they make")

    def merge(self, inputs: MergeInputs) -> Model:
        base, tuned = anchors(inputs)
        if len(tuned) != 1:
            raise UserError(
                f"one tuned model, not {len(tuned)}", where="strategy wise_ft", mend="use linear for several"
            )
        weights = (1 - self.alpha, self.alpha)
        if self.space == "features":
            return Mixture((inputs.base, tuned[0]), weights)
        return as_model(base, linear_sum([base.adapter.tensors, tuned[0].adapter.tensors], weights))
