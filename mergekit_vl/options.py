"""Options are the fields of frozen dataclasses: documented with `option`, checked by pydantic, built with `build`."""

from __future__ import annotations

import dataclasses
import typing
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol, TypeVar

from mergekit_vl.errors import Unsuitable, UserError, unknown

MOST_SEED = 2**32 - 1
"""Every generator takes one as large, and those that are derived from it."""


class Options(Protocol):
    """An instance of a dataclass whose fields are options."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


T = TypeVar("T", bound=Options)


def option(
    default: object = dataclasses.MISSING,
    help: str = "",
    *,
    formerly: str | None = None,
    values_formerly: Mapping[str, str] = {},
) -> Any:
    """A dataclass field with its meaning; without a default it must be given.

    `formerly` is a key that it had, `values_formerly` names its values by names that they had: both are taken, with a warning.
    """
    told = {"help": help, "formerly": formerly, "values_formerly": values_formerly}
    return dataclasses.field(default=default, metadata=told)


def key_of(field: dataclasses.Field[Any]) -> str:
    """The key in a recipe: `lambda_` is written `lambda`."""
    return field.name.rstrip("_")


def build(cls: type[T], given: Mapping[str, object], *, where: str) -> T:
    """An instance of the dataclass `cls` from a recipe's mapping; raises UserError for unknown, missing and ill-typed keys."""
    from pydantic import TypeAdapter, ValidationError

    fields = {key_of(field): field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for given_key, given_value in given.items():
        key, value = _current(given_key, given_value, fields, where)
        if key not in fields:
            raise unknown("key", key, fields, where=where)
        field = fields[key]
        if field.name in values:
            raise UserError(f"{key} is given twice, once as {given_key}", where=where, hint="leave one out")
        try:
            values[field.name] = TypeAdapter(hints[field.name]).validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise UserError(f"{key}={value!r}: {problem}", where=where, hint=field.metadata.get("help", "")) from None
    missing = [key for key, f in fields.items() if f.name not in values and f.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"{missing[0]!r} is missing", where=where, hint=fields[missing[0]].metadata.get("help", ""))
    return cls(**values)


def _current(key: str, value: object, fields: Mapping[str, dataclasses.Field[Any]], where: str) -> tuple[str, object]:
    """A key and its value as they are called today; warns of those that were called something else."""
    now = key if key in fields else next((k for k, f in fields.items() if f.metadata.get("formerly") == key), key)
    renamed = fields[now].metadata.get("values_formerly", {}) if now in fields else {}
    current = renamed.get(value, value) if isinstance(value, str) else value
    if (now, current) != (key, value):
        message = f"{where}: {key}={value} is now written {now}={current}"
        warnings.warn(message, FutureWarning, stacklevel=2)
    return now, current


def values(given: Options) -> dict[str, Any]:
    """Of an instance: its options by key."""
    return {key_of(field): getattr(given, field.name) for field in dataclasses.fields(given) if field.init}


def check(given: Options, *, where: str = "", **rules: tuple[bool, str]) -> None:
    """Raise UserError for the first of these fields that breaks its rule: whether its value is valid, and which are."""
    told = {field.name: field for field in dataclasses.fields(given)}
    for name, (valid, hint) in rules.items():
        if not valid:
            key = key_of(told[name])
            raise UserError(f"{key}={values(given)[key]}", where=where, hint=hint)


def check_effect(given: Options, names: Iterable[str], *, where: str, why: str, read: bool = False) -> None:
    """Raise UserError for the first of the fields `names` that was given (is not its default) although nothing reads it here.

    `read`: whether something does, where that depends on other options or on the models.
    """
    for field in dataclasses.fields(given) if not read else ():
        value = getattr(given, field.name)
        if field.name in names and value != field.default:
            raise Unsuitable(f"{key_of(field)}={value} has no effect {why}", where=where, hint="leave it out")


def describe(cls: type) -> list[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of each option."""
    rows = []
    for field in dataclasses.fields(cls):
        default = "required" if field.default is dataclasses.MISSING else repr(field.default)
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        rows.append((key_of(field), kind, default, field.metadata.get("help", "")))
    return rows
