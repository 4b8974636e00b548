"""`repair` and `soup`: from models and folders of images to one model and the line that loads it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_vl.commands import arguments
from mergekit_vl.commands.terminal import TerminalReporter, say, say_table
from mergekit_vl.errors import UserError
from mergekit_vl.experiments import jobs
from mergekit_vl.registry.plugins import registry
from mergekit_vl.system.devices import device_of
from mergekit_vl.system.interrupts import noted

if TYPE_CHECKING:
    from mergekit_vl.recipes.recipe import Recipe
    from mergekit_vl.reports.results import Report

BASE = "photo, micro, clip:ARCH:PRETRAINED, vision:ARCH, or a folder that open_clip wrote"
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value for the recipe: backbone.unknown=warn")]


def repair(
    base: Annotated[str, typer.Argument(help=f"the model before tuning: {BASE}")],
    tuned: Annotated[str, typer.Argument(help="the weights after tuning: a file, or a folder")],
    overrides: Overrides = None,
    new: Annotated[
        str | None, typer.Option(help="images of what it was tuned on: a folder with a folder for each class")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER|NAMES",
            help="images of what must not be forgotten: a folder of class folders, once for each, or classes of --new: dog,cat",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="2pt", help="gain the most on --new and lose at most this on --keep; default the best harmonic mean"
        ),
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="also try continued fine-tuning: it trains")] = False,
    out: arguments.Out = None,
    device: arguments.Device = "auto",
    force: arguments.Force = False,
    quiet: arguments.Quiet = False,
    as_json: arguments.AsJson = False,
) -> None:
    """Repair a fine-tuned model that forgot: the best merge with the model before, on your images; without images, MonoSoup."""
    if new is None and not keep:
        return _without_images(base, tuned, out or Path("repaired"), device, budget, overrides or [], force, quiet)
    if new is None or not keep:
        given, missing = ("--keep", "--new FOLDER") if new is None else ("--new", "--keep FOLDER")
        raise UserError(f"{given} without {missing}", where="command line", hint="give both, or neither")
    plan = jobs.repair(
        base, tuned, new=new, keep=keep, budget=budget, train=train, overrides=overrides or [], registry=registry()
    )  # fmt: skip
    _run(plan, out, device, force=force, quiet=quiet, as_json=as_json)


def soup(
    words: Annotated[
        list[str],
        typer.Argument(help="the tuned models: files or folders; key=value for the recipe", metavar="MODELS..."),
    ],
    val: Annotated[
        str, typer.Option(help="images to choose the ingredients on: a folder with a folder for each class")
    ],
    base: Annotated[str | None, typer.Option(help=f"the model before tuning; default the first model. {BASE}")] = None,
    out: arguments.Out = None,
    device: arguments.Device = "auto",
    force: arguments.Force = False,
    quiet: arguments.Quiet = False,
    as_json: arguments.AsJson = False,
) -> None:
    """Make one model of several tuned from one base: the greedy soup and the uniform one; models must be on disk, nothing is trained."""
    from mergekit_vl.system.regular_files import user_path

    overrides = [word for word in words if "=" in word and not user_path(word).exists()]
    models = [word for word in words if word not in overrides]
    plan = jobs.soup(models, val=val, base=base, overrides=overrides, registry=registry())
    _run(plan, out, device, force=force, quiet=quiet, as_json=as_json)


def _run(plan: Recipe, out: Path | None, device: str, *, force: bool, quiet: bool, as_json: bool) -> None:
    from mergekit_vl.experiments import experiment as experiments

    made = experiments.build(plan, registry())
    folder = out or Path("runs") / f"{plan.name}-{plan.hash[:8]}"

    with noted("the same command continues"), TerminalReporter(not quiet and not as_json) as reporter:
        done, _ = experiments.run_in(made, folder, device=device, force=force, reporter=reporter)
    if as_json:
        say(json.dumps(done.to_json()))
    elif not quiet:
        _told(done, folder)


def _told(report: Report, folder: Path) -> None:
    from mergekit_vl.reports.changes import changes_table, most_told
    from mergekit_vl.reports.comparison import chosen_told, comparison
    from mergekit_vl.reports.report import gain
    from mergekit_vl.storage.export import loading

    for table in (changes_table(report), comparison(report)):
        if table is not None:
            say_table(table)
    say(*most_told(report))
    say(*chosen_told(report))
    say(gain(report))
    say(f"report: {folder / 'report.html'}")
    say(f"in Python: {loading(folder / 'merged', folder)}")


def _without_images(
    base: str,
    tuned: str,
    out: Path,
    device: str,
    budget: str | None,
    overrides: Sequence[str],
    force: bool,
    quiet: bool,
) -> None:
    if budget is not None or overrides:
        raise UserError(
            "--budget and key=value need images", where="command line", hint="give --new FOLDER --keep FOLDER"
        )
    from mergekit_vl.storage.export import loading

    with noted("nothing was written"), TerminalReporter(not quiet, after=2) as reporter:
        folder = jobs.without_images(
            base, tuned, out, device=device_of(device), force=force, registry=registry(), reporter=reporter
        )  # fmt: skip
    if not quiet:
        say(f"MonoSoup of {base} and {tuned}: {folder}")
        say("no images were given, so nothing was measured: what it gains and forgets is not known")
        words = shlex.join([base, tuned])
        say(f"next: mergekit-vl repair {words} --new FOLDER --keep FOLDER    # choose on your images, and measure")
        say(f"in Python: {loading(folder, folder)}")
