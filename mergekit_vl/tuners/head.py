"""Where linear heads start."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from mergekit_vl.adapters.linear_head import LinearHead, Unseen, class_means, zero_shot
from mergekit_vl.errors import UserError
from mergekit_vl.models.model import ImageEncoder

if TYPE_CHECKING:
    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.inputs import MergeInputs

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
