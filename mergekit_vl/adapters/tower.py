"""Towers: weights that replace the backbone's own, of the image tower or of both towers, with or without a linear head."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_vl.adapters import stored, usage
from mergekit_vl.adapters.head_network import HEAD
from mergekit_vl.adapters.linear_head import LinearHead
from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.errors import UserError
from mergekit_vl.models.adapter import About, Whole
from mergekit_vl.models.classifier import ImageEncoder

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.adapters.tower_network import TowerNetwork
    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.adapter import Adapter, Usage
    from mergekit_vl.models.classifier import Classes, Head


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
    about = About("a tower", "towers", reads="images", lr=3e-5, weight_decay=0.1)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        floats = {name: tensor for name, tensor in self.weights.items() if tensor.is_floating_point()}
        head = {HEAD + name: tensor for name, tensor in self.head.tensors.items()} if self.head else {}
        return floats | head

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Tower:
        weights = {name: tensors.get(name, tensor) for name, tensor in self.weights.items()}
        head = self.head and self.head.with_tensors({n: tensors[HEAD + n] for n in self.head.tensors})
        return Tower(weights, head)

    def with_weights(self, weights: Mapping[str, Tensor]) -> Tower:
        return replace(self, weights=weights)

    def aligned(self, others: Sequence[Tower]) -> Sequence[Tower]:
        heads = [other.head for other in others if other.head is not None]
        if self.head is None or len(heads) < len(others):
            return others
        return [
            other if head is other.head else replace(other, head=head)
            for other, head in zip(others, self.head.aligned(heads))
        ]

    def untuned(self, backbone: Backbone) -> Tower:
        """The backbone's own weights, and the head that tuning started from."""
        own = backbone.model.state_dict()
        return Tower({name: own[name].clone() for name in self.weights}, self.head and self.head.untuned(backbone))

    def on(self, backbone: Backbone) -> Backbone:
        """The backbone with these weights; made once."""
        if not self._made or self._made[0] is not backbone:
            self._made[:] = backbone, backbone.with_weights(self.weights)
        return self._made[1]

    @cached_property
    def _made(self) -> list[Backbone]:
        """The backbone that was asked last, and that with these weights."""
        return []

    def image_encoder(self, backbone: Backbone) -> ImageEncoder:
        return ImageEncoder(self.on(backbone))

    def bind(self, backbone: Backbone, classes: Classes) -> Head:
        return (self.head or ZeroShot()).bind(self.on(backbone), classes)

    def networks(self, backbone: Backbone, classes: Sequence[Classes], *, training: bool) -> list[TowerNetwork[Tower]]:
        from mergekit_vl.adapters.tower_network import TowerNetwork

        first = TowerNetwork(backbone, self, classes[0], training=training)
        return [first, *(first.of(each) for each in classes[1:])]

    def linear_maps(self, features: Tensor) -> Mapping[str, Tensor]:
        """Of the head alone; what the image tower's weights read is observed (`estimators.gram`)."""
        return {} if self.head is None else {HEAD + name: x for name, x in self.head.linear_maps(features).items()}

    def with_chosen(self, chosen: Mapping[str, float]) -> Tower:
        return replace(self, chosen=chosen)

    def started_from(self, base: Adapter, backbone: Backbone, classes: Classes) -> Tower:
        head = self.head and self.head.started_from(base, backbone, classes)
        return self if head is self.head else replace(self, head=head)

    def usage(self, backbone: Backbone) -> Usage:
        if backbone.text is not None:
            return usage.of_clip_tower(self.head.names if self.head else None)
        assert self.head is not None, "a tower without a text tower has a head"
        return usage.of_timm_tower(backbone.config["architecture"], self.head.names, len(self.head.weight))

    def whole(self, backbone: Backbone) -> Whole:
        return Whole(self.on(backbone), self.head)

    def check(self, backbone: Backbone) -> None:
        """Raise UserError where the weights are of another architecture than the backbone, or the head of another width."""
        made = self.on(backbone)
        if self.head:
            self.head.check(made)

    def save(self, path: Path, *, backbone: str) -> None:
        tensors = dict(self.weights)
        facts: dict[str, object] = {"adapter": "tower", "backbone": backbone, "head": None, "chosen": dict(self.chosen)}
        if self.head:
            head, facts["head"] = self.head.state()
            tensors |= {HEAD + name: tensor for name, tensor in head.items()}
        stored.write(path, tensors, facts)

    @classmethod
    def load(cls, path: Path, *, device: str = "cpu") -> Tower:
        tensors, facts = stored.read(path, "tower", device)
        chosen = facts.get("chosen", {})  # a merge of files has none
        told = facts.get("head")
        if told is None:
            return cls(tensors, chosen=chosen)
        head = {name.removeprefix(HEAD): tensor for name, tensor in tensors.items() if name.startswith(HEAD)}
        weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEAD)}
        return cls(weights, LinearHead.restored(head, told, where=str(path)), chosen)

    @classmethod
    def recognises(cls, names: Collection[str]) -> bool:
        """Whatever no other adapter takes: whether it fits is told against the backbone."""
        return True

    @classmethod
    def read(cls, path: Path, backbone: Backbone) -> Tower:
        """Weights of the backbone's architecture, all of them or the image tower's, as open_clip, timm or others write them.

        A classifier among them becomes a linear head over the classes it is asked for, in their order.
        """
        import torch

        from mergekit_vl.checkpoints import torch_io
        from mergekit_vl.checkpoints.configs import class_names

        where = str(path)
        state = torch_io.read(path)
        own = backbone.model.state_dict()
        given, classifier = backbone.read(state)
        if backbone.text is None and own.keys().isdisjoint(given):
            state, told = torch_io.under_names_of(own, state, where=where)
            for line in told:
                warnings.warn(line, stacklevel=2)
            given, classifier = backbone.read(state)
        given = torch_io.without_made(backbone.model, given)
        if all(name.startswith("visual.") for name in state):  # what reading adds for a whole model is not the file's
            given = {name: tensor for name, tensor in given.items() if name.startswith("visual.")}
        visual = {name: tensor for name, tensor in own.items() if name.startswith("visual.")}
        needed = visual if visual and given.keys() <= visual.keys() else own
        hint = "give weights that were tuned from the recipe's backbone"
        torch_io.check_fits(needed, given, where=where, hint=hint, than=f" than {backbone.spec}")
        torch_io.check_finite(state, where=where, hint="use an undamaged checkpoint")  # the classifier's too
        weights = {
            name: torch_io.cast(tensor, own[name].dtype, name=name, where=where).to(own[name])
            for name, tensor in given.items()
        }
        head = None
        if classifier is not None:
            weight, bias = (
                torch_io.cast(tensor, torch.float32, name=f"classifier.{name}", where=where).to(backbone.device)
                for name, tensor in (("weight", classifier.weight), ("bias", classifier.bias))
            )
            names = class_names(path if path.is_dir() else path.parent)
            head = LinearHead(weight, bias, names if len(names) == len(weight) else (), normalise=False)
        elif backbone.text is None:
            raise UserError("no classifier is in it", where=where, hint="give a timm checkpoint with its classifier")
        return cls(weights, head)
