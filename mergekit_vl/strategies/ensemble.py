"""Output ensembling: the average of the members' probabilities, or of their logits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mergekit_vl.errors import Unsuitable
from mergekit_vl.models.calibration import temperature
from mergekit_vl.models.choices import Choice
from mergekit_vl.models.evaluate import logits_of, quality, score
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.models.model import Ensemble, Model
from mergekit_vl.options import option
from mergekit_vl.strategies.weights import check_mixture, one_each

WHERE = "strategy ensemble"
STEPS = {2: 20, 3: 10, 4: 10}
"""By the number of models: weights are chosen among the multiples of 1 / steps."""


@dataclass(frozen=True)
class OutputEnsemble:
    """log sum_i w_i * softmax(z_i / T_i), or sum_i w_i * z_i / T_i, of the logits z_i of zero-shot and of the tuned models.

    Its inference cost is the sum of its members' costs. T_i is 1, or with `calibrated` the temperature with the least negative
    log-likelihood on the validation images (Guo et al. 2017, arXiv 1706.04599, section 4.2), between 0.1 and 100. Weights that
    validation chooses lie on a grid, in steps of 0.05 for two models and of 0.1 for three or four: the best accuracy, then the least
    negative log-likelihood, then the first in the order of growing weights of the first models. The test split is never read.
    """

    weights: tuple[float, ...] | Literal["validation"] = option(
        (), "one per model, zero-shot first; empty: all equal; validation: chosen on validation images"
    )
    average: Literal["probabilities", "logits"] = option("probabilities", "what is averaged")
    calibrated: bool = option(False, "a temperature per model, fitted on validation images")

    @staticmethod
    def grid(models: int) -> dict[str, Sequence[object]]:
        """Shares of zero-shot, the tuned models sharing the rest."""
        weights = [(share, *((1 - share) / models,) * models) for share in (0.3, 0.5, 0.7, 0.9)]
        return {"average": ("probabilities", "logits"), "weights": weights}

    def merge(self, inputs: MergeInputs) -> Model:
        members = (inputs.base, *inputs.tuned)
        if not inputs.tuned:
            raise Unsuitable(
                "there is nothing to ensemble zero-shot with", where=WHERE, hint="name a model under `tuned`"
            )
        if isinstance(self.weights, str):
            if len(members) not in STEPS:
                raise Unsuitable(
                    f"weights of {len(members)} models are not searched for",
                    where=WHERE,
                    hint=f"give {len(members)} weights, or ensemble at most {max(STEPS) - 1} tuned models",
                )
            candidates = tuple(simplex(len(members), STEPS[len(members)]))
        else:
            weights = one_each(WHERE, self.weights, len(members), "zero-shot first, then one per tuned model")
            check_mixture(WHERE, weights)
            candidates = (tuple(w / sum(weights) for w in weights),)
        if len(candidates) == 1 and not self.calibrated:
            return Ensemble(members, candidates[0], self.average)
        return self._chosen(inputs, members, candidates)

    def _chosen(
        self, inputs: MergeInputs, members: tuple[Model, ...], candidates: tuple[tuple[float, ...], ...]
    ) -> Ensemble:
        import torch

        task = inputs.validated(WHERE, "give the weights and set calibrated=false")
        given = [logits_of(member, task.classes, task.val, inputs.features) for member in members]
        logits, labels = torch.stack([logits for logits, _, _ in given]), given[0][1]
        temperatures = tuple(temperature(z, labels) for z in logits) if self.calibrated else ()
        ensembles = (Ensemble(members, weights, self.average, temperatures) for weights in candidates)
        best = max(ensembles, key=lambda ensemble: quality(score(ensemble.mix(logits), labels)))
        told = {"weights": list(best.weights)} if len(candidates) > 1 else {}
        return replace(best, choice=Choice(told | ({"temperatures": list(temperatures)} if temperatures else {})))


def simplex(n: int, steps: int) -> Iterator[tuple[float, ...]]:
    """All n weights that sum to 1 and are multiples of 1 / steps, in the order of growing weights of the first."""
    counts = itertools.product(range(steps + 1), repeat=n)
    return (tuple(count / steps for count in chosen) for chosen in counts if sum(chosen) == steps)
