"""RegMean, regression mean (Jin et al. 2023, arXiv 2212.09849, eq. 2 and 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_vl.checkpoints.torch_io import check_finite
from mergekit_vl.errors import Unsuitable
from mergekit_vl.estimators.fisher_information import some
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.models.model import Model, Single
from mergekit_vl.options import check, check_effect, option
from mergekit_vl.strategies.in_memory import as_model, endpoints

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mergekit_vl.estimators.gram import Gram
    from mergekit_vl.models.inputs import TaskData

WHERE = "strategy regmean"
RIDGE = 1e-6
"""In units of the mean diagonal of the sum of the Gram matrices."""


@dataclass(frozen=True)
class RegMean:
    """W = sum_i W_i G_i (sum_i G_i)^-1 for each linear map: the least squared change of every model's outputs on its own images.

    G_i = X_i^T X_i of what the map reads in model i, its off-diagonal elements times `alpha`. In a tower the maps are all products
    with a weight in the image tower (`grams.py`: linear layers, the attention's projections, convolutions whose windows do not
    overlap) and the weights of a linear head; of a head alone, its weights. Everything else takes the plain mean: biases, norms,
    position embeddings, depthwise and overlapping convolutions, a text tower. Zero-shot is not one of the models.

    The paper takes alpha 0.9 for most models; the released settings have 0.1 for DeBERTa. Departures: G_i is divided by the number of
    rows, so that a task with more images does not weigh more (implementations differ in this). The solution is found as the plain
    mean plus a correction, with a ridge of 1e-6 of the mean diagonal: in directions that no image reaches, the plain mean
    remains. The paper has linear layers alone; the bare projections and the convolutions are ours. Heads over the same images are
    averaged: all their G_i are the same.
    """

    alpha: float = option(0.9, "off-diagonal elements are multiplied by it")
    images: int = option(256, "training images of each model, at most, where a tower reads them")

    grid = {"alpha": (0.1, 0.3, 0.5, 0.7, 0.8, 1.0)}

    def __post_init__(self) -> None:
        check(
            self, where=WHERE, alpha=(0 <= self.alpha <= 1, "between 0 and 1"), images=(self.images >= 1, "at least 1")
        )

    def merge(self, inputs: MergeInputs) -> Model:
        import torch

        zero_shot, tuned = endpoints(inputs)
        about = zero_shot.adapter.about
        if about.reads == "features":
            if not about.linear:
                raise Unsuitable(
                    f"{about.one} has no linear map of image features",
                    where=WHERE,
                    hint="tune heads or towers, or use linear or fisher",
                )
            check_effect(self, ("images",), where=WHERE, why=f"on {about.many}: all images count")
        if len(tuned) < 2:
            raise Unsuitable("one model alone", where=WHERE, hint="name another under `tuned`")
        tensors = [m.adapter.tensors for m in tuned]
        merged = {n: torch.stack([t[n].double() for t in tensors]).mean(0).to(t) for n, t in tensors[0].items()}
        sums: dict[str, Tensor] = {}
        moves: dict[str, Tensor] = {}
        transposed: dict[str, bool] = {}
        for model, task in zip(tuned, inputs.data, strict=True):
            for name, gram in self._grams(model, task, inputs).items():
                shrunk, transposed[name] = shrink(gram.mean, self.alpha), gram.transposed
                apart = model.adapter.tensors[name] - merged[name]
                apart = apart if gram.transposed else apart.flatten(1).T  # [in, out]
                sums[name] = sums.get(name, 0) + shrunk
                moves[name] = moves.get(name, 0) + shrunk @ apart.to(shrunk)
        for name, total in sums.items():
            move = solve(total, moves[name])  # [in, out]
            merged[name] += (move if transposed[name] else move.T).reshape(merged[name].shape).to(merged[name])
        check_finite(merged, where=WHERE, hint="use smaller weights")
        return as_model(zero_shot, merged, inputs)

    def _grams(self, model: Single, task: TaskData, inputs: MergeInputs) -> dict[str, Gram]:
        """Of each linear map of one model on its own images: those that an image tower is seen to have, and those of its features."""
        from mergekit_vl.estimators import gram

        if model.adapter.about.reads == "features":
            found: dict[str, Gram] = {}
            features = inputs.features.features(model.encoders[0], task.train)
        else:
            rows = some(inputs, len(task.train), self.images).tolist()
            found, features = gram.of_tower(model, task.train, rows, inputs.reporter)
        for name, x in model.adapter.linear_maps(features).items():
            found[name] = gram.Gram(x.T @ x, len(x), transposed=False)
        return {name: each for name, each in found.items() if name in model.adapter.tensors}


def shrink(gram: Float[Tensor, "d d"], alpha: float) -> Float[Tensor, "d d"]:
    """Off-diagonal elements times alpha."""
    return alpha * gram + (1 - alpha) * gram.diagonal().diag()


def solve(gram: Float[Tensor, "d d"], right: Float[Tensor, "d o"]) -> Float[Tensor, "d o"]:
    """(gram + ridge)^-1 right."""
    import torch

    gram = gram.double()
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-30)
    solved: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), right.double())
    return solved
