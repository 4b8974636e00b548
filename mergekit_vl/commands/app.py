"""The command line: arguments in, tables out; no maths."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergekit_vl import __version__, options
from mergekit_vl.commands import arguments
from mergekit_vl.commands import bench as bench_command
from mergekit_vl.commands import cache as cache_command
from mergekit_vl.commands import landscape as landscape_command
from mergekit_vl.commands import merge as merge_command
from mergekit_vl.commands import use as use_commands
from mergekit_vl.commands.exits import USAGE, exit_code
from mergekit_vl.commands.merge_request import is_merge
from mergekit_vl.commands.terminal import TerminalReporter, ours_alone, say, say_table, warn
from mergekit_vl.errors import Failed, UserError, unknown
from mergekit_vl.experiments.run_folder import alone, claim, tidied
from mergekit_vl.recipes.loading import installed_recipes, load_recipe
from mergekit_vl.registry import plugins
from mergekit_vl.registry.calls import blamed, told
from mergekit_vl.registry.plugins import registry
from mergekit_vl.system.devices import device_of
from mergekit_vl.system.interrupts import noted

if TYPE_CHECKING:
    from mergekit_vl.experiments.experiment import Experiment
    from mergekit_vl.recipes.recipe import Recipe
    from mergekit_vl.reports.results import Report

app = typer.Typer(
    help="Merge vision-language models: what fine-tuning taught, without losing what the model knew.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
SHOWN = (*plugins.KINDS, "recipes", "plugins")


def _version(value: bool) -> None:
    if value:
        say(f"mergekit-vl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
    plugins_dir: Annotated[
        Path | None, typer.Option(help="load the *.py plugins of this folder too (or set MERGEKIT_VL_PLUGINS)")
    ] = None,
) -> None:
    """`plugins_dir` is read by `main`, since a plugin may bring commands."""


@app.command()
def run(
    recipe: arguments.RecipeArgument,
    overrides: arguments.Overrides = None,
    out: arguments.Out = None,
    device: arguments.Device = "auto",
    seed: Annotated[int | None, typer.Option(help="the same as seed=N")] = None,
    allow_env: arguments.AllowEnv = None,
    force: arguments.Force = False,
    quiet: arguments.Quiet = False,
    as_json: arguments.AsJson = False,
) -> None:
    """Tune, merge, evaluate and report; rerun the same command to resume."""
    from mergekit_vl.experiments import experiment as experiments
    from mergekit_vl.reports import report

    def build(plan: Recipe) -> experiments.Experiment:
        return experiments.build(plan, registry())

    words = [*(overrides or []), *([f"seed={seed}"] if seed is not None else [])]
    plan = load_recipe(recipe, words, allow_env=allow_env or (), check=build)
    experiment = build(plan)
    folder = out or Path("runs") / f"{plan.name}-{plan.hash[:8]}"
    load = lambda folder: found if (found := report.load(folder)) and found.code == experiment.code() else None  # noqa: E731
    show = not quiet and not as_json
    with noted("the same command continues"), tidied(folder), alone(folder):
        again = claim(folder, plan.hash, load, force=force)
        if again is not None:
            say(json.dumps(again.to_json()) if as_json else f"already done: {folder / 'report.html'}; --force repeats")
            return
        from mergekit_vl.models.features import FeatureStore

        with TerminalReporter(show) as reporter:
            made = experiments.run(
                experiment, folder, device=device_of(device), store=FeatureStore(), reporter=reporter
            )
    if as_json:
        say(json.dumps(made.to_json()))
    elif not quiet:
        _print_report(
            made,
            folder,
            experiment,
            [recipe, *plan.allowing, *(o for o in overrides or [] if not o.startswith("seed="))],
        )


def _print_report(report: Report, folder: Path, made: Experiment, words: list[str]) -> None:
    import shlex

    from mergekit_vl.experiments import suite
    from mergekit_vl.models import choices
    from mergekit_vl.reports.comparison import comparison
    from mergekit_vl.reports.report import gain

    say_table(comparison(report))
    for row in report.summary:
        for what, values in row.chosen.items():
            say(f"{row.row}: {choices.told({what: values})}, chosen on {choices.SPLITS[values[0].split]}")
    if recorded := suite.beside(made, registry()):
        say(recorded)
    say(gain(report))
    say(f"report: {folder / 'report.html'}")
    say(f"next: mergekit-vl run {shlex.join(words)} seed={max(made.recipe.seeds) + 1}    # another seed")


app.command()(bench_command.bench)
app.command()(landscape_command.landscape)
app.command("path", hidden=True)(landscape_command.path)
app.command()(cache_command.cache)
app.command()(merge_command.merge)
app.command()(merge_command.verify)


@app.command("eval")
def eval_(
    model: arguments.ModelArgument,
    words: Annotated[list[str] | None, typer.Argument(help="options of the dataset: path=~/pets")] = None,
    dataset: Annotated[str | None, typer.Option(help="see mergekit-vl list datasets; default the run's own")] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="test, val, train, all, or a shift of the dataset; default test, of a folder without split folders all"
        ),
    ] = None,
    row: arguments.Row = None,
    checkpoint: arguments.Checkpoint = None,
    allow_env: arguments.AllowEnv = None,
    device: arguments.Device = "auto",
    as_json: arguments.AsJson = False,
) -> None:
    """Score a finished model, or a backbone as it is, on a dataset, against all of its class names."""
    with TerminalReporter(not as_json) as reporter:
        scores = use_commands.evaluate_model(
            model, words or [], registry(), dataset=dataset, split=split, row=row, checkpoint=checkpoint,
            device=device_of(device), reporter=reporter,
            allow_env=allow_env or (),
        )  # fmt: skip
    if as_json:
        say(json.dumps(scores))
        return
    metrics = scores["metrics"]
    say(
        f"{scores['model']} on {scores['dataset']} ({scores['split']}, {scores['n']} images, {scores['classes']} classes)"
    )
    say(f"  accuracy        {100 * metrics['acc1']:.1f}  (95% {100 * scores['low']:.1f} to {100 * scores['high']:.1f})")
    say(f"  top-5           {100 * metrics['acc5']:.1f}")
    say(f"  mean per class  {100 * metrics['mean_per_class_recall']:.1f}")
    say(f"  NLL, ECE        {scores['nll']:.3f}, {scores['ece']:.3f}")


@app.command()
def predict(
    model: arguments.ModelArgument,
    images: Annotated[list[str], typer.Argument(help="image files, or folders of them")],
    classes: Annotated[str | None, typer.Option(help="dog,cat,... or a file of lines; default the run's own")] = None,
    top: Annotated[int, typer.Option(min=1, help="answers an image")] = 3,
    max_megapixels: Annotated[
        float | None, typer.Option(help="images with more million pixels are refused; default 64")
    ] = None,
    row: arguments.Row = None,
    checkpoint: arguments.Checkpoint = None,
    allow_env: arguments.AllowEnv = None,
    device: arguments.Device = "auto",
    as_json: arguments.AsJson = False,
) -> None:
    """Name what is on images, with probabilities."""
    with TerminalReporter(not as_json) as reporter:
        found = use_commands.predict_images(
            model, images, registry(), classes=classes, top=top, row=row, checkpoint=checkpoint,
            device=device_of(device), reporter=reporter, max_megapixels=max_megapixels,
            allow_env=allow_env or (),
        )  # fmt: skip
    if as_json:
        say(json.dumps(found))
        return
    for each in found:
        logits_of = ", ".join(f"{answer['class']} {answer['p']:.2f}" for answer in each["classes"])
        say(f"{each['image']}: {logits_of}")


@app.command()
def check(
    recipe: Annotated[list[str], typer.Argument(help="a recipe with key=value overrides, or models to merge")],
    base: merge_command.Base = None,
    strategy: merge_command.StrategyName = None,
    rebasin: merge_command.Rebasin = False,
    keep: merge_command.Keep = None,
    tensors: merge_command.TensorsOf = None,
    dtype: merge_command.DType = None,
    weights: merge_command.Weights = None,
    allow_env: arguments.AllowEnv = None,
) -> None:
    """Validate a recipe, or models to be merged, and print the plan; reads no weights and no images."""
    if is_merge(recipe, base=base, strategy=strategy):
        if allow_env:
            raise UserError("a merge reads no environment", where="--allow-env", hint="leave it out")
        return merge_command.check(
            recipe,
            base=base,
            strategy=strategy,
            rebasin=rebasin,
            keep=keep,
            dtype=dtype,
            tensors=tensors,
            weights=weights,
        )
    return _check_recipe(recipe[0], recipe[1:], allow_env or [])


def _check_recipe(recipe: str, overrides: list[str], allow_env: list[str]) -> None:
    from mergekit_vl.benchmark import forecast

    def check(plan: Recipe) -> list[str]:
        return forecast.of_recipe(plan, registry())

    say(*check(load_recipe(recipe, overrides, allow_env=allow_env, check=check)))


@app.command("list")
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


@app.command()
def show(name: Annotated[str, typer.Argument(help="a strategy, tuner, backbone, dataset, protocol or recipe")]) -> None:
    """Options with types, defaults and meaning, and the source."""
    import dataclasses
    import inspect

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


def main() -> None:
    """One line and exit code 2 for every error that the user or the system can mend."""
    plain = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
        if Path(filename).is_relative_to(Path(__file__).parent.parent):
            return warn(str(message))
        plain(message, category, filename, *rest, **more)

    warnings.showwarning = show
    words = sys.argv[1:] or ["--help"]
    sys.exit(exit_code(lambda: _call(words), starting=lambda: _load_plugins(words)))


def _load_plugins(words: list[str]) -> None:
    """Before Typer reads the words: plugins may bring commands."""
    for i, word in enumerate(words):
        if word.split("=")[0] == "--plugins-dir":
            os.environ["MERGEKIT_VL_PLUGINS"] = word.partition("=")[2] or "".join(words[i + 1 : i + 2])
    named = [w for i, w in enumerate(words) if not w.startswith("-") and words[max(0, i - 1)] != "--plugins-dir"]
    command, asks = "".join(named[:1]), not {"--help", "--version"}.isdisjoint(words)
    if asks and command in OURS:
        return
    if asks or command in ("", "list", "show"):  # a glance does not wait for a plugin as a merge does
        os.environ.setdefault(plugins.PATIENCE, "10")
    registry().add_commands(app)
    for owner, reason in registry().failures.items():
        warn(f"plugin {owner} was not loaded: {reason}")


def _call(words: list[str]) -> None:
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


def _readable(command: Callable[..., None]) -> Callable[..., None]:
    """A command that prints nothing but its JSON where that is asked for."""

    @functools.wraps(command)
    def call(**given: object) -> None:
        with ours_alone() if given.get("as_json") else contextlib.nullcontext():
            command(**given)

    return call


for _command in app.registered_commands:
    assert _command.callback is not None
    _command.callback = _readable(_command.callback)
OURS = tuple(plugins.command_name(_command) for _command in app.registered_commands)


if __name__ == "__main__":
    main()
