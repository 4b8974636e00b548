"""The network of a linear head: weight and bias are one matrix w [K, D + 1], and features have a last column of ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, Protocol, Self, TypeVar

from mergekit_vl.adapters import exact_fisher
from mergekit_vl.adapters.lines import HeadLine

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mergekit_vl.models.classifier import Classes

    Tensors = Mapping[str, Tensor]

HEAD = "linear_head."
"""What the names of a head's tensors begin with among a tower's."""


class Rows(Protocol):
    """What is asked of a linear head."""

    @property
    def tensors(self) -> Tensors: ...
    @property
    def normalise(self) -> bool: ...
    def with_tensors(self, tensors: Tensors) -> Self: ...
    def rows(self, classes: Classes) -> list[int] | slice: ...


def matrix(tensors: Tensors) -> Float[Tensor, "K D1"]:
    """[weight, bias] as [K, D + 1]."""
    import torch

    return torch.cat([tensors["weight"], tensors["bias"][:, None]], 1)


def inputs_of(head: Rows, features: Tensor) -> Tensor:
    """Features [..., D] as the head reads them, with the ones [..., D + 1]."""
    import torch
    import torch.nn.functional as F

    x = F.normalize(features, dim=-1) if head.normalise else features
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def mean_square(x: Float[Tensor, "*N D"]) -> Float[Tensor, ""]:
    """Mean squared length of the rows: the unit of step sizes and penalties, so that neither depends on the scale of features."""
    return x.square().sum(-1).mean()


A = TypeVar("A", bound=Rows)


@dataclass(frozen=True)
class HeadNetwork(Generic[A]):
    head: A
    classes: Classes

    @property
    def weights(self) -> Tensors:
        return self.head.tensors

    @property
    def leaves(self) -> Tensors:
        """One matrix w [K, D + 1]: a step is too short for joining two tensors in it."""
        return {"w": matrix(self.weights)}

    @property
    def statistics(self) -> Tensors:
        return {}

    def prepare(self, x: Tensor) -> Tensor:
        return inputs_of(self.head, x.to(self.head.tensors["weight"].device))

    def unit(self, x: Tensor) -> float:
        return mean_square(x).item()

    def __call__(self, weights: Tensors, x: Float[Tensor, "B D1"]) -> Float[Tensor, "B K"] | Float[Tensor, "S B K"]:
        rows = self.head.rows(self.classes)
        if "w" in weights:
            return x @ weights["w"][..., rows, :].mT
        return x[..., :-1] @ weights["weight"][..., rows, :].mT + weights["bias"][..., rows].unsqueeze(-2)

    def fisher(self, x: Tensor) -> Tensors:
        fisher = exact_fisher.of_head(matrix(self.weights), x)
        return {"weight": fisher[:, :-1], "bias": fisher[:, -1]}

    def line(self, first: A, second: A, space: Literal["weights", "classifiers"]) -> HeadLine:
        return HeadLine(matrix(first.tensors), matrix(second.tensors))

    def adapter(self, tensors: Tensors) -> A:
        w = tensors["w"].detach()
        return self.head.with_tensors({"weight": w[:, :-1].contiguous(), "bias": w[:, -1].contiguous()})
