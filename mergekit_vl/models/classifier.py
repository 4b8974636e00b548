"""The parts of a classifier: class names with templates, an image encoder, and a head from features to logits.

    images [B,3,H,W] --image encoder--> features [B,D] --bind(classes)--> head: features -> logits [B,K]

Shape legend of the project: B images, D feature width, K classes, M context tokens, W token width, L text length, A alphas, S models at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mergekit_vl.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.datasets.base import Template


@dataclass(frozen=True)
class Classes:
    """Class names with the templates a zero-shot classifier reads them in (`{}` or `{c}` stands for the name)."""

    names: tuple[str, ...]
    templates: tuple[Template, ...] = ("a photo of a {}.",)

    def texts(self) -> list[list[str]]:
        """One list of K texts per template."""
        return [[_fill(template, name) for name in self.names] for template in self.templates]

    def subset(self, indices: Sequence[int]) -> Classes:
        return Classes(tuple(self.names[i] for i in indices), self.templates)


def _fill(template: Template, name: str) -> str:
    if callable(template):
        return template(name)
    if "{}" not in template and "{c}" not in template:
        raise UserError(f"template {template!r} has no place for the class name", hint="write {} or {c} in it")
    return template.replace("{c}", name).replace("{}", name)


@dataclass(frozen=True)
class ImageEncoder:
    """A map from images to features; encoders with equal keys give equal features."""

    backbone: Backbone

    @property
    def key(self) -> str:
        return self.backbone.key

    def encode(self, images: Float[Tensor, "B 3 H W"], block: int | None = None) -> Float[Tensor, "B D"]:
        """Normalised-by-the-backbone images [B, 3, H, W] to raw features [B, D]."""
        return self.backbone.encode_image(images, block)


class Head(Protocol):
    def __call__(self, features: Mapping[str, Tensor]) -> Float[Tensor, "B K"]:
        """Features [B, D] by image-encoder key to log-probabilities or logits [B, K]."""
        ...


@dataclass(frozen=True)
class CosineHead:
    """Scaled cosine between image features and text features, plus SigLIP's bias; its softmax is the classifier of both.

    SigLIP's sigmoid is a training loss: over classes, its scores are compared by a softmax like CLIP's.
    """

    key: str
    text: Tensor  # [K, D], normalised
    scale: Tensor
    bias: Tensor

    def __call__(self, features: Mapping[str, Tensor]) -> Float[Tensor, "B K"]:
        import torch.nn.functional as F

        return self.scale * F.normalize(features[self.key], dim=-1) @ self.text.T + self.bias


def cosine_head(backbone: Backbone, text: Float[Tensor, "K D"]) -> CosineHead:
    import torch.nn.functional as F

    return CosineHead(backbone.key, F.normalize(text, dim=-1), backbone.scale, backbone.bias)


@dataclass(frozen=True)
class AffineHead:
    """features @ weight.T + bias, of normalised features where `normalise`."""

    key: str
    weight: Tensor  # [K, D]
    bias: Tensor  # [K]
    normalise: bool

    def __call__(self, features: Mapping[str, Tensor]) -> Float[Tensor, "B K"]:
        import torch.nn.functional as F

        x = features[self.key]
        return (F.normalize(x, dim=-1) if self.normalise else x) @ self.weight.T + self.bias
