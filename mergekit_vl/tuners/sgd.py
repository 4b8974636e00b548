"""Stochastic gradient descent over one tensor, as the field's code runs it: what moves contexts and heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_vl.errors import Failed, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.models.inputs import MergeInputs


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
                raise UserError(f"{name}={getattr(self, name)}", hint="it must be positive")

    def lr_at(self, epoch: int) -> float:
        if epoch == 0 and self.epochs > 1:
            return self.warmup_lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * max(epoch - 1, 0) / self.epochs))


def descend(
    start: Tensor,
    n: int,
    schedule: Schedule,
    loss: Callable[[Tensor, int, Tensor], Tensor],
    inputs: MergeInputs,
    *,
    what: str,
    unit: float = 1.0,
) -> Tensor:
    """The tensor after `schedule`, from `start`; loss(tensor, epoch, rows) is that of some of n images. lr is in units of 1 / `unit`.

    Raises UserError if the loss stops being finite.
    """
    import torch

    w = start.detach().clone().requires_grad_(True)
    optimizer = torch.optim.SGD([w], lr=1.0, momentum=schedule.momentum, weight_decay=schedule.weight_decay)
    shuffle = torch.Generator().manual_seed(inputs.seed)
    for epoch in range(schedule.epochs):
        optimizer.param_groups[0]["lr"] = schedule.lr_at(epoch) / unit
        for rows in torch.randperm(n, generator=shuffle).to(w.device).split(schedule.batch):
            if len(rows) < schedule.batch <= n:
                continue  # the field drops the last batch, except where it is the only one
            value = loss(w, epoch, rows)
            check_loss(value, what, epoch, schedule.lr)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        inputs.progress(epoch + 1, schedule.epochs, what)
    return w.detach()


def check_loss(value: Tensor, what: str, epoch: int, lr: float, *, unit: str = "epoch") -> None:
    """Raise UserError for a loss that is not finite."""
    if not value.isfinite():
        raise Failed(
            f"the loss of {what} is {value.item()} in {unit} {epoch + 1}", where=what, hint=f"lower lr (now {lr})"
        )
