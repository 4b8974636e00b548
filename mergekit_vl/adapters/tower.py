"""Towers: other weights for the backbone itself, its image tower or all of it, perhaps with a linear head on top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_vl.adapters import stored
from mergekit_vl.adapters.linear_head import LinearHead
from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.models.model import ImageEncoder

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.model import Classes, Head

HEAD = "linear_head."


@dataclass(frozen=True, eq=False)
class Tower:
    """Weights by their names in `backbone.model.state_dict()`; the others stay the backbone's.

    Without a `head` the classifier is made of class names by the text tower (the tuned one, where its weights are among these):
    such towers take any classes, and those tuned on different tasks can be merged. Integer tensors are not merged; they stay as
    they are in the first model.
    """

    weights: Mapping[str, Tensor]
    head: LinearHead | None = None
    chosen: Mapping[str, float] = field(default_factory=dict)
    """What was chosen on validation images while it was tuned, or learnt while it was merged."""

    space = "tower"

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        floats = {name: tensor for name, tensor in self.weights.items() if tensor.is_floating_point()}
        head = {HEAD + name: tensor for name, tensor in self.head.tensors.items()} if self.head else {}
        return floats | head

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Tower:
        weights = {name: tensors.get(name, tensor) for name, tensor in self.weights.items()}
        head = self.head and self.head.with_tensors({n: tensors[HEAD + n] for n in self.head.tensors})
        return Tower(weights, head)

    def anchor(self, backbone: Backbone) -> Tower:
        """The backbone's own weights, and the head that tuning started from."""
        own = backbone.model.state_dict()
        return Tower({name: own[name].clone() for name in self.weights}, self.head and self.head.anchor(backbone))

    def on(self, backbone: Backbone) -> Backbone:
        """The backbone with these weights; made once."""
        if self._made.get("of") is not backbone:
            self._made.update({"of": backbone, "it": backbone.with_weights(self.weights)})
        return self._made["it"]

    @cached_property
    def _made(self) -> dict[str, Any]:
        return {}

    def image_encoder(self, backbone: Backbone) -> ImageEncoder:
        return ImageEncoder(self.on(backbone))

    def bind(self, backbone: Backbone, classes: Classes) -> Head:
        return (self.head or ZeroShot()).bind(self.on(backbone), classes)

    def check(self, backbone: Backbone) -> None:
        """Raise UserError where the weights are of another architecture than the backbone, or the head of another width."""
        made = self.on(backbone)
        if self.head:
            self.head.check(made)

    def save(self, path: Path, *, backbone: str) -> None:
        tensors = dict(self.weights)
        facts: dict[str, Any] = {"adapter": "tower", "backbone": backbone, "head": None, "chosen": dict(self.chosen)}
        if self.head:
            head, facts["head"] = self.head.state()
            tensors |= {HEAD + name: tensor for name, tensor in head.items()}
        stored.write(path, tensors, facts)

    @classmethod
    def load(cls, path: Path, *, device: str = "cpu") -> Tower:
        tensors, facts = stored.read(path, "tower", device)
        chosen = facts.get("chosen", {})  # a merge of files has none
        if facts.get("head") is None:
            return cls(tensors, chosen=chosen)
        head = {name.removeprefix(HEAD): tensor for name, tensor in tensors.items() if name.startswith(HEAD)}
        weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEAD)}
        return cls(weights, LinearHead.restored(head, facts["head"], where=str(path)), chosen)
