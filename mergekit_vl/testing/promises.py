"""How promises are checked: all of them, those that a class is exempt from with its reasons, and one error with what is not kept."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from mergekit_vl.errors import UserError
from mergekit_vl.registry import contracts

if TYPE_CHECKING:
    from collections.abc import Iterator


class Violation(AssertionError):
    """Promises that are not kept, a line each."""


@runtime_checkable
class HasExemptions(Protocol):
    @property
    def exempt(self) -> Mapping[str, str]:
        """Of any registered class: promises that it cannot keep, with the reason."""
        ...


class Promises:
    """Promises of one thing. Each is checked in `with promises("its name"):`; whatever is raised there breaks it."""

    def __init__(self, thing: object) -> None:
        self.name = thing.__qualname__ if isinstance(thing, type) else repr(thing)
        self.exempt = dict(thing.exempt) if isinstance(thing, HasExemptions) else {}
        self.kept: list[str] = []
        self.broken: dict[str, str] = {}

    @contextmanager
    def __call__(self, promise: str) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.broken.setdefault(promise, f"refused: {error}")
        except Exception as error:
            self.broken.setdefault(
                promise, f"{error}" if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
            )
        else:
            self.kept.append(promise)

    def settle(self) -> None:
        """Raise Violation for what is broken, and for exemptions from what is kept or not asked for."""
        wrong = [f"{promise}: {why}" for promise, why in self.broken.items() if promise not in self.exempt]
        for promise, reason in self.exempt.items():
            if not reason:
                wrong.append(f"{promise}: exempt without a reason")
            elif promise not in self.broken:
                wrong.append(
                    f"{promise}: exempt ({reason}), but {'it is kept' if promise in self.kept else 'nobody asks for it'}"
                )
        if wrong:
            raise Violation("\n".join([f"{self.name} does not conform:", *(f"  {line}" for line in wrong)]))


class Broken(Exception):
    """A promise that is not kept, in words."""


def require(kept: bool, what: str) -> None:
    if not kept:
        raise Broken(what)


def check_documented(promises: Promises, cls: type) -> None:
    """A docstring, and a meaning for every option; no option that has a key of the recipe's own."""
    with promises("documented"):
        doc = inspect.getdoc(cls) or ""
        require(bool(doc) and not doc.startswith(f"{cls.__name__}("), "the class has no docstring")
        for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
            require(
                not field.init or bool(field.metadata.get("help")),
                f"the option {field.name} has no meaning: use option()",
            )
            require(field.name not in ("name", "label", "input", "grid"), f"{field.name} is a key of the recipe itself")


def begun(thing: object, kind: str) -> Promises:
    """Promises of a class of options or of an instance of one, with those that every kind makes: documented, and as its contract says."""
    cls = thing if isinstance(thing, type) else type(thing)
    promises = Promises(cls)
    check_documented(promises, cls)
    with promises("contract"):
        require(not (faults := contracts.faults(cls, kind)), "; ".join(faults))
    return promises


def quick(cls: type, given: Mapping[str, object], less: Mapping[str, object]) -> Any:
    """An instance with little to do: `less` are values of options that it has; raises Broken where an option is required and not given."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in given]
    require(not missing, f"{cls.__qualname__} cannot be made without {', '.join(missing)}: give an instance")
    return cls(**{name: value for name, value in less.items() if name in fields} | dict(given))


T = TypeVar("T")


def twice(make: Callable[[], T]) -> tuple[T, T]:
    return make(), make()
