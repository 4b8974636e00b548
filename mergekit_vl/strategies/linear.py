"""Weighted averaging (Wortsman et al. 2022, "Model soups", arXiv 2203.05482, section 2: the uniform soup is the default)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mergekit_vl.errors import UserError
from mergekit_vl.model import Mixture, Model
from mergekit_vl.options import option
from mergekit_vl.strategy import MergeInputs
from mergekit_vl.weights import anchors, as_model, linear_sum


@dataclass(frozen=True)
class Linear:
    """sum_i w_i * theta_i over the zero-shot model and the tuned ones.

    In the space `own` theta are the adapter's tensors (context vectors for a prompt, the zero-shot point being its initial
    words); in `features` they are the classifiers, that is the raw text features, bound late. The two are not the same point.
    """

    weights: tuple[float, ...] = option((), "one per model, zero-shot first, then `tuned` in order; empty: all equal")
    normalise: bool = option(True, "divide by the sum of the weights")
    space: Literal["own", "features"] = option("own", "merge the adapter's tensors, or the classifiers they make")

    def merge(self, inputs: MergeInputs) -> Model:
        base, tuned = anchors(inputs)
        weights = self.weights or (1.0,) * (1 + len(tuned))
        if len(weights) != 1 + len(tuned):
            raise UserError(
                f"{len(weights)} weights for {1 + len(tuned)} models",
                where="strategy linear",
                mend="zero-shot first, then one per tuned model",
            )
        if self.normalise:
            total = sum(weights)
            if total == 0:
                raise UserError(
                    "the weights sum to zero", where="strategy linear", mend="change them, or set normalise=false"
                )
            weights = tuple(w / total for w in weights)
        if self.space == "features":
            return Mixture((inputs.base, *tuned), weights)
        return as_model(base, linear_sum([m.adapter.tensors for m in (base, *tuned)], weights))
