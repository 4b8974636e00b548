"""The hooks a plugin can implement. Built-ins use the same ones.

Each `register_*` hook is called with a function `register(name, target, summary)`: `target` is a class or `"module:Class"`
(imported when it is first used, so that light commands stay light).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import pluggy

if TYPE_CHECKING:
    import typer

PROJECT = "mergekit_vl"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Register(Protocol):
    def __call__(self, name: str, target: type | str, summary: str = "") -> None: ...


@hookspec
def register_backbones(register: Register) -> None:
    """Frozen dataclasses with `build(device) -> Backbone`."""


@hookspec
def register_adapters(register: Register) -> None:
    """Adapter classes: what is tuned and merged on a backbone."""


@hookspec
def register_tuners(register: Register) -> None:
    """Frozen dataclasses with `tune(inputs: MergeInputs) -> Single`."""


@hookspec
def register_strategies(register: Register) -> None:
    """Frozen dataclasses with `merge(inputs: MergeInputs) -> Model`."""


@hookspec
def register_datasets(register: Register) -> None:
    """Frozen dataclasses with `load(reporter) -> Dataset`."""


@hookspec
def register_protocols(register: Register) -> None:
    """Frozen dataclasses with `task(dataset, seed) -> Task`."""


@hookspec
def register_commands(app: typer.Typer) -> None:
    """Add commands to the Typer application."""
