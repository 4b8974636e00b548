"""`mergekit-vl bench`: arguments in, a table out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_vl.commands import arguments
from mergekit_vl.commands.terminal import TerminalReporter, say, say_table
from mergekit_vl.errors import UserError
from mergekit_vl.experiments.run_folder import alone, claim, tidied
from mergekit_vl.recipes.loading import load_recipe
from mergekit_vl.recipes.recipe import Recipe, with_datasets
from mergekit_vl.registry.plugins import registry
from mergekit_vl.system.devices import check_device, device_of
from mergekit_vl.system.interrupts import noted

if TYPE_CHECKING:
    from mergekit_vl.benchmark.plan import Plan
    from mergekit_vl.benchmark.records import BenchReport

SMALL = "bench_small"
"""What a bare `bench` runs."""
FAILED = 3
"""The exit code where rows failed."""


def bench(
    recipe: arguments.RecipeArgument = SMALL,
    overrides: arguments.Overrides = None,
    strategies: Annotated[
        str | None, typer.Option(help="all, or names or labels: ties,wise_ft; +name adds to the recipe's")
    ] = None,
    datasets: Annotated[
        str | None,
        typer.Option(help="of the recipe by name, or others of its kind: microworld tasks, folders, CoOp's names"),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="1,2,3")] = None,
    shots: Annotated[str | None, typer.Option(help="images a class, a table each: 1,4,16")] = None,
    allow_env: arguments.AllowEnv = None,
    out: arguments.Out = None,
    device: arguments.Device = "auto",
    force: arguments.Force = False,
    quiet: arguments.Quiet = False,
    as_json: arguments.AsJson = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
) -> None:
    """Compare strategies with the same tuned models, images, selection and evaluator; rerun the same command to resume.

    Exits with 3 where rows failed; the others are there nevertheless, and the same command tries the failed ones again.
    """
    from mergekit_vl.benchmark import plan as plans
    from mergekit_vl.benchmark import report
    from mergekit_vl.benchmark.forecast import described

    if "=" in recipe:  # only overrides were given
        recipe, overrides = SMALL, [recipe, *(overrides or [])]
    numbers = [_whole(n, "--shots") for n in _list(shots, "--shots")]

    def build(made: Recipe) -> Plan:
        made = with_datasets(made, _list(datasets, "--datasets"), registry()) if datasets is not None else made
        return plans.build(made, registry(), strategies=_list(strategies, "--strategies"), shots=numbers)

    drawn = [_whole(n, "--seeds") for n in _list(seeds, "--seeds")]
    changes = [*(overrides or []), *([f"seed={drawn}"] if drawn else [])]
    made = load_recipe(recipe, changes, allow_env=allow_env or (), check=build)
    plan = build(made)
    folder = out or Path("runs") / f"bench-{made.name}-{plan.place}"
    show = not quiet and not as_json
    told = [*described(plan), f"folder    {folder}"]
    if dry_run:
        return say(*told)
    check_device(device)
    load = lambda folder: found if (found := report.load(folder)) and found.hash == plan.hash else None  # noqa: E731
    with noted("the same command continues"), tidied(folder), alone(folder):
        done = claim(folder, plan.place, load, force=force)
        if show:
            say(*told, err=True)
        again = done is None or done.failed
        if again:
            done = _run(plan, folder, device, show)
    if not again:
        say(f"already done, --force repeats: {folder / 'report.html'}", err=True)
    if as_json:
        say(json.dumps(done.to_json()))
    elif not quiet:
        _print(done, folder)
    if done.failed:
        raise typer.Exit(FAILED)


def _run(plan: Plan, folder: Path, device: str, show: bool) -> BenchReport:
    from mergekit_vl.benchmark import run
    from mergekit_vl.models.features import FeatureStore

    with TerminalReporter(show) as reporter:
        store = FeatureStore(reporter=reporter)
        return run.run(plan, folder, device=device_of(device), store=store, reporter=reporter)


def _list(text: str | None, where: str) -> list[str]:
    """The words of an option; none where it is not given."""
    wording = [word.strip() for word in text.split(",")] if text is not None else []
    if not all(wording):
        raise UserError("an empty name", where=f"{where} {text!r}", hint="write names with commas between them")
    return wording


def _whole(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{text!r} is not a whole number", where=where, hint="write 1,4,16")
    return int(text)


def _print(report: BenchReport, folder: Path) -> None:
    from mergekit_vl.benchmark.comparison import comparison
    from mergekit_vl.benchmark.wording import headline, reasons

    for table in report.tables:
        if table.rows:
            say_table(comparison(report, table))
    say(*reasons(report), headline(report))
    say(f"report: {folder / 'report.html'}")
