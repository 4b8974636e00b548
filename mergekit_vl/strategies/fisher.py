"""Fisher-weighted averaging (Matena & Raffel 2022, arXiv 2111.09832, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_vl.checkpoints.torch_io import cast, check_finite
from mergekit_vl.errors import Failed, Unsuitable
from mergekit_vl.estimators import fisher_information
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.models.model import Model
from mergekit_vl.options import check, check_effect, option
from mergekit_vl.strategies.in_memory import as_model, endpoints
from mergekit_vl.strategies.weights import check_mixture, one_each

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = Mapping[str, Tensor]

WHERE = "strategy fisher"


@dataclass(frozen=True)
class Fisher:
    """sum_i w_i F_i theta_i / sum_i w_i F_i, element by element; F_i is the diagonal Fisher information at theta_i on model i's own images.

    Of a prompt theta are the context vectors. The zero-shot point, where it takes part (`with_base`), has the mean of its information on
    the images of every task. Tensors without information (a text tower, running statistics) take the weighted mean without F.

    Departures: labels are the model's own as in the paper, but for contexts and towers one is drawn per image instead of the mean over all
    (of a head the mean is exact). The released code raises every F of the target model to at least 1e-6; here all models' are, and
    1e-6 is in units of the mean over models and elements, since few confident images give less than 1e-6 almost
    everywhere: where no model knows anything, the plain mean remains. It divides each model's F by its norm (`normalise=true`), and
    searches the weights on the validation data of the target task. A model that is sure of its images has little information, and one that
    is unsure of its own outweighs it, normalised or not: look at each task's accuracy.
    """

    weights: tuple[float, ...] = option(
        (), "one per tuned model, before them zero-shot's if with_base; empty: all equal"
    )
    with_base: bool = option(False, "the zero-shot point is one of the models", formerly="base")
    images: int = option(
        256, "training images of each estimate, at most, where each takes a backward (contexts, towers)"
    )
    floor: float = option(1e-6, "least information, in units of the mean")
    normalise: bool = option(False, "divide each model's information by its norm")

    grid = {"with_base": (False, True), "normalise": (False, True)}

    def __post_init__(self) -> None:
        check(self, where=WHERE, images=(self.images >= 1, "at least 1"), floor=(self.floor > 0, "above 0"))

    def merge(self, inputs: MergeInputs) -> Model:
        import torch

        zero_shot, tuned = endpoints(inputs)
        about = zero_shot.adapter.about
        why = f"on {about.many}: all images count"
        check_effect(self, ("images",), where=WHERE, why=why, read=not about.exact_fisher)
        models = (zero_shot, *tuned) if self.with_base else tuned
        if len(models) < 2:
            raise Unsuitable("one model alone", where=WHERE, hint="name another under `tuned`, or set with_base=true")
        weights = one_each(
            WHERE, self.weights, len(models), f"one per tuned model{', zero-shot first' * self.with_base}"
        )
        check_mixture(WHERE, weights)
        fishers: list[Tensors] = []
        if self.with_base:
            each = [fisher_information.of_model(zero_shot, task, inputs, self.images) for task in inputs.tasks]
            fishers.append({name: torch.stack([f[name] for f in each]).mean(0) for name in each[0]})
        for model, task in zip(tuned, inputs.data, strict=True):
            fishers.append(fisher_information.of_model(model, task, inputs, self.images))
        merged = self.average([m.adapter.tensors for m in models], fishers, weights)
        check_finite(merged, where=WHERE, hint="use smaller weights")
        return as_model(zero_shot, merged, inputs)

    def average(self, thetas: list[Tensors], fishers: list[Tensors], weights: tuple[float, ...]) -> dict[str, Tensor]:
        """Of tensors and their information by name."""
        import torch

        if self.normalise:
            norms = [sum(t.double().square().sum() for t in f.values()) ** 0.5 for f in fishers]
            fishers = [{name: t / norm for name, t in f.items()} for f, norm in zip(fishers, norms) if norm > 0]
        total = sum(float(t.double().sum()) for f in fishers for t in f.values())
        if len(fishers) < len(thetas) or not 0 < total < float("inf"):
            kind = Failed if not total < float("inf") else Unsuitable
            raise kind(
                "the Fisher information is zero or not finite: a model is certain of every one of its images",
                where=WHERE,
                hint="give more images, or use linear",
            )
        least = self.floor * total / sum(t.numel() for f in fishers for t in f.values())
        merged = {}
        for name, like in thetas[0].items():
            ones = torch.ones_like(like, dtype=torch.float64)
            shares = [w * (f[name].double().clamp_min(least) if name in f else ones) for w, f in zip(weights, fishers)]
            nothing = torch.zeros((), dtype=torch.float64)
            top = sum((share * theta[name].double() for share, theta in zip(shares, thetas)), nothing)
            mean = top / sum(shares, nothing)
            merged[name] = cast(mean, like.dtype, name=name, where=WHERE).to(like)
        return merged
