"""`@closed_form`: the decorator that turns a dataclass with a formula into a strategy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from mergekit_vl.errors import unknown
from mergekit_vl.merging.chunks import Models, Run, Tensor
from mergekit_vl.merging.method import ClosedForm, MethodInfo, check_class, check_usual
from mergekit_vl.strategies.in_memory import merge_adapters

Cls = TypeVar("Cls", bound=type)


def closed_form(name: str, **traits: Any) -> Callable[[Cls], Cls]:
    """Add to a frozen dataclass with `merge_chunk(chunk, stats)` the other members of `ClosedForm`; `traits` are those of `MethodInfo`.

    A `check` of its own comes after the usual one: the number of models, a base where one is needed, the options that are
    coefficients. What the class does not define is the usual thing: `describe` gives the traits, `whole` takes every tensor,
    `prepass` knows nothing, `merge` merges adapters in memory.
    """
    known = [field.name for field in dataclasses.fields(MethodInfo)]
    if wrong := [key for key in traits if key not in known]:
        raise unknown("trait", wrong[0], known, where=f"strategy {name}")
    info = MethodInfo(name, **traits)

    def of(cls: Cls) -> Cls:
        check_class(cls)
        own = vars(cls).get("check")

        def check(self: ClosedForm, models: Models) -> None:
            check_usual(self, models)
            if own is not None:
                own(self, models)

        usual = {"describe": describe, "whole": whole, "prepass": prepass, "merge": merge_adapters} | vars(cls)
        given = {name: usual[name] for name in ("describe", "whole", "prepass", "merge")}
        for name, member in {**given, "info": info, "check": check}.items():
            setattr(cls, name, member)
        return cls

    return of


def describe(self: ClosedForm, n: int) -> MethodInfo:
    return self.info


def whole(self: ClosedForm, tensor: Tensor, n: int) -> bool:
    return True


def prepass(self: ClosedForm, models: Models, run: Run, chunk_size: int) -> None:
    return None
