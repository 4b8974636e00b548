"""Models (class names in, logits out): a single adapter, a mixture of classifiers, an ensemble of outputs.

images [B,3,H,W] --image encoder--> features [B,D] --bind(classes)--> head: features -> logits [B,K]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast, runtime_checkable

from mergekit_vl.errors import Unsuitable
from mergekit_vl.models.choices import Choice
from mergekit_vl.models.classifier import Classes as Classes
from mergekit_vl.models.classifier import Head as Head
from mergekit_vl.models.classifier import ImageEncoder as ImageEncoder
from mergekit_vl.models.classifier import cosine_head

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.adapter import Adapter, TextAdapter


class Model(Protocol):
    @property
    def encoders(self) -> tuple[ImageEncoder, ...]: ...

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
        """Of a model: those of its encoders whose features its head for these classes reads."""
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
    """The encoders whose features the model's head for these classes reads: all, unless it tells which."""
    return model.encoders_for(classes) if isinstance(model, ReadsSome) else model.encoders


@dataclass(frozen=True)
class Single:
    """One adapter on one backbone."""

    backbone: Backbone
    adapter: Adapter
    choice: Choice | None = None
    """What was chosen while it was made, for reports; it does not change the model."""

    @property
    def encoders(self) -> tuple[ImageEncoder, ...]:
        return (self.adapter.image_encoder(self.backbone),)

    def text_features(self, classes: Classes) -> Float[Tensor, "K D"]:
        """Raw text features [K, D]; raises UserError for a model that has none."""
        if not self.makes_texts:
            raise Unsuitable(
                f"a model of the space {self.adapter.space} has no text features",
                hint="merge its tensors (space=weights), or ensemble its outputs",
            )
        import torch

        with torch.no_grad():
            return cast("TextAdapter", self.adapter).text_features(self.backbone, classes)

    @property
    def makes_texts(self) -> bool:
        """Whether its classifier is made of texts on the backbone's own image features."""
        return self.adapter.about.makes_texts

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
    """A weighted sum of the members' raw text features, bound late: the merge with space=classifiers."""

    members: tuple[Single, ...]
    weights: tuple[float, ...]
    choice: Choice | None = None

    @property
    def encoders(self) -> tuple[ImageEncoder, ...]:
        return self.members[0].encoders

    def text_features(self, classes: Classes) -> Float[Tensor, "K D"]:
        import torch

        features = (w * m.text_features(classes) for w, m in zip(self.weights, self.members))
        return sum(features, torch.zeros(()))

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
    average_of: Literal["probabilities", "logits"] = "probabilities"
    temperatures: tuple[float, ...] = ()
    """Divisors of each member's logits; empty: all 1."""
    choice: Choice | None = None

    @property
    def encoders(self) -> tuple[ImageEncoder, ...]:
        return tuple({each.key: each for m in self.members for each in m.encoders}.values())

    def bind(self, classes: Classes) -> Head:
        import torch

        heads = [m.bind(classes) for m in self.members]

        def head(features: Mapping[str, Tensor]) -> Tensor:
            return self.mix(torch.stack([h(features) for h in heads]))

        return head

    def mix(self, logits: Float[Tensor, "N B K"]) -> Float[Tensor, "B K"]:
        """Of the members' logits [N, B, K]: [B, K]."""
        import torch

        if self.temperatures:
            logits = logits / torch.tensor(self.temperatures).to(logits)[:, None, None]
        weights = torch.tensor(self.weights).to(logits)[:, None, None]
        if self.average_of == "logits":
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
