"""Everything that is registered, by kind and name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mergekit_vl.registry.plugins import Entry, registry
from mergekit_vl.testing.parts import check_backbone, check_dataset, check_protocol
from mergekit_vl.testing.promises import Broken, Violation, quick
from mergekit_vl.testing.trained import LITTLE, check_adapter, check_strategy, check_tuner

BY_KIND: dict[str, Callable[[Any], object]] = {
    "backbones": check_backbone,
    "tuners": check_tuner,
    "strategies": check_strategy,
    "datasets": check_dataset,
    "protocols": check_protocol,
}


def check_registered(entry: Entry, example: object = None) -> None:
    """Check a registered thing: `example` is an instance of its class, needed where an option must be given.

    An adapter comes from a registered tuner that makes one, unless it needs nothing.
    """
    cls = entry.resolve()
    if example is not None and not isinstance(example, cls):
        raise Violation(f"{entry.told}: the example is a {type(example).__name__}")
    if entry.kind == "adapters":
        check_adapter(_made(cls) if example is None else example)
        return
    try:
        BY_KIND[entry.kind](cls if example is None else example)
    except Violation as violation:
        raise Violation(f"{entry.told} of {entry.owner}: {violation}") from None


def _made(cls: type) -> Any:
    """An adapter of the class."""
    from mergekit_vl.testing import world

    try:
        return cls()
    except TypeError:
        pass
    for entry in registry().entries["tuners"].values():
        try:
            adapter = quick(entry.resolve(), {}, LITTLE).tune(world.inputs()).adapter
        except Broken:
            continue
        if type(adapter) is cls:
            return adapter
    raise Violation(f"{cls.__qualname__} is made by no registered tuner: give an example")
