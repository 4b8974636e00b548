"""The greedy soup (Wortsman et al. 2022, "Model soups", arXiv 2203.05482, recipe 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mergekit_vl.models.choices import Choice
from mergekit_vl.models.evaluate import mean_quality
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.models.model import Model, Single
from mergekit_vl.strategies.in_memory import merge_adapters
from mergekit_vl.strategies.uniform_soup import UniformSoup

WHERE = "strategy greedy_soup"


@dataclass(frozen=True)
class GreedySoup:
    """The mean of the tuned models that help: from the best on, each goes in if the mean is then no worse on the validation images.

    Accuracy is the mean over the tuned models' tasks (of checkpoints: over all data sets) of their validation splits; the test split is never read. Models of equal
    accuracy keep the order of the recipe.
    """

    def merge(self, inputs: MergeInputs) -> Model:
        tasks = inputs.to_choose_on(WHERE, "give the dataset a val split")

        def soup(models: Sequence[Model]) -> Single:
            return merge_adapters(UniformSoup(), replace(inputs, tuned=tuple(models)))

        def accuracy(model: Model) -> float:
            return mean_quality(model, tasks, inputs.features)[0]

        alone = [accuracy(model) for model in inputs.tuned]
        order = sorted(range(len(alone)), key=lambda i: -alone[i])
        chosen = order[:1]
        best, merged = alone[order[0]], soup([inputs.tuned[order[0]]])
        for i in order[1:]:
            trial = soup([inputs.tuned[j] for j in (*chosen, i)])
            score = accuracy(trial)
            if score >= best:
                chosen.append(i)
                best, merged = score, trial
        return replace(merged, choice=Choice({"ingredients": [inputs.names[i] for i in chosen]}))
