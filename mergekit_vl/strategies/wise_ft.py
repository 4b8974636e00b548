"""WiSE-FT (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv 2109.01903, eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import UserError
from mergekit_vl.merging.chunks import Chunk, Models
from mergekit_vl.merging.coefficients import Coefficient
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

if TYPE_CHECKING:
    from mergekit_vl.models.inputs import MergeInputs
    from mergekit_vl.models.model import Mixture, Model, Single

WHERE = "strategy wise_ft"
ALPHAS = tuple(i / 10 for i in range(11))
"""Candidates for `alpha=validation`."""


@closed_form("wise_ft", chunks="accumulating", averages=True, at_most=1, needs_base=True, alone={"alpha": 1.0})
@dataclass(frozen=True)
class WiseFT:
    """(1 - alpha) * zero-shot + alpha * fine-tuned. One tuned model; the report shows the whole line of coefficients.

    `alpha=validation` takes the best of 0, 0.1, ... 1 on the validation images (of checkpoints: the mean over all data sets that they are
    tested on): the highest accuracy, then the least negative log-likelihood, then the smallest alpha. The test split is never read.
    """

    alpha: Coefficient | Literal["validation"] = option(
        0.5, "0 is zero-shot, 1 is fine-tuned; validation: chosen on validation images (`run` only)"
    )
    space: Space = space_option()

    grid = {"space": ("weights", "classifiers"), "alpha": (0.3, 0.5, 0.7, 0.9)}

    def check(self, models: Models) -> None:
        check_space(WHERE, self.space)
        models.check_coefficient(WHERE, self._alpha(), "alpha")

    def merge(self, inputs: MergeInputs) -> Model:
        return self._chosen(inputs) if self.alpha == "validation" else self._at_alpha(inputs)

    def _at_alpha(self, inputs: MergeInputs) -> Single | Mixture:
        if self.space == "weights":
            return merge_adapters(self, inputs)
        from mergekit_vl.models.model import Mixture

        inputs.only(WHERE, "use linear for several")
        _, tuned = endpoints(inputs)
        (alpha,) = check_numbers(WHERE, (self._alpha(),), "alpha")
        return Mixture((inputs.base, *tuned), (1 - alpha, alpha))

    def _chosen(self, inputs: MergeInputs) -> Model:
        from mergekit_vl.models.choices import Choice
        from mergekit_vl.models.evaluate import mean_quality

        tasks, store = inputs.to_choose_on(WHERE, "give alpha as a number"), inputs.features
        if endpoints(inputs)[0].adapter.about.reads == "images":
            store = store.temporary()  # a tower an alpha: its features are looked at once
        models = (
            replace(replace(self, alpha=alpha)._at_alpha(inputs), choice=Choice({"alpha": alpha})) for alpha in ALPHAS
        )
        return max(models, key=lambda model: mean_quality(model, tasks, store))

    def _alpha(self) -> Coefficient:
        if isinstance(self.alpha, str):
            raise UserError(
                "alpha=validation needs images", where=WHERE, hint="give a number, or use it in `mergekit-vl run`"
            )
        return self.alpha

    def merge_chunk(self, chunk: Chunk, stats: object) -> Array:
        alpha = chunk.at(self._alpha())
        return weighted_sum(chunk.members, (1 - alpha, alpha))
