"""The loop that moves a context: CoOp, KgCoOp and MergeTune differ only in the loss they give it.

Views are features [E, N, D] computed once; a step is one text forward and backward and no image forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergekit_vl.data import Augment
from mergekit_vl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.adapters.prompt import Prompt
    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.model import Classes
    from mergekit_vl.strategy import MergeInputs

    Encode = Callable[[Tensor], Tensor]
    """Context [M, W], [K, M, W] or [S, K, M, W] -> raw text features [K, D] or [S, K, D] of the task's classes."""
    Loss = Callable[[Encode, Tensor, Tensor, Tensor], Tensor]
    """(encode, context, images [B, D] normalised, labels [B]) -> scalar. It calls `encode` once: a step is one text forward."""


@dataclass(frozen=True)
class Schedule:
    """SGD as the field's code (Dassl) runs it: momentum 0.9, weight decay 5e-4, cosine by epoch after one epoch at 1e-5."""

    epochs: int
    batch: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_lr: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "lr"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)}", mend="it must be positive")

    def lr_at(self, epoch: int) -> float:
        if epoch == 0 and self.epochs > 1:
            return self.warmup_lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * max(epoch - 1, 0) / self.epochs))


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

    from mergekit_vl.model import ImagePath

    data = inputs.data[0]
    views = inputs.features.views(
        ImagePath(backbone), data.train, epochs=schedule.epochs, seed=inputs.seed, augment=augment
    )
    views = F.normalize(views, dim=-1).to(backbone.device)
    labels = torch.from_numpy(data.train.labels).to(backbone.device)
    n = len(labels)
    encode = encoder(backbone, data.classes, start)
    ctx = start.ctx.detach().clone().requires_grad_(True)
    optimizer = torch.optim.SGD([ctx], lr=schedule.lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay)
    shuffle = torch.Generator().manual_seed(inputs.seed)
    for epoch in range(schedule.epochs):
        optimizer.param_groups[0]["lr"] = schedule.lr_at(epoch)
        for rows in torch.randperm(n, generator=shuffle).to(backbone.device).split(schedule.batch):
            if len(rows) < schedule.batch <= n:
                continue  # the field drops the last batch, except where it is the only one
            value = loss(encode, ctx, views[epoch, rows], labels[rows])
            if not torch.isfinite(value):
                raise UserError(
                    f"the loss of {what} is {value.item()} in epoch {epoch + 1}",
                    where=what,
                    mend=f"lower lr (now {schedule.lr})",
                )
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        inputs.progress(epoch + 1, schedule.epochs, what)
    return replace(start, ctx=ctx.detach())


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
