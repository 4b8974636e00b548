"""Recipes' files: those that are installed, and any other with `key=value` overrides as a Recipe."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mergekit_vl.errors import UserError, unknown
from mergekit_vl.recipes import yaml_text
from mergekit_vl.recipes.overrides import TYPED, held, overridden
from mergekit_vl.recipes.recipe import DEFAULTS, Recipe, parse
from mergekit_vl.system.regular_files import read_text, user_path

FORMER = {"folder_coop": "my_photos"}
"""Names of 0.1.0."""


def recipe_folders() -> tuple[Path, ...]:
    """Beside this file where the package was installed, and the repository's own in a checkout."""
    here = Path(__file__).parent
    return tuple(folder for folder in (here / "installed", here.parents[1] / "recipes") if folder.is_dir())


def installed_recipes() -> dict[str, Path]:
    return {path.stem: path for folder in reversed(recipe_folders()) for path in sorted(folder.glob("*.yaml"))}


def find_recipe(given: str) -> Path:
    """A path, or the name of an installed recipe."""
    path = user_path(given)
    if os.path.exists(path) and not path.is_dir():
        return path
    recipes = installed_recipes()
    if given in FORMER:
        warnings.warn(f"the recipe {given} is now {FORMER[given]}", FutureWarning, stacklevel=2)
        return recipes[FORMER[given]]
    if path.suffix == "" and len(path.parts) == 1 and given in recipes:
        return recipes[given]
    if path.parent == Path("recipes") and path.stem in recipes:  # as the README writes it, from any folder
        return recipes[path.stem]
    raise unknown("recipe", given, recipes)


def load_recipe(
    given: str,
    overrides: Sequence[str] = (),
    *,
    allow_env: Sequence[str] = (),
    check: Callable[[Recipe], object] = lambda recipe: None,
) -> Recipe:
    """Read, override and check a recipe's form; names and options are checked by `check`, that is `experiment.build`.

    What an override brought about is told of the override, and not of the recipe's file.
    """
    path = find_recipe(given)
    where = str(path)
    environment = {name: os.environ.get(name) for name in allow_env}
    config = held(_with_defaults(path), where=where)

    def made(words: Sequence[str]) -> Recipe:
        recipe = parse(overridden(config, words), name=path.stem, where=where, environment=environment)
        check(recipe)
        return recipe

    try:
        return made(overrides)
    except UserError as error:
        guilty = None if error.where == TYPED else _guilty(made, overrides, error.what)
        if guilty is None:
            raise
        rest = "" if error.where == where else error.where.removeprefix(f"{where}: ").removeprefix(f"{path.stem}: ")
        what = f"{rest}: {error.what}" if rest else error.what
        raise type(error)(what, where=f"{TYPED}, {guilty}", hint=error.hint) from None


def _with_defaults(path: Path) -> dict[str, object]:
    """A file's mapping; defaults come before the overrides, so that protocol.shots=4 finds the protocol of a recipe without one."""
    where = str(path)
    config: Any = yaml_text.parse(read_text(path, most=yaml_text.MOST_BYTES), where=where)
    if not isinstance(config, dict):
        from mergekit_vl.recipes.run_forms import RUN_KEYS

        raise UserError("a recipe is a mapping of keys", where=where, hint=f"use {', '.join(RUN_KEYS)}")
    return {**config, **{key: copy.deepcopy(value) for key, value in DEFAULTS.items() if key not in config}}


def _guilty(made: Callable[[Sequence[str]], Recipe], words: Sequence[str], what: str) -> str | None:
    """The override that brought a fault about; None where the recipe has it without."""

    def fault(words: Sequence[str]) -> str | None:
        try:
            made(words)
        except UserError as error:
            return error.what
        return None

    before = next((n for n in reversed(range(len(words))) if fault(words[:n]) != what), None)
    if before is None:
        return None
    if fault(words[:before]) is None or fault(()) is None:
        return words[before]
    return next((word for i, word in enumerate(words) if fault([*words[:i], *words[i + 1 :]]) is None), None)
