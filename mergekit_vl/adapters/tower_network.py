"""The network of a tower: logits of images as a differentiable function of the image tower's weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Generic, Literal, Protocol, Self, TypeVar

import torch
import torch.nn.functional as F

from mergekit_vl.adapters.head_network import HEAD
from mergekit_vl.adapters.lines import TowerLine
from mergekit_vl.adapters.zero_shot import ZeroShot

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.classifier import Classes

    Tensors = Mapping[str, Tensor]


class Weights(Protocol):
    """What is asked of a tower."""

    @property
    def weights(self) -> Tensors: ...
    @property
    def tensors(self) -> Tensors: ...
    @property
    def head(self) -> Rows | None: ...
    def on(self, backbone: Backbone) -> Backbone: ...
    def with_tensors(self, tensors: Tensors) -> Self: ...
    def with_weights(self, weights: Tensors) -> Self: ...


class Rows(Protocol):
    """What is asked of a tower's head."""

    @property
    def normalise(self) -> bool: ...
    def rows(self, classes: Classes) -> list[int] | slice: ...


A = TypeVar("A", bound=Weights)


class TowerNetwork(Generic[A]):
    """Logits of images as a function of a tower's weights.

    These are leaves beside the frozen backbone, put in with `functional_call`. While it trains, the encoder runs in the backbone's
    precision and its running statistics move; else it is exact and in evaluation mode.
    """

    def __init__(self, backbone: Backbone, start: A, classes: Classes, *, training: bool = True) -> None:
        self.start, self.backbone, self.training = start, backbone, training
        self.image = copy.deepcopy(backbone.image).train(training)
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

    @property
    def leaves(self) -> Tensors:
        return self.weights

    def of(self, classes: Classes) -> Self:
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

    def prepare(self, x: Tensor) -> Tensor:
        return x.to(self.backbone.device)

    def unit(self, x: Tensor) -> float:
        return 1.0

    def __call__(self, weights: Tensors, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        """[B, 3, H, W] -> logits [B, K]. Running statistics follow `self.weights` alone: other points get copies of them."""
        with self.backbone.autocast() if self.training else nullcontext():
            return self._logits(weights, x).float()

    def _logits(self, weights: Tensors, images: Tensor) -> Tensor:
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

    def fisher(self, x: Tensor) -> None:
        return None

    def line(self, first: A, second: A, space: Literal["weights", "classifiers"]) -> TowerLine:
        """Over what is trained: neither running statistics nor a text tower can be pulled."""
        w1, w2 = first.tensors, second.tensors
        apart = sum(((w2[name] - w1[name]).square().sum() for name in self.weights), torch.zeros(()))
        return TowerLine(self, dict(w1), dict(w2), apart.clamp_min(1e-12))

    def adapter(self, tensors: Tensors) -> A:
        now = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        whole = self.start.with_tensors({**self.start.tensors, **now})
        return whole.with_weights({**whole.weights, **{n: t for n, t in now.items() if n in whole.weights}})


def _named(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
