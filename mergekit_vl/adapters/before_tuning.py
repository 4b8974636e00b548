"""The model before fine-tuning: zero-shot, or what stands in its place where a backbone has no text tower."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_vl.adapters.linear_head import LinearHead, class_means
from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.errors import UserError
from mergekit_vl.models.classifier import ImageEncoder
from mergekit_vl.models.model import Single

if TYPE_CHECKING:
    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.features import FeatureStore
    from mergekit_vl.models.inputs import TaskData


def of_backbone(backbone: Backbone) -> Single:
    """The backbone as it is: zero-shot, or the classifier that an image classifier came with, over the classes it is asked for."""
    if backbone.text is not None:
        return Single(backbone, ZeroShot())
    own = backbone.classifier
    if own is None:
        raise UserError(
            "an image classifier without a classifier of its own", where=backbone.spec, hint="give it a checkpoint"
        )
    return Single(backbone, LinearHead(own.weight, own.bias, (), normalise=False).to(backbone.device))


def of_task(backbone: Backbone, data: TaskData, store: FeatureStore) -> Single:
    """Zero-shot, or the nearest class mean of the training images."""
    import torch

    if backbone.text is not None:
        return Single(backbone, ZeroShot())
    features = store.features(ImageEncoder(backbone), data.train)
    head = class_means(features, torch.from_numpy(data.train.labels), data.classes, normalise=False)
    return Single(backbone, head.to(backbone.device))
