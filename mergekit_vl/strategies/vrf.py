"""VRF, variance reduction fine-tuning (Zhu, Cui & Zhang 2024, arXiv 2411.06966, sections 3 and 4)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergekit_vl.errors import Unsuitable
from mergekit_vl.models.by_distance import ByDistance, kth_distance
from mergekit_vl.models.calibration import temperature
from mergekit_vl.models.choices import Choice
from mergekit_vl.models.evaluate import logits_of, quality, score
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.models.model import Model
from mergekit_vl.options import check, option

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.models.inputs import TaskData

WHERE = "strategy vrf"
SHARE = 1 / 1280
"""Of the failure set, the rank of the neighbour whose distance counts: the released code's, on ImageNet."""
WIDTHS = (0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Vrf:
    """w(x) p_tuned + (1 - w(x)) p_zero_shot: near training images that zero-shot fails on, the fine-tuned model counts more.

    The failure set holds the fine-tuned model's normalised features of the training images where it is right and zero-shot is wrong;
    d(x) is the distance to its k-th nearest member, and w(x) = sigmoid(-(d(x) - a) / b). Where zero-shot fails nowhere, w = 0:
    zero-shot itself comes back. `a` and `b` are chosen on the validation images: a among the deciles of their distances, b
    among multiples (0.03 to 3) of their standard deviation, by accuracy, then by negative log-likelihood, then the first. The test split
    is never read.

    Departures. The released code has a=1.5, b=0.6 for ImageNet, in squared distances; d is the distance itself here, as the paper
    writes it, and a and b have no defaults. It calibrates both models so that their mean confidence is their accuracy on the
    images that it reports; here each gets the temperature of the least negative log-likelihood on validation (`calibrated`).
    Its k is 1/1280 of the failure set, at ImageNet's size; so it is here, at least 1. Validation images are of the
    training distribution: they say nothing about others, and a model that remembers its shots finds more failures than it mends.
    """

    k: int | None = option(None, "neighbour whose distance counts; none: 1/1280 of the failure set, at least 1")
    a: float | None = option(None, "distance at which both count alike; none: by validation")
    b: float | None = option(None, "width of the change; none: by validation")
    calibrated: bool = option(True, "a temperature for each of both models, fitted on validation images")

    grid = {"calibrated": (True, False)}

    def __post_init__(self) -> None:
        k, b = self.k is None or self.k >= 1, self.b is None or self.b > 0
        check(self, where=WHERE, k=(k, "at least 1"), b=(b, "above 0"))

    def merge(self, inputs: MergeInputs) -> Model:
        import torch

        tuned = inputs.only(WHERE, "merge or ensemble several first")
        near = self.failures(inputs)
        if not len(near):
            return inputs.base
        k = max(1, round(SHARE * len(near))) if self.k is None else self.k
        if k > len(near):
            raise Unsuitable(
                f"k={k}, and zero-shot fails on {len(near)} training images only", where=WHERE, hint=f"k={len(near)}"
            )
        members = (inputs.base, tuned)
        if self.a is not None and self.b is not None and not self.calibrated:
            return ByDistance(members, near, k, self.a, self.b)
        task = inputs.validated(WHERE, "give a and b and set calibrated=false")
        (first, labels, _), (second, _, _) = (logits_of(m, task.classes, task.val, inputs.features) for m in members)
        temperatures = (temperature(first, labels), temperature(second, labels)) if self.calibrated else (1.0, 1.0)
        distances = kth_distance(inputs.features.features(members[1].encoders[0], task.val), near, k)
        spread = float(distances.double().std(correction=0)) or 1.0
        deciles = torch.quantile(distances.double(), torch.linspace(0, 1, 11, dtype=torch.float64)).tolist()
        models = (
            ByDistance(members, near, k, a, b, temperatures)
            for a in (deciles if self.a is None else [self.a])
            for b in ([width * spread for width in WIDTHS] if self.b is None else [self.b])
        )
        best = max(models, key=lambda model: quality(score(model.mix(first, second, distances), labels)))
        told = ({"a": best.a} if self.a is None else {}) | ({"b": best.b} if self.b is None else {})
        return replace(best, choice=Choice(told | ({"temperatures": list(temperatures)} if self.calibrated else {})))

    def failures(self, inputs: MergeInputs) -> Tensor:
        """The fine-tuned model's features [N, D], normalised, of the training images where it is right and zero-shot wrong."""
        import torch.nn.functional as F

        task: TaskData = inputs.data[0]
        (first, labels, _), (second, _, _) = (
            logits_of(m, task.classes, task.train, inputs.features) for m in (inputs.base, inputs.tuned[0])
        )
        failed = (second.argmax(-1) == labels) & (first.argmax(-1) != labels)
        return F.normalize(inputs.features.features(inputs.tuned[0].encoders[0], task.train)[failed], dim=-1)
