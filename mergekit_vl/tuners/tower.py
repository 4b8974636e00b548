"""The loop that moves an image tower, with or without a head: full fine-tuning and MergeTune differ in the losses they give it.

Parameters are leaves beside the frozen backbone, put in with `functional_call`; a killed training goes on after its last whole epoch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

from mergekit_vl.adapters import stored
from mergekit_vl.adapters.tower import HEAD, Tower
from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.datasets.base import Augment
from mergekit_vl.errors import Failed
from mergekit_vl.models.evaluate import evaluate
from mergekit_vl.models.model import ImageEncoder, Single
from mergekit_vl.models.views import prefetched, train_view
from mergekit_vl.system.memory import out_of_memory
from mergekit_vl.tuners.sgd import check_loss

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.inputs import MergeInputs
    from mergekit_vl.models.model import Classes

    Weights = Mapping[str, Tensor]
    Losses = Callable[["Forward", Weights, Tensor, Tensor], Iterable[Tensor]]
    """(forward, weights, images [B, 3, H, W], labels [B]) -> terms of the loss; each runs backward before the next is made."""


@dataclass(frozen=True)
class TowerSchedule:
    """AdamW with linear warm-up and a cosine by step to 0, gradients clipped at norm 1, as WiSE-FT's code trains."""

    epochs: int
    batch: int
    lr: float
    weight_decay: float = 0.1
    warmup: int = 500
    """Steps; at most a tenth of all."""
    accumulate: int = 1
    """Batches whose gradients make one step."""
    choose: Literal["last", "validation"] = "last"
    """The last epoch, or the best on validation images."""

    def lr_at(self, step: int, steps: int) -> float:
        warmup = min(self.warmup, steps // 10)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def fit_tower(
    backbone: Backbone,
    start: Tower,
    inputs: MergeInputs,
    schedule: TowerSchedule,
    augment: Augment,
    losses: Losses,
    *,
    what: str,
) -> Tower:
    """Minimise the sum of `losses` over the image tower and the head, from `start`, on the first task of `inputs`.

    A text tower stays as it is in `start`. Raises UserError if a loss stops being finite, and where memory ends.
    """
    data = inputs.data[0]
    forward = Forward(backbone, start, data.classes)
    training = _Training(forward, schedule)
    file = None if inputs.scratch is None else inputs.scratch / f"{what}.safetensors"
    batch = min(schedule.batch, len(data.train))
    batches = len(data.train) // batch  # the last, smaller batch is dropped, as the field does
    steps_an_epoch = math.ceil(batches / schedule.accumulate)
    steps = steps_an_epoch * schedule.epochs
    path = ImageEncoder(backbone)
    for epoch in range(training.restore(file), schedule.epochs):
        order = torch.randperm(len(data.train), generator=_generator(inputs.seed, epoch)).tolist()

        def view(i: int, epoch: int = epoch, order: list[int] = order) -> Tensor:
            row = int(data.train.rows[order[i]])
            return train_view(data.train.source.load(row), path, augment, seed=(inputs.seed, row, epoch))

        torch.manual_seed(_seed(inputs.seed, epoch))  # dropout and stochastic depth draw the same after a kill
        for number, images in enumerate(prefetched(view, batches * batch, batch)):
            labels = torch.from_numpy(data.train.labels[order[number * batch : (number + 1) * batch]])
            last = number + 1 == batches
            inside = batches - number // schedule.accumulate * schedule.accumulate  # of this step and after it
            try:
                with backbone.autocast():
                    for term in losses(
                        forward, forward.weights, images.to(backbone.device), labels.to(backbone.device)
                    ):
                        check_loss(term, what, epoch, schedule.lr)
                        (term / min(schedule.accumulate, inside)).backward()
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                raise Failed(
                    f"out of memory with {batch} images at once",
                    where=what,
                    hint=f"set batch={max(1, batch // 2)} accumulate={2 * schedule.accumulate}: the same step in half of the memory",
                ) from None
            if last or (number + 1) % schedule.accumulate == 0:
                step = epoch * steps_an_epoch + number // schedule.accumulate
                training.step(schedule.lr_at(step, steps))
                inputs.progress(step + 1, steps, what)
        if schedule.choose == "validation" and data.val is not None and len(data.val):
            model = Single(backbone, forward.tower())
            accuracy = evaluate(model, data.classes, data.val, inputs.features.temporary())[0].acc1
            training.offer(epoch, accuracy)
        if file is not None and epoch + 1 < schedule.epochs:
            training.keep(file, epoch + 1)
    if file is not None:
        file.unlink(missing_ok=True)
    if not all(weight.isfinite().all() for weight in forward.weights.values()):
        raise Failed(f"the weights of {what} are not finite", where=what, hint=f"lower lr (now {schedule.lr})")
    return training.chosen()


def _seed(seed: int, epoch: int) -> int:
    return seed * 1_000_003 + epoch


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(seed, epoch))


class Forward:
    """Logits of images as a function of a tower's weights, in training mode."""

    def __init__(self, backbone: Backbone, start: Tower, classes: Classes) -> None:
        self.start, self.backbone = start, backbone
        self.image = copy.deepcopy(backbone.image).train()
        in_model = {id(tensor): name for name, tensor in _named(backbone.model)}
        self.names = {name: in_model[id(tensor)] for name, tensor in _named(backbone.image) if id(tensor) in in_model}
        """Names in the image tower to names in the model."""
        trainable = {self.names[name] for name, _ in self.image.named_parameters(remove_duplicate=False)}
        self.weights = {
            name: torch.nn.Parameter(tensor.detach().clone().float())
            for name, tensor in start.tensors.items()
            if name in trainable or name.startswith(HEAD)
        }
        """What is trained."""
        inside = set(self.names.values()) - trainable
        self.statistics = {name: tensor.detach().clone() for name, tensor in start.weights.items() if name in inside}
        """Running statistics, which a forward of `weights` changes."""
        self._ask(classes)

    def of(self, classes: Classes) -> Forward:
        """The same tower, asked for other classes."""
        other = copy.copy(self)
        other._ask(classes)
        return other

    def _ask(self, classes: Classes) -> None:
        if self.start.head is not None:
            self.rows = self.start.head.rows(classes)
            return
        own = self.start.on(self.backbone)
        self.scale, self.bias = own.scale, own.bias
        with torch.no_grad():
            self.text = F.normalize(ZeroShot().text_features(own, classes), dim=-1)

    def __call__(self, weights: Weights, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, K]. Running statistics follow `self.weights` alone: other points get copies of them."""
        own = weights is self.weights
        statistics = self.statistics if own else {name: tensor.clone() for name, tensor in self.statistics.items()}
        given = {**statistics, **weights}
        tensors = {name: given[full] for name, full in self.names.items() if full in given}
        x = torch.func.functional_call(self.image, tensors, (images,))
        x = (x[0] if isinstance(x, tuple) else x).float()
        head = self.start.head
        if head is None:
            return self.scale * F.normalize(x, dim=-1) @ self.text.T + self.bias
        x = F.normalize(x, dim=-1) if head.normalise else x
        return x @ weights[HEAD + "weight"][self.rows].T + weights[HEAD + "bias"][self.rows]

    def tower(self, tensors: Weights | None = None) -> Tower:
        """The tower as it stands now, or with these weights and statistics."""
        now = {**self.statistics, **self.weights} if tensors is None else tensors
        now = {name: tensor.detach().clone() for name, tensor in now.items()}
        whole = self.start.with_tensors({**self.start.tensors, **now})
        return replace(whole, weights={**whole.weights, **{n: t for n, t in now.items() if n in whole.weights}})


def _named(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


class _Training:
    """Optimizer, best epoch so far, and both as a file."""

    def __init__(self, forward: Forward, schedule: TowerSchedule) -> None:
        self.forward = forward
        parameters = list(forward.weights.values())
        self.optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, weight_decay=schedule.weight_decay)
        self.best: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {"adapter": "training", "epoch": 0, "best": -1.0, "best_epoch": 0}

    def step(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr
        torch.nn.utils.clip_grad_norm_(self.forward.weights.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _now(self) -> dict[str, Tensor]:
        return {**self.forward.statistics, **self.forward.weights}

    def offer(self, epoch: int, accuracy: float) -> None:
        if accuracy > self.facts["best"]:
            self.facts |= {"best": accuracy, "best_epoch": epoch + 1}
            self.best = {name: tensor.detach().clone() for name, tensor in self._now().items()}

    def chosen(self) -> Tower:
        tower = self.forward.tower(self.best or None)
        return replace(tower, chosen={"epoch": self.facts["best_epoch"]}) if self.best else tower

    def keep(self, file: Path, epoch: int) -> None:
        groups = {"now": self._now(), "best": self.best}
        for name, weight in self.forward.weights.items():
            for key, value in self.optimizer.state[weight].items():
                groups.setdefault(key, {})[name] = value
        tensors = {f"{group}/{name}": t for group, named in groups.items() for name, t in named.items()}
        stored.write(file, tensors, {**self.facts, "epoch": epoch})

    @torch.no_grad()
    def restore(self, file: Path | None) -> int:
        """The epoch to go on with; 0 where nothing was kept."""
        if file is None or not file.exists():
            return 0
        tensors, self.facts = stored.read(file, "training", "cpu")
        for full, tensor in tensors.items():
            group, _, name = full.partition("/")
            if group == "now":
                self._now()[name].copy_(tensor)
            elif group == "best":
                self.best[name] = tensor.to(self._now()[name].device)
            else:
                weight = self.forward.weights[name]
                self.optimizer.state[weight][group] = tensor if group == "step" else tensor.to(weight.device)
        return self.facts["epoch"]
