"""The loop that moves a context: CoOp, KgCoOp and MergeTune differ only in the loss they give it.

Views are features [E, N, D] computed once; a step is one text forward and backward and no image forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from mergekit_vl.datasets.base import Augment
from mergekit_vl.tuners.graphs import graphed
from mergekit_vl.tuners.sgd import Schedule, descend

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.adapters.prompt import Prompt
    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.inputs import MergeInputs
    from mergekit_vl.models.model import Classes

    Encode = Callable[[Tensor], Tensor]
    """Context [M, W], [K, M, W] or [S, K, M, W] -> raw text features [K, D] or [S, K, D] of the task's classes."""
    Loss = Callable[[Encode, Tensor, Tensor, Tensor], Tensor]
    """(encode, context, images [B, D] normalised, labels [B]) -> scalar. It calls `encode` once: a step is one text forward."""


def fit_context(
    backbone: Backbone,
    start: Prompt,
    inputs: MergeInputs,
    schedule: Schedule,
    augment: Augment,
    loss: Loss,
    *,
    what: str,
) -> Prompt:
    """Minimise `loss` over the context, from `start`, on the few-shot images of the first task of `inputs`.

    Raises UserError if the loss stops being finite.
    """
    import torch
    import torch.nn.functional as F

    from mergekit_vl.models.model import ImageEncoder

    data = inputs.data[0]
    views = inputs.features.views(
        ImageEncoder(backbone), data.train, epochs=schedule.epochs, seed=inputs.seed, augment=augment
    )
    views = F.normalize(views, dim=-1).to(backbone.device)
    labels = torch.from_numpy(data.train.labels).to(backbone.device)
    encode = encoder(backbone, data.classes, start)
    if backbone.device.startswith("cuda") and backbone.require_text().capturable:
        encode = graphed(encode)

    def of_batch(ctx: Tensor, epoch: int, rows: Tensor) -> Tensor:
        return loss(encode, ctx, views[epoch, rows], labels[rows])

    return replace(start, ctx=descend(start.ctx, len(labels), schedule, of_batch, inputs, what=what))


def encoder(backbone: Backbone, classes: Classes, prompt: Prompt) -> Encode:
    """The text tower as a function of the context alone: class names are tokenised once."""
    prompts = prompt.tokenize(backbone, classes)
    return lambda context: backbone.encode_prompts(prompts, context)


def cross_entropy(scale: Tensor, text: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """CE of scaled cosine logits; text [..., K, D] raw, images [B, D] normalised; the mean over leading dimensions and images."""
    import torch.nn.functional as F

    logits = scale * images @ F.normalize(text, dim=-1).transpose(-1, -2)  # [..., B, K]
    flat = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, labels.repeat(len(flat) // len(labels)))
