"""The contract of closed forms: a formula of tensors, written once, for adapters in memory and for files on disk.

`MethodInfo` is all that the engine, `merge`, `check`, `run` and `bench` know of one. `strategies.closed_form.closed_form` makes one of a
frozen dataclass, and `check_class` refuses, when it is made, what is none.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import Failed
from mergekit_vl.merging.chunks import Chunk, Models, Run, Tensor
from mergekit_vl.options import check_effect, key_of
from mergekit_vl.registry.calls import named

Chunks = Literal["accumulating", "elementwise", "rows", "tensor"]


@dataclass(frozen=True)
class MethodInfo:
    """The traits of a closed form; the rest of the package assumes nothing else about it."""

    name: str
    """The registered name; messages begin with it."""
    chunks: Chunks = "elementwise"
    """What a chunk is: "accumulating" and "elementwise" are flat ranges (the first is read model by model, and its memory
    does not grow with their number), "rows" whole slices along the first axis, "tensor" whole tensors."""
    averages: bool = False
    """Whether it is a weighted mean of the models; otherwise BatchNorm statistics take the plain mean of the tuned ones."""
    needs_base: bool = False
    at_least: int = 1
    """Smallest number of tuned models; `at_most` is the largest, None is any."""
    at_most: int | None = None
    ignores_base: bool = False
    """Whether the base contributes integer tensors only."""
    passes: int = 0
    """Passes over the files before the merge (`prepass`)."""
    svds: int = 0
    """SVDs per tensor that is merged whole."""
    stacked: float = 1.0
    """Tensors whose singular vectors are held side by side, as a multiple of one that is merged whole."""
    weights: str = "weights"
    """The option that takes the models' weights by label, as in `merge A B A=0.3 B=0.7`."""
    weighs_base: bool = False
    """Whether the base has a weight there too."""
    by_task: bool = False
    """Whether it makes one model per task and no task was chosen (`strategies.in_memory.merge_by_task`)."""
    alone: Mapping[str, object] | str = dataclasses.field(default_factory=dict, hash=False)
    """Options with which one model, given once or several times, merges to itself; or the reason why there are none. `testing` checks it."""

    def __post_init__(self) -> None:
        if self.chunks not in get_args(Chunks):
            raise Failed(f"chunks={self.chunks!r}", where=self.where, hint=f"one of {', '.join(get_args(Chunks))}")

    @property
    def where(self) -> str:
        """Before messages."""
        return f"strategy {self.name}"


@runtime_checkable
class ClosedForm(Protocol):
    """A frozen dataclass whose fields are its options."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def info(self) -> MethodInfo:
        """Of the class, whatever the options."""
        ...

    def describe(self, n: int) -> MethodInfo:
        """With these options, for n tuned models."""
        ...

    def whole(self, tensor: Tensor, n: int) -> bool:
        """Whether chunks "tensor" takes this one whole, and not in flat chunks."""
        ...

    def check(self, models: Models) -> None:
        """Raise UserError for options that do not fit the models; reads no tensor."""
        ...

    def prepass(self, models: Models, run: Run, chunk_size: int) -> Any:
        """Statistics of all tensors that are needed before the first is merged (`prepass.py`); `merge_chunk` gets them as `stats`."""
        ...

    def merge_chunk(self, chunk: Chunk, stats: Any) -> Array:
        """The formula: the merged elements of a chunk, as one array."""
        ...


MEMBERS = {
    "merge_chunk": ("chunk", "stats"),
    "check": ("models",),
    "prepass": ("models", "run", "chunk_size"),
    "describe": ("n",),
    "whole": ("tensor", "n"),
    "merge": ("inputs",),
}
"""The methods and their parameters. A class must have `merge_chunk`; `closed_form` adds the others."""


def is_frozen_dataclass(cls: type) -> bool:
    """Whether the class is a dataclass whose instances cannot be changed."""
    parameters = inspect.getattr_static(cls, "__dataclass_params__", None)
    return dataclasses.is_dataclass(cls) and bool(parameters.frozen)


def check_class(cls: type) -> None:
    """Raise Failed for a class that is not a closed form; the message names the class, the member and what was expected."""
    where = cls.__qualname__
    if not is_frozen_dataclass(cls):
        raise Failed("is no frozen dataclass", where=where, hint="write @dataclass(frozen=True) below @closed_form")
    for name, parameters in MEMBERS.items():
        member, call = inspect.getattr_static(cls, name, None), f"{name}({', '.join(parameters)})"
        if member is None and name == "merge_chunk":
            raise Failed(f"has no {call}", where=where, hint="see docs/plugins.md")
        if member is None:
            continue
        if not callable(member):
            raise Failed(f"{name} is no method but {member!r}", where=where, hint=f"define {call}")
        try:
            inspect.signature(member).bind("self", *parameters)
        except TypeError:
            told = f"{name}{inspect.signature(member)} cannot be called as {call}"
            raise Failed(told, where=where, hint=f"define {call[:-1].replace('(', '(self, ')})") from None


def as_closed_form(method: object) -> ClosedForm:
    """The method itself; raises Failed for an object that is not a closed form."""
    if not isinstance(method, ClosedForm):
        raise Failed("is no closed form", where=named(method), hint="write @closed_form(...) above its class")
    return method


def info_of(cls: type) -> MethodInfo | None:
    """What a class of closed forms is; None for any other strategy's."""
    found = inspect.getattr_static(cls, "info", None)
    return found if isinstance(found, MethodInfo) else None


def described(strategy: object, n: int) -> MethodInfo | None:
    """What a strategy is with its options, for n tuned models; None where it is no closed form."""
    return strategy.describe(n) if isinstance(strategy, ClosedForm) else None


def check_usual(method: ClosedForm, models: Models) -> None:
    """Raise UserError for too few or too many models, a missing base, and options that are not the models' (`coefficient`, `per_model`)."""
    info = method.describe(len(models.tuned))
    models.check_count(info.where, at_least=info.at_least, at_most=info.at_most, needs_base=info.needs_base)
    fields = {field.name: field for field in dataclasses.fields(method)}
    for name, field in fields.items():
        value, key = vars(method)[name], key_of(field)
        if "range" in field.metadata and value is not None:
            models.check_coefficient(info.where, value, key, *field.metadata["range"])
        if "per_model" not in field.metadata or not value:
            continue
        if info.weighs_base and key == info.weights:
            models.check_weights(info.where, value, models.member_labels, key, "models")
        else:
            models.check_weights(info.where, value, models.labels, key)
        if shared := field.metadata["per_model"]:
            check_effect(method, (shared,), where=info.where, why=f"beside {key}")
            for each in value:
                models.check_coefficient(info.where, each, key_of(fields[shared]), *fields[shared].metadata["range"])
