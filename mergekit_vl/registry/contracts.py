"""Whether a registered class has the members of its kind, checked against the kind's protocols when it is registered.

The protocols are named and not imported, as built-ins are: a check of a class imports those of its kind, and none of them imports torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeAlias

PROTOCOLS = {
    "backbones": ("mergekit_vl.backbones.base:BackboneOptions", "HasBase"),
    "adapters": ("mergekit_vl.models.adapter:Adapter", "TextAdapter", "ReadsOthers", "HasInit"),
    "tuners": ("mergekit_vl.tuners.base:Tuner", "MovesTower"),
    "strategies": (
        "mergekit_vl.strategies.base:Strategy",
        *("Trains", "HasGrid", "HasControls", "TrainsOn"),
    ),
    "datasets": ("mergekit_vl.datasets.base:DatasetOptions", "HasNamedBy"),
    "protocols": ("mergekit_vl.protocols.base:EvaluationProtocol", "IsJoint", "TunesOnFirst", "HasShots"),
}
"""By kind: the protocol that a class must fit, then those of the same module whose members it may have."""
ABOUT = "mergekit_vl.models.adapter:About"
"""What an adapter declares; one that makes texts must fit `TextAdapter`."""


Method: TypeAlias = "types.FunctionType | classmethod[Any, Any, Any]"
"""A member of a protocol that is called."""


def faults(target: object, kind: str) -> tuple[str, ...]:
    """What is wrong with a class as one of this kind, a line each, with what was expected; empty for one that fits."""
    if not isinstance(target, type):
        return (f"{target!r} is not a class: a frozen dataclass was expected",)
    return _faults(target, kind)


@cache
def _faults(cls: type, kind: str) -> tuple[str, ...]:
    required, *optional = _protocols(kind)
    found = [*_members_fit(cls, required, required=True)]
    for protocol in optional:
        found += _members_fit(cls, protocol, required=protocol.__name__ in _declared(cls))
    if not dataclasses.is_dataclass(cls):
        fields = "what it holds" if kind == "adapters" else "the options"
        found.append(f"{cls.__qualname__} is not a dataclass: a frozen dataclass was expected, its fields are {fields}")
    return tuple(found)


def _declared(cls: type) -> tuple[str, ...]:
    """Of an adapter: the protocols that it says it fits beside its kind's."""
    about = inspect.getattr_static(cls, "about", None)
    return ("TextAdapter",) if isinstance(about, _named(ABOUT)) and about.makes_texts else ()


def _protocols(kind: str) -> list[type]:
    first, *others = PROTOCOLS[kind]
    module = first.partition(":")[0]
    return [_named(first), *(_named(f"{module}:{name}") for name in others)]


def _named(place: str) -> Any:
    """What `"module:name"` is."""
    module, _, name = place.partition(":")
    return vars(importlib.import_module(module))[name]


def _members_fit(cls: type, protocol: type, *, required: bool) -> Iterator[str]:
    for name, member in vars(protocol).items():
        if name.startswith("_") or not isinstance(member, (types.FunctionType, classmethod, property)):
            continue
        try:
            own = inspect.getattr_static(cls, name)
        except AttributeError:
            if required and name not in _fields(cls):
                yield f"{cls.__qualname__} has no {name}: {_told(name, member)} was expected"
            continue
        if isinstance(member, property):
            yield from _value_fits(cls, name, member, own)
        else:
            yield from _method_fits(cls, name, member, own)


def _fields(cls: type) -> set[str]:
    """Attributes that instances have and the class does not: fields without a default."""
    return {name for base in cls.__mro__ for name in vars(base).get("__annotations__", {})}


def _method_fits(cls: type, name: str, member: Method, own: object) -> Iterator[str]:
    """Whether it takes what the protocol's method is called with: its parameters, by position unless they have to be named."""
    wanted = list(inspect.signature(_function(member)).parameters.values())[1:]
    named = {p.name: None for p in wanted if p.kind is p.KEYWORD_ONLY}
    called = own.__func__ if isinstance(own, (classmethod, staticmethod)) else own
    if not callable(called):
        yield f"{cls.__qualname__}.{name} is {own!r}: {_told(name, member)} was expected"
        return
    bound = isinstance(own, (types.FunctionType, classmethod))  # a static method, or another callable, gets no self
    if isinstance(member, classmethod) and isinstance(own, types.FunctionType):
        yield f"{cls.__qualname__}.{name} is a method of instances: the class method {_told(name, member)} was expected"
        return
    try:
        signature = inspect.signature(called)
    except (ValueError, TypeError):  # a callable that does not tell
        return
    try:
        signature.bind(*([None] * bound), *(None for _ in wanted[len(named) :]), **named)
    except TypeError:
        yield f"{cls.__qualname__}.{name}{signature} cannot be called so: {_told(name, member)} was expected"


def _value_fits(cls: type, name: str, member: property, own: object) -> Iterator[str]:
    """Whether a plain value is of the type that the protocol's property gives; what instances make is not asked for."""
    if isinstance(own, staticmethod):
        value: object = own.__func__
    elif inspect.isdatadescriptor(own) or inspect.ismethoddescriptor(own):
        return
    else:
        value = own
    try:
        hint = typing.get_type_hints(member.fget)["return"]
    except NameError:  # a type that is imported for type checkers alone
        return
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if not isinstance(value, tuple(typing.get_origin(each) or each for each in kinds)):
        yield f"{cls.__qualname__}.{name} is {value!r}: {_told(name, member)} was expected"


def _function(member: Method) -> Callable[..., object]:
    return member.__func__ if isinstance(member, classmethod) else member


def _told(name: str, member: Method | property) -> str:
    """A protocol's member as messages write it: `merge(inputs: MergeInputs) -> Model`, `trains: bool`."""
    if isinstance(member, property):
        return f"{name}: {member.fget.__annotations__['return'] if member.fget else ''}"
    signature = inspect.signature(_function(member))
    parameters = list(signature.parameters.values())[1:]
    return f"{name}{str(signature.replace(parameters=parameters)).replace(chr(39), '')}"
