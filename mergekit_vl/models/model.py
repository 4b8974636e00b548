"""Models: class names in, logits out.

    images [B,3,H,W] --image path--> features [B,D] --bind(classes)--> head: features -> logits [B,K]

Shape legend of the project: B images, D feature width, K classes, M context tokens, W token width, L text length, A alphas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from mergekit_vl.errors import Unsuitable, UserError
from mergekit_vl.models.choices import Choice

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.backbones.backbone import Backbone


@dataclass(frozen=True)
class Classes:
    """Class names with the templates a zero-shot classifier reads them in (`{}` or `{c}` stands for the name)."""

    names: tuple[str, ...]
    templates: tuple[str, ...] = ("a photo of a {}.",)

    def texts(self) -> list[list[str]]:
        """One list of K texts per template."""
        return [[_fill(template, name) for name in self.names] for template in self.templates]

    def subset(self, indices: Sequence[int]) -> Classes:
        return Classes(tuple(self.names[i] for i in indices), self.templates)


def _fill(template: str, name: str) -> str:
    if callable(template):
        return template(name)
    if "{}" not in template and "{c}" not in template:
        raise UserError(f"template {template!r} has no place for the class name", hint="write {} or {c} in it")
    return template.replace("{c}", name).replace("{}", name)


@dataclass(frozen=True)
class ImageEncoder:
    """What turns images into features; equal keys mean equal features."""

    backbone: Backbone

    @property
    def key(self) -> str:
        return self.backbone.key

    def encode(self, images: Tensor, block: int | None = None) -> Tensor:
        """Normalised-by-the-backbone images [B, 3, H, W] to raw features [B, D]."""
        return self.backbone.encode_image(images, block)


class Head(Protocol):
    def __call__(self, features: Mapping[str, Tensor]) -> Tensor:
        """Features [B, D] by image-path key to log-probabilities or logits [B, K]."""
        ...


class Model(Protocol):
    @property
    def paths(self) -> tuple[ImageEncoder, ...]: ...

    def bind(self, classes: Classes) -> Head: ...

    @property
    def parameters(self) -> int:
        """Number of parameters that this model adds to its backbone."""
        ...

    @property
    def forwards(self) -> int:
        """Forwards of a head for one sample: 1, or the number of members of an ensemble."""
        ...


@runtime_checkable
class ReadsSome(Protocol):
    def encoders_for(self, classes: Classes) -> tuple[ImageEncoder, ...]:
        """Of a model: those of its paths whose features its head for these classes reads."""
        ...


@runtime_checkable
class HasMembers(Protocol):
    @property
    def members(self) -> Sequence[Model]:
        """Of a model: those that it is made of."""
        ...


@runtime_checkable
class HoldsTensors(Protocol):
    @property
    def held_bytes(self) -> int:
        """Of a model: what it adds to its members on disk."""
        ...


def image_encoders(model: Model, classes: Classes) -> tuple[ImageEncoder, ...]:
    """The paths whose features the model's head for these classes reads: all, unless it tells which."""
    return model.encoders_for(classes) if isinstance(model, ReadsSome) else model.paths


class Adapter(Protocol):
    """What is tuned on a frozen backbone. Only adapters of equal `space` can be merged."""

    @property
    def space(self) -> str: ...
    @property
    def tensors(self) -> Mapping[str, Tensor]: ...
    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Adapter: ...
    def image_encoder(self, backbone: Backbone) -> ImageEncoder: ...
    def bind(self, backbone: Backbone, classes: Classes) -> Head: ...
    def anchor(self, backbone: Backbone) -> Adapter:
        """The point in this adapter's space that fine-tuning started from."""
        ...


class TextAdapter(Adapter, Protocol):
    """An adapter whose classifier is made of texts; classifiers of these can be mixed."""

    def text_features(self, backbone: Backbone, classes: Classes) -> Tensor:
        """Raw (un-normalised) text features [K, D]."""
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

    def __call__(self, features: Mapping[str, Tensor]) -> Tensor:
        import torch.nn.functional as F

        return self.scale * F.normalize(features[self.key], dim=-1) @ self.text.T + self.bias


def cosine_head(backbone: Backbone, text: Tensor) -> CosineHead:
    import torch.nn.functional as F

    return CosineHead(backbone.key, F.normalize(text, dim=-1), backbone.scale, backbone.bias)


@dataclass(frozen=True)
class AffineHead:
    """features @ weight.T + bias, of normalised features where `normalise`."""

    key: str
    weight: Tensor  # [K, D]
    bias: Tensor  # [K]
    normalise: bool

    def __call__(self, features: Mapping[str, Tensor]) -> Tensor:
        import torch.nn.functional as F

        x = features[self.key]
        return (F.normalize(x, dim=-1) if self.normalise else x) @ self.weight.T + self.bias


@dataclass(frozen=True)
class Single:
    """One adapter on one backbone."""

    backbone: Backbone
    adapter: Adapter
    choice: Choice | None = None
    """What was chosen while it was made; it is told in reports and is no part of the model."""

    @property
    def paths(self) -> tuple[ImageEncoder, ...]:
        return (self.adapter.image_encoder(self.backbone),)

    def text_features(self, classes: Classes) -> Tensor:
        """Raw text features [K, D]; raises UserError for a model that has none."""
        if not self.makes_texts:
            raise Unsuitable(
                f"a model of the space {self.adapter.space} has no text features",
                hint="merge its tensors (space=own), or ensemble its outputs",
            )
        import torch

        with torch.no_grad():
            return self.adapter.text_features(self.backbone, classes)  # type: ignore[attr-defined]

    @property
    def makes_texts(self) -> bool:
        """Whether its classifier is made of texts on the backbone's own image features."""
        return hasattr(self.adapter, "text_features")

    def bind(self, classes: Classes) -> Head:
        import torch

        with torch.no_grad():
            return self.adapter.bind(self.backbone, classes)

    @property
    def parameters(self) -> int:
        return sum(t.numel() for t in self.adapter.tensors.values())

    forwards = 1


@dataclass(frozen=True)
class Mixture:
    """A weighted sum of the members' raw text features, bound late: the merge in the space `features`."""

    members: tuple[Single, ...]
    weights: tuple[float, ...]
    choice: Choice | None = None

    @property
    def paths(self) -> tuple[ImageEncoder, ...]:
        return self.members[0].paths

    def text_features(self, classes: Classes) -> Tensor:
        total = sum(w * m.text_features(classes) for w, m in zip(self.weights, self.members))
        return total  # type: ignore[return-value]

    def bind(self, classes: Classes) -> Head:
        return cosine_head(self.members[0].backbone, self.text_features(classes))

    @property
    def parameters(self) -> int:
        return sum(m.parameters for m in self.members)

    forwards = 1


@dataclass(frozen=True)
class Ensemble:
    """The logarithm of the members' weighted mean probability, or the weighted mean of their logits."""

    members: tuple[Model, ...]
    weights: tuple[float, ...]
    of: Literal["probabilities", "logits"] = "probabilities"
    temperatures: tuple[float, ...] = ()
    """What each member's logits are divided by; empty: they stay as they are."""
    choice: Choice | None = None

    @property
    def paths(self) -> tuple[ImageEncoder, ...]:
        return tuple({path.key: path for m in self.members for path in m.paths}.values())

    def bind(self, classes: Classes) -> Head:
        import torch

        heads = [m.bind(classes) for m in self.members]

        def head(features: Mapping[str, Tensor]) -> Tensor:
            return self.mix(torch.stack([h(features) for h in heads]))

        return head

    def mix(self, logits: Tensor) -> Tensor:
        """Of the members' logits [N, B, K]: [B, K]."""
        import torch

        if self.temperatures:
            logits = logits / torch.tensor(self.temperatures).to(logits)[:, None, None]
        weights = torch.tensor(self.weights).to(logits)[:, None, None]
        if self.of == "logits":
            return (weights * logits).sum(0)
        return torch.logsumexp(logits.log_softmax(-1) + weights.log(), 0)

    @property
    def parameters(self) -> int:
        return sum(m.parameters for m in self.members)

    @property
    def forwards(self) -> int:
        return sum(m.forwards for m in self.members)


def size_in_bytes(model: Model) -> int:
    """Of the tensors that a model adds to its backbone: what it takes on disk."""
    if isinstance(model, Single):
        return sum(t.numel() * t.element_size() for t in model.adapter.tensors.values())
    held = model.held_bytes if isinstance(model, HoldsTensors) else 0
    members = model.members if isinstance(model, HasMembers) else ()
    return held + (sum(map(size_in_bytes, members)) if members else 4 * model.parameters)
