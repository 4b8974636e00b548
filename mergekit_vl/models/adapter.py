"""The contract of adapters: how parameters make logits, in which space they are interpolated, how they are saved, loaded and described.

The rest of the package does not know which kinds of adapters exist. An adapter is a frozen dataclass that has the members of `Adapter`,
registered by its class; what is trained on it, merged and measured asks it through `Network` and `Line`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.classifier import Classes, Head, ImageEncoder

    Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class About:
    """Facts about a class of adapters."""

    one: str
    """Its name in messages: "a prompt"."""
    many: str
    """The name of its tensors in reports on several models: "contexts"."""
    reads: Literal["features", "images"] = "features"
    """What its logits are a function of: image features, which are stored, or the images themselves."""
    makes_texts: bool = False
    """Whether its classifier is made of text features on the backbone's own image features; `text_features` gives them."""
    linear: bool = False
    """Whether its logits are linear in its tensors, so that those of an average are the average of the logits."""
    exact_fisher: bool = False
    """Whether `Network.fisher` is known in closed form."""
    fresh_views: bool = True
    """Whether training sees every image augmented anew in each epoch; else the test view, or some views if asked."""
    lr: float = 0.002
    """Where none is given: of SGD for those that read features (in units of 1 / `Network.unit`), of AdamW for those that read images."""
    weight_decay: float = 5e-4
    without_file: str = ""
    """The registered name of adapters without tensors: nothing is saved of them but this; empty: `Adapter.save` writes a file."""


@dataclass(frozen=True)
class Usage:
    """How a saved adapter is used without this toolkit, for the model card."""

    told: str
    """Two sentences at most; `{main}` stands for the strategy that made it."""
    code: tuple[str, ...]
    imports: tuple[str, ...] = ()
    """Lines before those that load the backbone."""
    on_backbone: bool = True
    """Whether the lines that load the backbone come before `code`."""


class LinearClassifier(Protocol):
    """An adapter that is features @ weight.T + bias."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def normalise(self) -> bool: ...
    def save(self, path: Path, *, backbone: str) -> None: ...


@dataclass(frozen=True)
class Whole:
    """A whole model, for a folder that plain open_clip or timm loads."""

    backbone: Backbone
    """With the adapter's weights."""
    head: LinearClassifier | None


class Line(Protocol):
    """Segments from the trained weights w to a fixed second model w2, in the space in which they are straight.

    `first` and the w of `at` are in this representation, by name.
    """

    @property
    def first(self) -> Tensors:
        """The model before fine-tuning, w1."""
        ...

    def unit(self, *, weighted: bool) -> Tensor | float:
        """What squared distances to `first` are divided by; `weighted`: where a Fisher information weighs them."""
        ...

    def fisher(self, x: Tensor) -> Tensors | None:
        """At `first`, of prepared inputs, in closed form; None where it has to be sampled (`estimators.fisher_information`)."""
        ...

    def at(self, weights: Tensors, alphas: Tensor, x: Tensor) -> tuple[Tensors, Iterator[Tensor]]:
        """w, and logits: first those at w, [B, K], then those of the points w2 + alpha (w - w2), in parts of [A, B, K].

        Logits are made when they are asked for: their graph may go before the next ones are made.
        """
        ...


A = TypeVar("A")
"""A class of adapters."""


class Network(Protocol[A]):
    """Logits of some classes as a differentiable function of an adapter's tensors."""

    @property
    def weights(self) -> Tensors:
        """What is trained, by its name in `Adapter.tensors`, at the adapter's own values."""
        ...

    @property
    def leaves(self) -> Tensors:
        """`weights` as gradients move them, in few tensors; where the names are others, calls, `line` and `adapter` take these too."""
        ...

    @property
    def statistics(self) -> Tensors:
        """What a forward of the trained weights changes by itself: running statistics."""
        ...

    def prepare(self, x: Tensor) -> Tensor:
        """Features [..., D] (or images) as `__call__` reads them; done once."""
        ...

    def unit(self, x: Tensor) -> float:
        """Mean squared length of prepared inputs, where step sizes are in units of its inverse; else 1."""
        ...

    def __call__(self, weights: Tensors, x: Tensor) -> Tensor:
        """Prepared inputs of B images -> logits [B, K]. Where features are read, weights may have a leading [S]: logits [S, B, K]."""
        ...

    def fisher(self, x: Tensor) -> Tensors | None:
        """The diagonal Fisher information at the adapter's own values, in closed form; None unless `About.exact_fisher`."""
        ...

    def line(self, first: A, second: A, space: Literal["weights", "classifiers"]) -> Line:
        """From these weights to `second`, with `first` as w1. `space` is heeded by adapters that make texts."""
        ...

    def adapter(self, tensors: Tensors) -> A:
        """The adapter with these weights and statistics."""
        ...


class Adapter(Protocol):
    """What is tuned on a frozen backbone. Only adapters of one kind (equal `space`) can be merged."""

    @property
    def space(self) -> str: ...
    @property
    def about(self) -> About: ...

    # merging

    @property
    def tensors(self) -> Tensors: ...
    def with_tensors(self, tensors: Tensors) -> Self: ...
    def untuned(self, backbone: Backbone) -> Self:
        """The adapter before fine-tuning, with tensors of the same names and shapes."""
        ...

    def aligned(self, others: Sequence[Self]) -> Sequence[Self]:
        """Adapters of this space, itself the first of them, with the same classes in one order; raises Unsuitable where there is none."""
        ...

    # logits

    def image_encoder(self, backbone: Backbone) -> ImageEncoder: ...
    def bind(self, backbone: Backbone, classes: Classes) -> Head: ...
    def networks(self, backbone: Backbone, classes: Sequence[Classes], *, training: bool) -> Sequence[Network[Self]]:
        """A network for each set of classes, all of the same weights; `training` says in which mode. Raises Unsuitable where nothing is tuned."""
        ...

    def linear_maps(self, features: Tensor) -> Tensors:
        """By tensor name [out, in], the rows [N, in] that each linear map of raw image features [N, D] reads."""
        ...

    # files and reports

    @property
    def chosen(self) -> Mapping[str, float]:
        """Values by name that were chosen while it was tuned, or learned while it was merged."""
        ...

    def with_chosen(self, chosen: Mapping[str, float]) -> Self:
        """Itself where its file has no place for them."""
        ...

    def started_from(self, base: Adapter, backbone: Backbone, classes: Classes) -> Self:
        """The same, told where tuning began if its file did not tell; `base` is the model before fine-tuning."""
        ...

    def check(self, backbone: Backbone) -> None:
        """Raise UserError where it does not fit the backbone."""
        ...

    def save(self, path: Path, *, backbone: str) -> None:
        """Write one safetensors file that names the adapter (`stored.write`)."""
        ...

    @classmethod
    def load(cls, path: Path, *, device: str = "cpu") -> Self: ...

    def usage(self, backbone: Backbone) -> Usage | None:
        """None: from this toolkit alone."""
        ...

    def whole(self, backbone: Backbone) -> Whole | None:
        """None where it is no weights of the backbone itself."""
        ...


class TextAdapter(Adapter, Protocol):
    """An adapter with `about.makes_texts`: its classifier is made of text features, so classifiers can be mixed."""

    def text_features(self, backbone: Backbone, classes: Classes) -> Tensor:
        """Raw (un-normalised) text features [K, D]."""
        ...


@runtime_checkable
class ReadsOthers(Protocol):
    """An adapter that also reads files of other programs, which do not name the adapter."""

    @classmethod
    def recognises(cls, names: Collection[str]) -> bool:
        """Whether a file of tensors with these names is read as this adapter. Plugins are asked first, then built-ins, in order."""
        ...

    @classmethod
    def read(cls, path: Path, backbone: Backbone) -> Self:
        """Raises UserError where the file is damaged, or made for another backbone."""
        ...


@runtime_checkable
class HasInit(Protocol):
    """An adapter whose tuning starts from words, which files of other programs do not contain."""

    def with_init(self, init: str) -> Self: ...
