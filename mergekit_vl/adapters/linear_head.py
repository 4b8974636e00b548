"""Linear heads: one weight vector and one bias per class, on the features of a frozen image tower."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mergekit_vl.adapters import stored, usage
from mergekit_vl.adapters.head_network import HeadNetwork, inputs_of
from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.errors import Unsuitable, UserError
from mergekit_vl.models.adapter import About
from mergekit_vl.models.calibration import golden_section
from mergekit_vl.models.classifier import AffineHead, ImageEncoder

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.adapter import Adapter, Usage
    from mergekit_vl.models.classifier import Classes, Head

Unseen = Literal["refuse", "zero_shot"]


@dataclass(frozen=True, eq=False)
class LinearHead:
    """logits = x @ weight.T + bias; weight [K, D], bias [K], x the image features [B, D], normalised where `normalise`.

    `start` is the head before tuning, the zero-shot point. It is stored with the head, since merges need it.
    """

    weight: Tensor
    bias: Tensor
    names: tuple[str, ...]
    """Of the classes, in the order of the rows; empty: the classes it is asked for, as many and in that order."""
    normalise: bool
    start: LinearHead | None = None
    unseen: Unseen = "refuse"
    """What to do with other class names: refuse them, or give them their zero-shot row."""
    chosen: Mapping[str, float] = field(default_factory=dict)
    """What was chosen on validation images while it was tuned, or learnt while it was merged."""

    space = "head"
    about = About(
        "a head", "heads", linear=True, exact_fisher=True, fresh_views=False, lr=1.0, weight_decay=0.0
    )  # fmt: skip

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"weight": self.weight, "bias": self.bias}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LinearHead:
        return replace(self, weight=tensors["weight"], bias=tensors["bias"])

    def to(self, device: str) -> LinearHead:
        start = self.start and self.start.to(device)
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device), start=start)

    def untuned(self, backbone: Backbone) -> LinearHead:
        """The head that tuning started from; raises UserError where the file does not tell."""
        if self.start is None:
            raise Unsuitable(
                "nothing tells the head that this one was tuned from",
                where=f"linear head of {len(self.weight)} classes",
                hint="tune it with linear_probe or full, or ensemble its outputs instead of merging",
            )
        return replace(self.start, start=self.start)

    def image_encoder(self, backbone: Backbone) -> ImageEncoder:
        return ImageEncoder(backbone)

    def bind(self, backbone: Backbone, classes: Classes) -> Head:
        """Rows by class name. Raises UserError for names that the head does not know, unless `unseen` is zero_shot."""
        import torch

        self.check(backbone)
        if not self.names and (rows := rows_by_config(backbone.classes, classes.names, backbone.spec)) is not None:
            return AffineHead(backbone.key, self.weight[rows], self.bias[rows], self.normalise)
        if not self.names:
            if len(classes.names) != len(self.weight):
                raise UserError(
                    f"a head of {len(self.weight)} classes for a data set of {len(classes.names)}",
                    where=backbone.spec,
                    hint="use the data set it was tuned on",
                )
            return AffineHead(backbone.key, self.weight, self.bias, self.normalise)
        index = {name: i for i, name in enumerate(self.names)}
        unknown = [name for name in classes.names if name not in index]
        if unknown and (self.unseen == "refuse" or backbone.text is None):
            raise Unsuitable(
                f"the linear head knows no class {unknown[0]!r}"
                + (f" (nor {len(unknown) - 1} more)" * (len(unknown) > 1)),
                where=f"its classes: {', '.join(self.names[:5])}{', ...' * (len(self.names) > 5)}",
                hint="test it on its own classes (protocol few_shot or robust), or tune with unseen=zero_shot on a CLIP",
            )
        other = zero_shot(backbone, classes) if unknown else self
        weight, bias = (
            torch.stack([ours[index[name]] if name in index else theirs[i] for i, name in enumerate(classes.names)])
            for ours, theirs in ((self.weight, other.weight), (self.bias, other.bias))
        )
        return AffineHead(backbone.key, weight, bias, self.normalise)

    def networks(
        self, backbone: Backbone, classes: Sequence[Classes], *, training: bool
    ) -> list[HeadNetwork[LinearHead]]:
        return [HeadNetwork(self, each) for each in classes]

    def linear_maps(self, features: Tensor) -> Mapping[str, Tensor]:
        return {"weight": inputs_of(self, features.to(self.weight.device))[:, :-1]}  # without the ones of the bias

    def aligned(self, others: Sequence[LinearHead]) -> Sequence[LinearHead]:
        return by_class_name(others)

    def with_chosen(self, chosen: Mapping[str, float]) -> LinearHead:
        return replace(self, chosen=chosen)

    def started_from(self, base: Adapter, backbone: Backbone, classes: Classes) -> LinearHead:
        """From the head that `base` is, else from zero-shot."""
        if self.start is not None:
            return self
        start = base if isinstance(base, LinearHead) else zero_shot(backbone, classes)
        if start.weight.shape != self.weight.shape:
            raise UserError(
                f"the checkpoint's head has {len(self.weight)} classes of width {self.weight.shape[1]}, the data set needs "
                f"{len(start.weight)} of width {start.weight.shape[1]}",
                where=backbone.spec,
                hint="use the data set it was tuned on",
            )
        return replace(self, names=self.names or classes.names, start=start)

    def usage(self, backbone: Backbone) -> Usage:
        return usage.of_head(self.names, normalise=self.normalise)

    def whole(self, backbone: Backbone) -> None:
        return None

    def rows(self, classes: Classes) -> list[int] | slice:
        """Where these classes are; all rows where they are all in order, or it does not know them by name."""
        index = {name: i for i, name in enumerate(self.names)}
        if classes.names == self.names or not all(name in index for name in classes.names):
            return slice(None)
        return [index[name] for name in classes.names]

    def check(self, backbone: Backbone) -> None:
        """Raise UserError where image tower and head do not fit."""
        if backbone.width not in (None, self.weight.shape[1]):
            raise UserError(
                f"the head reads features of width {self.weight.shape[1]}, {backbone.spec} gives {backbone.width}",
                hint="use the backbone it was tuned on",
            )

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Tensors and facts, as `restored` reads them."""
        tensors = dict(self.tensors)
        if self.start is not None:
            tensors |= {f"start.{name}": tensor for name, tensor in self.start.tensors.items()}
        facts = {"names": list(self.names), "normalise": self.normalise, "unseen": self.unseen}
        return tensors, facts | {"chosen": dict(self.chosen)}

    @classmethod
    def restored(
        cls, tensors: Mapping[str, Tensor], facts: stored.Facts | stored.HeadFacts, *, where: str
    ) -> LinearHead:
        """What `state` gave; raises UserError where tensors or facts are not a head's."""
        needed = {"weight": 2, "bias": 1} | ({"start.weight": 2, "start.bias": 1} if "start.weight" in tensors else {})
        fitting = all(name in tensors and tensors[name].ndim == axes for name, axes in needed.items())
        if not fitting or not all(key in facts for key in ("names", "normalise", "unseen")):
            raise UserError("holds no linear head", where=where, hint="give one that a run wrote")
        shapes = {tuple(tensors[name].shape) for name in needed if name.endswith("weight")}
        rows = {len(tensors[name]) for name in needed} | ({len(facts["names"])} if facts["names"] else set())
        if len(shapes) > 1 or len(rows) > 1:
            raise UserError("holds a linear head whose parts do not fit", where=where, hint="give one that a run wrote")
        head = cls(
            tensors["weight"],
            tensors["bias"],
            tuple(facts["names"]),
            facts["normalise"],
            unseen=facts["unseen"],
            chosen=facts.get("chosen", {}),
        )
        if "start.weight" not in tensors:
            return head
        return replace(head, start=replace(head, weight=tensors["start.weight"], bias=tensors["start.bias"]))

    def save(self, path: Path, *, backbone: str) -> None:
        tensors, facts = self.state()
        stored.write(path, tensors, {"adapter": "linear_head", "backbone": backbone, **facts})

    @classmethod
    def load(cls, path: Path, *, device: str = "cpu") -> LinearHead:
        tensors, facts = stored.read(path, "linear_head", device)
        return cls.restored(tensors, facts, where=str(path))


def rows_by_config(known: Sequence[str], asked: Sequence[str], where: str) -> list[int] | None:
    """The rows of classes in a classifier whose own config names `known`; None where they are to be taken by place, with a warning where there are names.

    Case and `_` make no difference. Raises Unsuitable where only some of the names are known.
    """
    index = {_loose(name): i for i, name in enumerate(known)}
    missing = [name for name in asked if _loose(name) not in index]
    if not index:
        return None
    if not missing:
        return [index[_loose(name)] for name in asked]
    if len(missing) == len(asked) == len(known):
        first = f"{known[0]!r}, {known[1]!r}" if len(known) > 1 else repr(known[0])
        warnings.warn(
            f"{where}: its own config calls its classes {first} ...; the names that are asked for are taken by place",
            stacklevel=3,
        )
        return None
    raise Unsuitable(
        f"the classifier knows no class {missing[0]!r}" + (f" (nor {len(missing) - 1} more)" * (len(missing) > 1)),
        where=f"{where}, whose config names {', '.join(known[:5])}{', ...' * (len(known) > 5)}",
        hint="ask for its own classes",
    )


def _loose(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def by_class_name(heads: Sequence[LinearHead]) -> list[LinearHead]:
    """The heads with the same classes in the same order: the first one's, then what only others have, in their order.

    A head that lacks a class is given the mean of the rows of those that have it, so that they alone decide it. Heads without names
    stay as they are: their rows are those of the classes they are asked for.
    """
    import torch

    if len({head.normalise for head in heads}) > 1:
        raise Unsuitable(
            "one linear head reads normalised features, another one raw ones",
            hint="tune both heads from one start (init), or ensemble them",
        )
    if all(head.names == heads[0].names for head in heads) or not all(head.names for head in heads):
        return list(heads)
    names = tuple(dict.fromkeys(name for head in heads for name in head.names))
    at = [{name: i for i, name in enumerate(head.names)} for head in heads]
    for head, index in zip(heads, at):
        if len(index) < len(head.names):
            twice = next(name for name in head.names if head.names.count(name) > 1)
            raise UserError(f"a linear head has two classes {twice!r}", hint="give every class a name of its own")
    rows = [torch.cat([head.weight, head.bias[:, None]], 1) for head in heads]  # [K, D + 1]
    if len({row.shape[1] for row in rows}) > 1:
        return list(heads)  # of different backbones: their shapes tell

    def row(name: str, i: int) -> Tensor:
        having = [i] if name in at[i] else [j for j, index in enumerate(at) if name in index]
        return torch.stack([rows[j][at[j][name]] for j in having]).mean(0)

    wanted = [torch.stack([row(name, i) for name in names]) for i in range(len(heads))]
    known = [head.start for head in heads if head.start is not None]
    starts = by_class_name(known) if len(known) == len(heads) else [None] * len(heads)
    return [
        replace(head, weight=w[:, :-1].contiguous(), bias=w[:, -1].contiguous(), names=names, start=start)
        for head, w, start in zip(heads, wanted, starts)
    ]


def zero_shot(backbone: Backbone, classes: Classes) -> LinearHead:
    """The zero-shot classifier as a head of normalised features: rows are scale x normalised text features."""
    import torch.nn.functional as F

    text = F.normalize(ZeroShot().text_features(backbone, classes), dim=-1)
    return LinearHead(backbone.scale * text, backbone.bias.expand(len(text)).clone(), classes.names, True)


def class_means(
    features: Float[Tensor, "B D"], labels: Int[Tensor, " B"], classes: Classes, *, normalise: bool
) -> LinearHead:
    """The nearest class mean (Mensink et al. 2013) as a linear head: logits = t (x . mu_k - |mu_k|^2 / 2) = -t |x - mu_k|^2 / 2 + c(x).

    features [B, D], labels [B]. The inverse temperature t is the one with the least cross-entropy where each image is left out of
    its own class's mean, at most the one that puts mean classes 100 nats apart (where every left-out image is right, the loss falls without
    end); with one image a class nobody can be left out, and t puts mean classes 5 nats apart.
    """
    import torch
    import torch.nn.functional as F

    x = (F.normalize(features, dim=-1) if normalise else features).double()
    k = len(classes.names)
    counts = torch.bincount(labels, minlength=k).double()
    if int(counts.min()) == 0:
        empty = classes.names[int(counts.argmin())]
        raise UserError(f"no image of class {empty!r}", where="class means", hint="raise protocol.shots")
    sums = torch.zeros(k, x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, labels, x)
    means = sums / counts.to(x)[:, None]
    t = _inverse_temperature(x, labels, sums, counts.to(x))
    return LinearHead((t * means).float(), (-t / 2 * means.square().sum(-1)).float(), classes.names, normalise)


def _inverse_temperature(x: Tensor, labels: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    """Found over log t; the cross-entropy is convex in t."""
    import torch
    import torch.nn.functional as F

    means = sums / counts[:, None]
    distances = torch.cdist(x, means).square()  # [B, K]
    several = counts[labels] > 1
    apart = torch.pdist(means).square().mean().clamp_min(1e-12) if len(means) > 1 else x.new_ones(())
    if len(means) == 1 or not bool(several.any()):
        return 10 / apart
    others = (sums[labels] - x) / (counts[labels] - 1).clamp_min(1)[:, None]
    distances[torch.arange(len(x)), labels] = (x - others).square().sum(-1)
    distances, labels = distances[several], labels[several]
    low, high = (1e-3 / apart).log(), (200 / apart).log()
    return golden_section(lambda t: F.cross_entropy(-t.exp() / 2 * distances, labels), low, high).exp()
