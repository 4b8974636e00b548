"""The one reader of recipes' mappings: plain data into pydantic models, with errors that name the key and how to mend it.

A form is a frozen pydantic model; `TOLD` says what is told of a value that does not fit, by its place: "dataset.*.name" is the name of each
data set. The message of the longest place that leads to the fault is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from mergekit_vl.errors import UserError, unknown

F = TypeVar("F", bound="Form")
Listed = BeforeValidator(lambda value: value if isinstance(value, list) else [value])
"""One value is a list of one."""
AsText = Annotated[str, BeforeValidator(str)]
"""Numbers and the like are text as they stand."""


@dataclass(frozen=True)
class Told:
    """What is told of a value; `{place}` is where it stands, `{key}` its last step, `{value}` the value as Python writes it."""

    what: str
    hint: str
    within: bool = False
    """Whether the error's place names what holds the value: "r.yaml: strategy.0 ties"."""


@dataclass(frozen=True)
class Keys:
    """The keys that a mapping has, and what an error calls them."""

    names: tuple[str, ...]
    kind: str = "key"
    missing: Mapping[str, str] = field(default_factory=dict)
    """How a missing one is written."""
    within: str = ""
    """The section of the recipe that the mapping is."""


class Form(BaseModel):
    """The base of all forms: nothing is converted, and no key is passed over but by those that say so."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    TOLD: ClassVar[Mapping[str, Told]] = {}
    KEYS: ClassVar[Mapping[str, Keys]] = {}
    """Of mappings whose unknown keys get the nearest one, by place; "" is the whole."""


def read(form: type[F], given: Mapping[str, object], *, where: str) -> F:
    """The form of plain data; raises UserError for the first fault, unknown keys before all others."""
    try:
        return form.model_validate(given)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        unknown_keys = [fault for fault in faults if fault["type"] == "extra_forbidden" and len(fault["loc"]) == 1]
        raise _error(form, given, (unknown_keys or faults)[0], where) from None


def _error(form: type[Form], given: object, fault: ErrorDetails, where: str) -> UserError:
    steps = list(fault["loc"])
    holder = ".".join(_pattern(steps[:-1]))
    if fault["type"] in ("extra_forbidden", "missing") and holder in form.KEYS:
        keys, key = form.KEYS[holder], str(steps[-1])
        if fault["type"] == "missing" and key in keys.missing:
            return UserError(f"{key!r} is missing", where=where, hint=f"add {keys.missing[key]}")
        if fault["type"] == "extra_forbidden":
            place = _place(given, steps[:-1]) or keys.within
            return unknown(keys.kind, key, keys.names, where=f"{where}: {place}" if place else where)
    while ".".join(_pattern(steps)) not in form.TOLD and steps:
        steps.pop()
    told = form.TOLD.get(".".join(_pattern(steps)), Told("{key}={value}", "see the recipes that are installed"))
    place, value = _place(given, steps), _value(given, steps)
    texts = {"place": place, "key": str(steps[-1]) if steps else "", "value": repr(value)}
    if told.within:
        above: Any = _value(given, steps[:-1])
        where = f"{where}: {_place(given, steps[:-1])} {above['name']}"
    return UserError(told.what.format_map(texts), where=where, hint=told.hint.format_map(texts))


def _pattern(steps: Sequence[str | int]) -> list[str]:
    return ["*" if isinstance(step, int) else step for step in steps]


def _walk(given: object, steps: Sequence[str | int]) -> tuple[list[str], object]:
    """The steps as the data has them, one value standing for a list of one, and what they lead to; None where nothing stands."""
    place = []
    for step in steps:
        if isinstance(step, int) and not isinstance(given, list):
            continue
        place.append(str(step))
        if isinstance(given, list):
            given = given[int(step)]
        else:
            given = given.get(step) if isinstance(given, Mapping) else None
    return place, given


def _place(given: object, steps: Sequence[str | int]) -> str:
    return ".".join(_walk(given, steps)[0])


def _value(given: object, steps: Sequence[str | int]) -> object:
    return _walk(given, steps)[1]
