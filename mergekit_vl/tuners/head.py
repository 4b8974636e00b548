"""Where linear heads start, and the loop that moves one: linear probing and MergeTune differ in the loss they give it.

Weight and bias are one matrix w [K, D + 1] here, and features have a last column of ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from mergekit_vl.adapters.linear_head import LinearHead, Unseen, class_means, zero_shot
from mergekit_vl.errors import UserError
from mergekit_vl.models.model import ImageEncoder
from mergekit_vl.tuners.sgd import descend

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.inputs import MergeInputs
    from mergekit_vl.tuners.sgd import Schedule

    Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
    """(w [K, D + 1], features [B, D + 1], labels [B]) -> scalar."""

Init = Literal["zero_shot", "class_mean", "random", "own"]


def start_head(backbone: Backbone, inputs: MergeInputs, init: Init | None, unseen: Unseen = "refuse") -> LinearHead:
    """The head that tuning begins with: by default zero-shot where there is a text tower, else the class means of the shots.

    `random` draws weights with standard deviation 0.01 and no bias; `own` takes the classifier that the backbone came with.
    """
    import torch

    data = inputs.data[0]
    init = init or ("zero_shot" if backbone.text is not None else "class_mean")
    if unseen == "zero_shot":
        backbone.require_text()
    normalise = backbone.text is not None
    if init == "zero_shot":
        backbone.require_text()
        with torch.no_grad():
            head = zero_shot(backbone, data.classes)
    elif init == "own":
        own = backbone.classifier
        if own is None or len(own.weight) != len(data.classes.names):
            has = "no classifier" if own is None else f"one of {len(own.weight)} classes"
            raise UserError(
                f"init=own: {backbone.spec} came with {has}, the data set has {len(data.classes.names)}",
                hint="use init=class_mean or init=random",
            )
        head = LinearHead(own.weight.to(backbone.device), own.bias.to(backbone.device), data.classes.names, False)
    else:
        features = inputs.features.features(ImageEncoder(backbone), data.train)
        if init == "class_mean":
            head = class_means(features, torch.from_numpy(data.train.labels), data.classes, normalise=normalise)
        else:
            draw = torch.Generator().manual_seed(inputs.seed)
            weight = 0.01 * torch.randn(len(data.classes.names), features.shape[1], generator=draw)
            head = LinearHead(weight, torch.zeros(len(weight)), data.classes.names, normalise)
        head = head.to(backbone.device)
    head = replace(head, unseen=unseen)
    return replace(head, start=head)


def matrix(head: LinearHead) -> Tensor:
    """[weight, bias] as [K, D + 1]."""
    import torch

    return torch.cat([head.weight, head.bias[:, None]], 1)


def with_matrix(head: LinearHead, w: Tensor) -> LinearHead:
    w = w.detach().to(head.weight)
    return replace(head, weight=w[:, :-1].contiguous(), bias=w[:, -1].contiguous())


def inputs_of(head: LinearHead, features: Tensor) -> Tensor:
    """Features [..., D] as the head reads them, with the ones [..., D + 1]."""
    import torch
    import torch.nn.functional as F

    x = F.normalize(features, dim=-1) if head.normalise else features
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def mean_square(x: Tensor) -> Tensor:
    """Mean squared length of the rows: the unit of step sizes and penalties, so that neither depends on the scale of features."""
    return x.square().sum(-1).mean()


def fit_head(
    start: LinearHead, views: Tensor, labels: Tensor, schedule: Schedule, loss: Loss, inputs: MergeInputs, *, what: str
) -> LinearHead:
    """Minimise `loss` over the head by SGD, from `start`; epoch e sees views[e % E] of views [E, N, D].

    The schedule's lr is in units of 1 / mean |x|^2. Raises UserError if the loss stops being finite.
    """
    x = inputs_of(start, views.to(start.weight.device))
    labels = labels.to(x.device)

    def of_batch(w: Tensor, epoch: int, rows: Tensor) -> Tensor:
        return loss(w, x[epoch % len(x), rows], labels[rows])

    unit = mean_square(x).item()
    return with_matrix(start, descend(matrix(start), len(labels), schedule, of_batch, inputs, what=what, unit=unit))
