"""`mergekit-vl list` and `show`: what there is, and the options of each."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Annotated

import typer

from mergekit_vl import options
from mergekit_vl.commands.terminal import say
from mergekit_vl.errors import unknown
from mergekit_vl.recipes.loading import installed_recipes
from mergekit_vl.registry import plugins
from mergekit_vl.registry.plugins import registry

SHOWN = (*plugins.KINDS, "recipes", "plugins")


def list_(kind: Annotated[str | None, typer.Argument(help=" | ".join(SHOWN))] = None) -> None:
    """What there is: strategies, backbones, adapters, tuners, datasets, protocols, recipes, plugins."""
    if kind is not None and kind not in SHOWN:
        raise unknown("kind", kind, SHOWN)
    for each in [kind] if kind else SHOWN:
        if not kind:
            say(f"{each}:")
        indent = "" if kind else "  "
        for name, text in _listing(each, registry()):
            say(f"{indent}{name:18s} {text}".rstrip())


def _listing(kind: str, known: plugins.Registry) -> list[tuple[str, str]]:
    if kind == "recipes":
        return [(name, _first_comment(path)) for name, path in sorted(installed_recipes().items())]
    if kind == "plugins":
        failed = [(owner, f"FAILED: {reason}") for owner, reason in known.failures.items()]
        return [(owner, "loaded") for owner in known.owners()] + failed
    return [
        (e.name, e.summary + ("" if e.owner in plugins.DEFAULT_PLUGINS else f" [{e.owner}]"))
        for e in known.entries[kind].values()
    ]


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def show(name: Annotated[str, typer.Argument(help="a strategy, tuner, backbone, dataset, protocol or recipe")]) -> None:
    """Options with types, defaults and meaning, and the source."""
    recipes = installed_recipes()
    if name in recipes:
        say(*recipes[name].read_text(encoding="utf-8").splitlines())
        return
    kinds = registry().entries.values()
    found = [entries[name] for entries in kinds if name in entries]
    if not found:
        raise unknown("name", name, [n for entries in kinds for n in entries] + list(recipes))
    for entry in found:
        cls = entry.resolve()
        say(f"{entry.name} ({entry.kind}, from {entry.owner}): {entry.summary}", "")
        say(*(inspect.getdoc(cls) or "").splitlines())
        module = sys.modules[cls.__module__].__doc__
        if module:
            say("", *inspect.cleandoc(module).splitlines())
        if dataclasses.is_dataclass(cls) and dataclasses.fields(cls) and entry.kind != "adapters":
            say("", "Options:")
            for key, kind, default, meaning in options.describe(cls):
                say(f"  {key}: {kind} = {default}", f"      {meaning}")
