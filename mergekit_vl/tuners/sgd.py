"""Stochastic gradient descent as the field's code runs it, a step at a time: what moves contexts and heads.

for step in sgd(...):
    with step:
        step.minimise(cross_entropy(network(step.weights, step.x), step.labels))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

from mergekit_vl.errors import Failed
from mergekit_vl.options import Options, check

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int
    from torch import Tensor

    from mergekit_vl.models.inputs import MergeInputs
    from mergekit_vl.reporter import Reporter

Warmup = Literal["constant", "linear"]
RISEN = 1.05
"""Times the loss of the first pass: images are seen in other crops, so a little more is no sign."""
CONSTANT = 1e-5
"""The rate of the field's warm-up."""


@dataclass(frozen=True)
class Schedule:
    """SGD as the field's code (Dassl) runs it: momentum 0.9, weight decay 5e-4, cosine by epoch after one epoch of warm-up.

    The field's warm-up is `constant`, 1e-5: next to nothing moves, but the momentum sums that epoch's gradients, and the first step
    at the full rate takes them all at once. Cross-entropy alone has small gradients and bears it; an objective with a gradient of
    10 throws the weights far away. `linear` rises to the full rate step by step. With `longest` gradients are clipped so that no step at the full rate, momentum
    included, is longer than that.
    """

    epochs: int
    batch: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: Warmup = "constant"
    longest: float | None = None

    def __post_init__(self) -> None:
        check_positive(self)

    def takes(self, images: int, *, of: int) -> bool:
        """Whether a batch of so many images is trained on: the field drops the last one, except where it is the only one."""
        return images >= min(self.batch, of)

    def lr_at(self, epoch: int, done: float = 1.0) -> float:
        """In the step with which the share `done` of the epoch is done."""
        if epoch == 0 and self.epochs > 1:
            return CONSTANT if self.warmup == "constant" else self.lr * done
        return self.lr * 0.5 * (1 + math.cos(math.pi * max(epoch - 1, 0) / self.epochs))


class Positive(Options, Protocol):
    """What every schedule has."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def lr(self) -> float: ...


def check_positive(schedule: Positive) -> None:
    """Raise UserError for a schedule of no epochs, of empty batches or without a learning rate."""
    hint = "it must be positive"
    check(schedule, epochs=(schedule.epochs > 0, hint), batch=(schedule.batch > 0, hint), lr=(schedule.lr > 0, hint))


@dataclass
class Step:
    """One batch: what moves, what is seen, what is minimised. `with step:` ends with the optimiser's step."""

    weights: Mapping[str, Tensor]
    x: Tensor
    """Prepared inputs of B images (`Network.prepare`)."""
    labels: Tensor
    """[B]"""
    draw: torch.Generator
    """For what a loss draws."""
    end: Callable[[Tensor], None]
    loss: Tensor | None = None

    def minimise(self, term: Tensor) -> None:
        """Add a term to the loss. The terms share a graph, so they run backward together, at the end."""
        self.loss = term if self.loss is None else self.loss + term

    def __enter__(self) -> Step:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None and self.loss is not None:
            self.end(self.loss)


def sgd(
    weights: Mapping[str, Tensor],
    x: Tensor,
    labels: Tensor,
    schedule: Schedule,
    inputs: MergeInputs,
    *,
    what: str,
    unit: float = 1.0,
) -> Iterator[Step]:
    """The steps of `schedule` over these leaves; epoch e sees x[e % E] of prepared inputs [E, N, ...]. lr is in units of 1 / `unit`.

    Raises UserError if a loss is not finite.
    """
    import torch

    optimizer = torch.optim.SGD(
        list(weights.values()), lr=1.0, momentum=schedule.momentum, weight_decay=schedule.weight_decay
    )
    shuffle = torch.Generator().manual_seed(inputs.seed)
    draw = torch.Generator().manual_seed(inputs.seed + 1)
    losses: list[list[Tensor]] = [[] for _ in range(schedule.epochs)]
    longest = None if schedule.longest is None else schedule.longest * (1 - schedule.momentum) / (schedule.lr / unit)

    def end(loss: Tensor, epoch: int, lr: float) -> None:
        check_loss(loss, what, epoch, schedule.lr)
        losses[epoch].append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        if longest is not None:
            torch.nn.utils.clip_grad_norm_(list(weights.values()), longest)
        optimizer.param_groups[0]["lr"] = lr / unit
        optimizer.step()

    for epoch in range(schedule.epochs):
        order = torch.randperm(len(labels), generator=shuffle).to(labels.device)
        batches = [rows for rows in order.split(schedule.batch) if schedule.takes(len(rows), of=len(labels))]
        for i, rows in enumerate(batches):
            step = partial(end, epoch=epoch, lr=schedule.lr_at(epoch, (i + 1) / len(batches)))
            yield Step(weights, x[epoch % len(x), rows], labels[rows], draw, step)
        inputs.reporter.progress(epoch + 1, schedule.epochs, what)
    _tell_of(losses, len(labels), schedule, inputs.reporter, what)


def _tell_of(
    losses: Sequence[Sequence[Tensor]], images: int, schedule: Schedule, reporter: Reporter, what: str
) -> None:
    """Images that no pass saw, and a loss that rose."""
    import torch

    passes, left = divmod(images, schedule.batch)
    if passes and left:
        reporter.tell(
            f"{what}: a pass has {passes} steps of {schedule.batch} images; {left} of {images} images are left out of it, as in CoOp's code"
        )
    if not losses or not losses[-1]:
        return
    first, last = (float(torch.stack(list(part)).mean()) for part in (losses[0], losses[-1]))
    if last > RISEN * first:
        reporter.warn(
            f"{what}: the loss rose from {first:.3f} in the first pass to {last:.3f} in the last: lower lr (now {schedule.lr:g})"
        )


def check_loss(value: Tensor, what: str, epoch: int, lr: float, *, unit: str = "epoch") -> None:
    """Raise UserError for a loss that is not finite."""
    if not value.isfinite():
        raise Failed(
            f"the loss of {what} is {value.item()} in {unit} {epoch + 1}", where=what, hint=f"lower lr (now {lr})"
        )


def cross_entropy(logits: Float[Tensor, "*S B K"], labels: Int[Tensor, " B"]) -> Float[Tensor, ""]:
    """Of logits [..., B, K] and labels [B]: the mean over images and leading dimensions."""
    import torch.nn.functional as F

    if logits.ndim == 2:  # nothing to be copied in a step that is short
        return F.cross_entropy(logits, labels)
    flat = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, labels.repeat(len(flat) // len(labels)))
