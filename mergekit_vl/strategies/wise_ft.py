"""WiSE-FT (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv 2109.01903, eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mergekit_vl.coefficients import Coefficient
from mergekit_vl.dtypes import Array
from mergekit_vl.errors import Unsuitable
from mergekit_vl.model import Mixture, Model
from mergekit_vl.options import option
from mergekit_vl.pieces import Models, Piece
from mergekit_vl.strategy import MergeInputs
from mergekit_vl.task_vectors import weighted_sum
from mergekit_vl.weights import anchors, check_numbers, check_own_space, merge_adapters


@dataclass(frozen=True)
class WiseFT:
    """(1 - alpha) * zero-shot + alpha * fine-tuned. One tuned model; the report shows the whole line of coefficients."""

    alpha: Coefficient = option(0.5, "0 is zero-shot, 1 is fine-tuned")
    space: Literal["own", "features"] = option(
        "own", "merge the tensors, or the classifiers that they make (`run` only)"
    )

    grid = {"space": ("own", "features"), "alpha": (0.3, 0.5, 0.7, 0.9)}

    form, averages = "accumulating", True

    def held(self, n: int) -> int:
        return 3

    def check(self, models: Models) -> None:
        check_own_space("strategy wise_ft", self.space)
        models.check_count("strategy wise_ft", at_most=1, base=True)
        models.check_coefficient("strategy wise_ft", self.alpha, "alpha")

    def merge(self, inputs: MergeInputs) -> Model:
        if self.space == "own":
            return merge_adapters(self, inputs)
        _, tuned = anchors(inputs)
        if len(tuned) != 1:
            raise Unsuitable(
                f"1 tuned model, not {len(tuned)}", where="strategy wise_ft", mend="use linear for several"
            )
        (alpha,) = check_numbers("strategy wise_ft", (self.alpha,), "alpha")
        return Mixture((inputs.base, tuned[0]), (1 - alpha, alpha))

    def merge_piece(self, piece: Piece, facts: Any) -> Array:
        alpha = piece.at(self.alpha)
        return weighted_sum(piece.members(), (1 - alpha, alpha))
