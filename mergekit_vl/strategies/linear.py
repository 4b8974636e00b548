"""Weighted averaging (Wortsman et al. 2022, "Model soups", arXiv 2203.05482, section 2: the uniform soup is the default)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import UserError
from mergekit_vl.merging.chunks import Chunk, Models
from mergekit_vl.merging.coefficients import Coefficient, per_model
from mergekit_vl.merging.task_vectors import weighted_sum
from mergekit_vl.options import option
from mergekit_vl.strategies.closed_form import closed_form
from mergekit_vl.strategies.in_memory import (
    Space,
    check_numbers,
    check_space,
    endpoints,
    merge_adapters,
    space_option,
)
from mergekit_vl.strategies.weights import one_each

if TYPE_CHECKING:
    from mergekit_vl.models.inputs import MergeInputs
    from mergekit_vl.models.model import Model

WHERE = "strategy linear"


@closed_form("linear", chunks="accumulating", averages=True, weighs_base=True)
@dataclass(frozen=True)
class Linear:
    """sum_i w_i * theta_i over the base (the zero-shot model), where there is one, and the tuned models.

    In the space of weights theta are the tensors (of an adapter: context vectors for a prompt, the zero-shot point being its initial
    words); in the space of classifiers they are the raw text features, bound late. The two are not the same point.
    """

    weights: tuple[Coefficient, ...] = per_model("one per model, base first, then the tuned in order; empty: all equal")
    normalise: bool = option(True, "divide by the sum of the weights")
    space: Space = space_option()

    grid = {"space": ("weights", "classifiers")}

    def check(self, models: Models) -> None:
        check_space(WHERE, self.space)
        if self.normalise:
            models.check_sum(WHERE, self.weights, len(models.members))

    def merge(self, inputs: MergeInputs) -> Model:
        if self.space == "weights":
            return merge_adapters(self, inputs)
        from mergekit_vl.models.model import Mixture

        _, tuned = endpoints(inputs)
        given = check_numbers(WHERE, self.weights, "a weight")
        weights = one_each(WHERE, given, 1 + len(tuned), "zero-shot first, then one per tuned model")
        return Mixture((inputs.base, *tuned), self._normalised(weights))

    def _normalised(self, weights: tuple[float, ...]) -> tuple[float, ...]:
        total = sum(weights) if self.normalise else 1.0
        if abs(total) < 1e-12:
            raise UserError("the weights sum to zero", where=WHERE, hint="change them, or set normalise=false")
        return tuple(w / total for w in weights)

    def merge_chunk(self, chunk: Chunk, stats: object) -> Array:
        weights = chunk.weights(self.weights, len(chunk.members))
        return weighted_sum(chunk.members, self._normalised(weights))
