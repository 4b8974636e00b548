"""The command line: arguments in, tables out; no maths."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mergekit_vl import __version__
from mergekit_vl.commands.exits import USAGE, exit_code
from mergekit_vl.commands.terminal import ours_alone, say, warn
from mergekit_vl.errors import Failed, UserError
from mergekit_vl.registry import plugins
from mergekit_vl.registry.calls import blamed, told
from mergekit_vl.registry.plugins import registry

COMMANDS = {
    "run": ("run:run", "Tune, merge, evaluate and report; rerun the same command to resume."),
    "bench": (
        "bench:bench",
        "Compare strategies with the same tuned models, images, selection and evaluator; rerun the same command to resume.",
    ),
    "landscape": (
        "landscape:landscape",
        "Loss, accuracy and barriers on the lines zero-shot -> merged -> tuned, and on the plane through the three; of the recipe's first strategy.",
    ),
    "path": ("landscape:path", ""),
    "cache": ("cache:cache", "Show the stored image features (MERGEKIT_VL_CACHE moves them elsewhere), or clear them."),
    "merge": (
        "merge:merge",
        "Merge checkpoints, weights only: no data, no model is built, any size of model in little memory.",
    ),
    "verify": ("merge:verify", "Merge again from the recorded inputs and compare every byte; writes nothing."),
    "repair": (
        "jobs:repair",
        "Repair a fine-tuned model that forgot: the best merge with the model before, on your images; without images, MonoSoup.",
    ),
    "soup": (
        "jobs:soup",
        "Make one model of several tuned from one base: the greedy soup and the uniform one; models must be on disk, nothing is trained.",
    ),
    "eval": (
        "use:evaluate",
        "Score a finished model, or a backbone as it is, on a dataset, against all of its class names.",
    ),
    "predict": ("use:predict", "Name what is on images, with probabilities."),
    "check": (
        "check:check",
        "Validate a recipe, or models to be merged, and print the plan; reads no weights and no images.",
    ),
    "list": (
        "listing:list_",
        "What there is: strategies, backbones, adapters, tuners, datasets, protocols, recipes, plugins.",
    ),
    "show": ("listing:show", "Options with types, defaults and meaning, and the source."),
}
"""By name: the command's place in this folder, and the first line of its help; none of a former name, which `--help` does not list.

A command is imported when it is called.
"""


def _version(value: bool) -> None:
    if value:
        say(f"mergekit-vl {__version__}")
        raise typer.Exit


def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
    plugins_dir: Annotated[
        Path | None, typer.Option(help="load the *.py plugins of this folder too (or set MERGEKIT_VL_PLUGINS)")
    ] = None,
) -> None:
    """`plugins_dir` is read by `main`, since a plugin may bring commands."""


def application(command: str | None = None) -> typer.Typer:
    """Our commands, the place for those of plugins; of all but `command`, if one is named, it has what `--help` lists and no more."""
    app = typer.Typer(
        help="Merge vision-language models: what fine-tuning taught, without losing what the model knew.",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(root)
    for name, (place, summary) in COMMANDS.items():
        if command in (None, name):
            app.command(name, hidden=not summary)(_readable(_imported(place)))
        else:
            app.command(name, help=summary, hidden=not summary)(_not_called)
    return app


def _imported(place: str) -> Callable[..., None]:
    module, _, function = place.partition(":")
    found: Callable[..., None] = vars(importlib.import_module(f"mergekit_vl.commands.{module}"))[function]
    return found


def _not_called() -> None:
    """It stands for the commands that are not called."""


def _readable(command: Callable[..., None]) -> Callable[..., None]:
    """A command that prints nothing but its JSON where that is asked for."""

    @functools.wraps(command)
    def call(**given: object) -> None:
        with ours_alone() if given.get("as_json") else contextlib.nullcontext():
            command(**given)

    return call


def main() -> None:
    """One line and exit code 2 for every error that the user or the system can mend."""
    plain = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
        if Path(filename).is_relative_to(Path(__file__).parent.parent):
            return warn(str(message))
        plain(message, category, filename, *rest, **more)

    warnings.showwarning = show
    words = sys.argv[1:] or ["--help"]
    app = application(_named(words))
    sys.exit(exit_code(lambda: _call(app, words), starting=lambda: _load_plugins(app, words)))


def _named(words: list[str]) -> str:
    """The command among the words; "" where there is none."""
    named = [w for i, w in enumerate(words) if not w.startswith("-") and words[max(0, i - 1)] != "--plugins-dir"]
    return "".join(named[:1])


def _load_plugins(app: typer.Typer, words: list[str]) -> None:
    """Before Typer reads the words: plugins may bring commands."""
    for i, word in enumerate(words):
        if word.split("=")[0] == "--plugins-dir":
            os.environ["MERGEKIT_VL_PLUGINS"] = word.partition("=")[2] or "".join(words[i + 1 : i + 2])
    command, asks = _named(words), not {"--help", "--version"}.isdisjoint(words)
    if asks and command in COMMANDS:
        return
    if asks or command in ("", "list", "show"):  # a glance does not wait for a plugin as a merge does
        os.environ.setdefault(plugins.PATIENCE, "10")
    registry().add_commands(app)
    for owner, reason in registry().failures.items():
        warn(f"plugin {owner} was not loaded: {reason}")


def _call(app: typer.Typer, words: list[str]) -> None:
    for before, word in zip(["", *words], words):
        option = before if not word else word[:-1] if word.endswith("=") else ""
        if option.startswith("-"):  # Path would read it as this folder
            raise UserError(f"{option} is empty", where="command line", hint="give it a value, or leave it out")
    command = typer.main.get_command(app)
    with command.make_context("mergekit-vl", words) as context:  # `app()` would end the process itself
        try:
            command.invoke(context)
        except (UserError, USAGE, typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except (Exception, SystemExit) as error:
            if (plugin := blamed(error, registry().modules())) is None:
                raise
            raise Failed(told(error), where=f"plugin {plugin}") from error


if __name__ == "__main__":
    main()
