"""The network of every adapter whose classifier is made of text features: weights -> text features -> scaled cosines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from mergekit_vl.adapters.lines import TextLine, TextWeightLine, cosine_logits

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.adapter import Line, TextAdapter
    from mergekit_vl.models.classifier import Classes

    Tensors = Mapping[str, Tensor]


A = TypeVar("A", bound="TextAdapter")


@dataclass(frozen=True)
class TextNetwork(Generic[A]):
    """`encode` turns an adapter's tensors, perhaps each with a leading [S], into raw text features [K, D] or [S, K, D] of `classes`."""

    start: A
    backbone: Backbone
    classes: Classes
    encode: Callable[[Tensors], Tensor]

    @property
    def weights(self) -> Tensors:
        return self.start.tensors

    @property
    def leaves(self) -> Tensors:
        return self.weights

    @property
    def statistics(self) -> Tensors:
        return {}

    def prepare(self, x: Tensor) -> Tensor:
        """Normalised."""
        import torch.nn.functional as F

        return F.normalize(x, dim=-1).to(self.backbone.device)

    def unit(self, x: Tensor) -> float:
        return 1.0

    def __call__(self, weights: Tensors, x: Float[Tensor, "B D"]) -> Float[Tensor, "B K"] | Float[Tensor, "S B K"]:
        return self.logits(self.encode(weights), x)

    def logits(self, text: Float[Tensor, "*S K D"], x: Float[Tensor, "B D"]) -> Float[Tensor, "*S B K"]:
        """Raw text features [K, D] or [S, K, D] and prepared inputs -> [B, K] or [S, B, K]."""
        return cosine_logits(self.backbone.scale, text, x)

    def fisher(self, x: Tensor) -> None:
        return None

    def line(self, first: A, second: A, space: Literal["weights", "classifiers"]) -> Line:
        import torch

        scale = self.backbone.scale
        if space == "weights":
            return TextWeightLine(self.encode, scale, first.tensors, second.tensors)
        with torch.no_grad():
            text1, text2 = (model.text_features(self.backbone, self.classes) for model in (first, second))
        return TextLine(self.encode, scale, text1, text2)

    def adapter(self, tensors: Tensors) -> A:
        return self.start.with_tensors({name: tensor.detach() for name, tensor in tensors.items()})
