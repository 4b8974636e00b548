"""`mergekit-vl run`: a recipe in, a comparison table and a report out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_vl.commands import arguments
from mergekit_vl.commands.terminal import TerminalReporter, say, say_table
from mergekit_vl.recipes.loading import load_recipe
from mergekit_vl.registry.plugins import registry
from mergekit_vl.system.interrupts import noted

if TYPE_CHECKING:
    from mergekit_vl.experiments.experiment import Experiment
    from mergekit_vl.recipes.recipe import Recipe
    from mergekit_vl.reports.results import Report


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

    def build(plan: Recipe) -> experiments.Experiment:
        return experiments.build(plan, registry())

    words = [*(overrides or []), *([f"seed={seed}"] if seed is not None else [])]
    plan = load_recipe(recipe, words, allow_env=allow_env or (), check=build)
    experiment = build(plan)
    folder = out or Path("runs") / f"{plan.name}-{plan.hash[:8]}"
    with noted("the same command continues"), TerminalReporter(not quiet and not as_json) as reporter:
        made, again = experiments.run_in(experiment, folder, device=device, force=force, reporter=reporter)
    if as_json:
        say(json.dumps(made.to_json()))
    elif again:
        say(f"already done: {folder / 'report.html'}; --force repeats")
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
    from mergekit_vl.reports.changes import changes_table, most_told
    from mergekit_vl.reports.comparison import chosen_told, comparison
    from mergekit_vl.reports.report import gain

    tables = [table for table in (comparison(report), changes_table(report)) if table is not None]
    if len(made.datasets) > 1:
        tables.reverse()  # what was forgotten is told first
    for table in tables:
        say_table(table)
    say(*most_told(report))
    say(*chosen_told(report))
    if recorded := suite.beside(made, registry()):
        say(recorded)
    say(gain(report))
    say(f"report: {folder / 'report.html'}")
    say(f"in Python: import mergekit_vl; model = mergekit_vl.load_model({str(folder)!r})")
    say(f"next: mergekit-vl run {shlex.join(words)} seed={max(made.recipe.seeds) + 1}    # another seed")
