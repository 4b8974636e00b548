"""Output ensembling: the members' probabilities, averaged."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_vl.errors import UserError
from mergekit_vl.model import Ensemble, Model
from mergekit_vl.options import option
from mergekit_vl.strategy import MergeInputs


@dataclass(frozen=True)
class OutputEnsemble:
    """log sum_i w_i * softmax(logits_i), zero-shot and the tuned models; its inference cost is the sum of its members' costs."""

    weights: tuple[float, ...] = option((), "one per model, zero-shot first; empty: all equal")

    def merge(self, inputs: MergeInputs) -> Model:
        members = (inputs.base, *inputs.tuned)
        weights = self.weights or (1.0,) * len(members)
        if len(weights) != len(members):
            raise UserError(
                f"{len(weights)} weights for {len(members)} models",
                where="strategy ensemble",
                mend="zero-shot first, then one per tuned model",
            )
        if min(weights) < 0 or sum(weights) <= 0:
            raise UserError(
                f"weights {weights} are not a mixture",
                where="strategy ensemble",
                mend="use weights >= 0 with a positive sum",
            )
        return Ensemble(members, tuple(w / sum(weights) for w in weights))
