"""The evaluator: `evaluate` scores every model of every method on a split."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mergekit_vl.models.model import image_encoders

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from mergekit_vl.datasets.base import Split
    from mergekit_vl.models.features import FeatureStore
    from mergekit_vl.models.inputs import Validation
    from mergekit_vl.models.model import Classes, Model

ECE_BINS = 15


@dataclass(frozen=True)
class Scores:
    """Fractions in 0..1; `low` and `high` are the 95% Wilson interval of acc1."""

    n: int
    acc1: float
    low: float
    high: float
    acc5: float
    mean_per_class_recall: float
    nll: float
    ece: float


class Evaluation(NamedTuple):
    scores: Scores
    seconds: float
    """Seconds per image from features to logits, with the head already bound."""
    right: Tensor
    """Whether each image was classified correctly, [B]."""
    answers: Tensor
    """The class of the highest logit of each image, [B]."""
    digest: str
    """Hash of the logits' bytes: equal for models with bit-equal logits."""


def evaluate(model: Model, classes: Classes, split: Split, store: FeatureStore) -> Evaluation:
    """Score a model on a split against `classes`."""
    logits, labels, seconds = logits_of(model, classes, split, store)
    digest = hashlib.sha256(logits.contiguous().numpy().data).hexdigest()[:16]
    answers = logits.argmax(-1)
    return Evaluation(score(logits, labels), seconds / max(len(split), 1), answers == labels, answers, digest)


def logits_of(
    model: Model, classes: Classes, split: Split, store: FeatureStore
) -> tuple[Float[Tensor, "B K"], Int[Tensor, " B"], float]:
    """Logits [B, K] of the images of a split and their labels [B], on the CPU; and the seconds from features to logits."""
    import torch

    encoders = image_encoders(model, classes)
    features = {each.key: store.features(each, split).to(each.backbone.device) for each in encoders}
    with torch.no_grad():
        head = model.bind(classes)
        began = time.perf_counter()
        logits = head(features).float().cpu()
    return logits, torch.from_numpy(split.labels), time.perf_counter() - began


def quality(scores: Scores) -> tuple[float, float]:
    """The key by which validation chooses: accuracy, then likelihood; `max` takes the first of equals."""
    return scores.acc1, -scores.nll


def mean_quality(model: Model, tasks: Sequence[Validation], store: FeatureStore) -> tuple[float, float]:
    """The same over the validation images of several tasks: the mean of each."""
    found = [quality(evaluate(model, task.classes, task.val, store).scores) for task in tasks]
    accuracy, likelihood = (sum(values) / len(tasks) for values in zip(*found))
    return accuracy, likelihood


def score(logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"]) -> Scores:
    """Scores of logits or log-probabilities [B, K] against labels [B]."""
    n, k = logits.shape
    log_p = logits.double().log_softmax(-1)
    top = log_p.topk(min(5, k), -1).indices
    right = top[:, 0] == labels
    recalls = [right[labels == c].double().mean().item() for c in labels.unique()]
    acc1 = right.double().mean().item()
    low, high = wilson(int(right.sum()), n)
    return Scores(
        n=n,
        acc1=acc1,
        low=low,
        high=high,
        acc5=(top == labels[:, None]).any(-1).double().mean().item(),
        mean_per_class_recall=sum(recalls) / len(recalls),
        nll=-log_p.gather(1, labels[:, None]).mean().item(),
        ece=calibration_error(log_p.exp().max(-1).values, right),
    )


def calibration_error(confidence: Float[Tensor, " B"], right: Bool[Tensor, " B"]) -> float:
    """Expected calibration error over 15 bins of equal width (Guo et al. 2017, eq. 3)."""
    bins = (confidence * ECE_BINS).ceil().clamp(1, ECE_BINS)
    total = 0.0
    for b in bins.unique():
        inside = bins == b
        total += inside.double().mean().item() * abs(
            right[inside].double().mean().item() - confidence[inside].mean().item()
        )
    return total


def wilson(hits: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% Wilson score interval of hits out of n."""
    p, z2 = hits / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)
