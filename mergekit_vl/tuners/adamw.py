"""AdamW over an image tower, with or without a head, a step at a time; a killed training goes on after its last whole epoch.

for step in training.steps(inputs, augment, what="full"):
    with step:
        step.minimise(cross_entropy(network(step.weights, step.x), step.labels))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import torch

from mergekit_vl.adapters import stored
from mergekit_vl.datasets.base import Augment
from mergekit_vl.errors import Failed
from mergekit_vl.models.evaluate import evaluate
from mergekit_vl.models.model import ImageEncoder, Single
from mergekit_vl.models.views import prefetched, train_view
from mergekit_vl.system.memory import out_of_memory
from mergekit_vl.tuners.sgd import check_loss, check_positive

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.adapter import Adapter, Network
    from mergekit_vl.models.inputs import MergeInputs


@dataclass(frozen=True)
class AdamWSchedule:
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

    def __post_init__(self) -> None:
        check_positive(self)

    def lr_at(self, step: int, steps: int) -> float:
        warmup = min(self.warmup, steps // 10)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


@dataclass(frozen=True)
class AdamWStep:
    """One batch: what moves, what is seen, what is minimised."""

    weights: Mapping[str, Tensor]
    x: Tensor
    """Images [B, 3, H, W]."""
    labels: Tensor
    """[B]"""
    parts: int
    """Batches whose gradients make the optimiser's step."""
    accumulate: int
    what: str
    epoch: int
    lr: float
    draw: None = None
    """What a loss draws comes from the global generator: the loop seeds it by epoch, so that a training that goes on draws the same."""

    def minimise(self, term: Tensor) -> None:
        """Add a term to the loss. It runs backward at once, so that memory holds the graph of one term."""
        check_loss(term, self.what, self.epoch, self.lr)
        (term / self.parts).backward()

    def __enter__(self) -> AdamWStep:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, MemoryError | RuntimeError) and out_of_memory(error):
            batch = len(self.x)
            raise Failed(
                f"out of memory with {batch} images at once",
                where=self.what,
                hint=f"set batch={max(1, batch // 2)} accumulate={2 * self.accumulate}: the same step in half of the memory",
            ) from None


A = TypeVar("A", bound="Adapter")


class AdamWTraining(Generic[A]):
    """A network that is trained, its optimiser, the best epoch so far, and all of them as a file."""

    def __init__(self, backbone: Backbone, network: Network[A], schedule: AdamWSchedule) -> None:
        self.backbone, self.network, self.schedule = backbone, network, schedule
        parameters = list(network.weights.values())
        self.optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, weight_decay=schedule.weight_decay)
        self.best: dict[str, Tensor] = {}
        self.facts: stored.Facts = {"adapter": "training", "epoch": 0, "best": -1.0, "best_epoch": 0}

    def steps(self, inputs: MergeInputs, augment: Augment, *, what: str) -> Iterator[AdamWStep]:
        """On the first task of `inputs`. A text tower stays as it is. Raises UserError if a loss is not finite, and where memory ends."""
        data, schedule, weights = inputs.data[0], self.schedule, self.network.weights
        file = None if inputs.scratch is None else inputs.scratch / f"{what}.safetensors"
        batch = min(schedule.batch, len(data.train))
        batches = len(data.train) // batch  # the last, smaller batch is dropped, as the field does
        steps_an_epoch = math.ceil(batches / schedule.accumulate)
        steps = steps_an_epoch * schedule.epochs
        path = ImageEncoder(self.backbone)
        for epoch in range(self.restore(file), schedule.epochs):
            order = torch.randperm(len(data.train), generator=_generator(inputs.seed, epoch)).tolist()

            def view(i: int, epoch: int = epoch, order: list[int] = order) -> Tensor:
                row = int(data.train.rows[order[i]])
                return train_view(data.train.source.load(row), path, augment, seed=(inputs.seed, row, epoch))

            torch.manual_seed(_seed(inputs.seed, epoch))  # dropout and stochastic depth draw the same after a kill
            for number, images in enumerate(prefetched(view, batches * batch, batch)):
                labels = torch.from_numpy(data.train.labels[order[number * batch : (number + 1) * batch]])
                inside = batches - number // schedule.accumulate * schedule.accumulate  # of this step and after it
                parts = min(schedule.accumulate, inside)
                x, labels = self.network.prepare(images), labels.to(self.backbone.device)
                yield AdamWStep(weights, x, labels, parts, schedule.accumulate, what, epoch, schedule.lr)
                if number + 1 == batches or (number + 1) % schedule.accumulate == 0:
                    step = epoch * steps_an_epoch + number // schedule.accumulate
                    self.step(schedule.lr_at(step, steps))
                    inputs.reporter.progress(step + 1, steps, what)
            if schedule.choose == "validation" and data.val is not None and len(data.val):
                model = Single(self.backbone, self.network.adapter(self._now()))
                accuracy = evaluate(model, data.classes, data.val, inputs.features.temporary())[0].acc1
                self.offer(epoch, accuracy)
            if file is not None and epoch + 1 < schedule.epochs:
                self.keep(file, epoch + 1)
        if file is not None:
            file.unlink(missing_ok=True)
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise Failed(f"the weights of {what} are not finite", where=what, hint=f"lower lr (now {schedule.lr})")

    def step(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr
        torch.nn.utils.clip_grad_norm_(self.network.weights.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _now(self) -> dict[str, Tensor]:
        return {**self.network.statistics, **self.network.weights}

    def offer(self, epoch: int, accuracy: float) -> None:
        if accuracy > self.facts["best"]:
            self.facts |= {"best": accuracy, "best_epoch": epoch + 1}
            self.best = {name: tensor.detach().clone() for name, tensor in self._now().items()}

    def chosen(self) -> A:
        """That of the best epoch on validation images where they chose, else of the last."""
        adapter = self.network.adapter(self.best or self._now())
        return adapter.with_chosen({"epoch": self.facts["best_epoch"]}) if self.best else adapter

    def keep(self, file: Path, epoch: int) -> None:
        groups = {"now": self._now(), "best": self.best}
        for name, weight in self.network.weights.items():
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
                weight = self.network.weights[name]
                self.optimizer.state[weight][group] = tensor if group == "step" else tensor.to(weight.device)
        return self.facts["epoch"]


def _seed(seed: int, epoch: int) -> int:
    return seed * 1_000_003 + epoch


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(seed, epoch))
