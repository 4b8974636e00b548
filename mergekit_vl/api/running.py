"""`run`, `bench` and `check`: recipes from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_vl.api.notebook import PYTHON_WARNINGS
from mergekit_vl.errors import UserError
from mergekit_vl.experiments import experiment as experiments
from mergekit_vl.experiments.open_run import LoadedModel, open_model
from mergekit_vl.experiments.run_folder import alone, claim, tidied
from mergekit_vl.recipes.loading import load_recipe
from mergekit_vl.recipes.recipe import Recipe, parse, with_datasets
from mergekit_vl.registry.plugins import registry
from mergekit_vl.reporter import Reporter
from mergekit_vl.reports import render
from mergekit_vl.reports.changes import changed, changes_table
from mergekit_vl.reports.comparison import comparison
from mergekit_vl.reports.text_table import table_text
from mergekit_vl.system.devices import device_of

if TYPE_CHECKING:
    from mergekit_vl.benchmark.plan import Plan
    from mergekit_vl.benchmark.records import BenchReport
    from mergekit_vl.merging.method import ClosedForm
    from mergekit_vl.reports.changes import Changed
    from mergekit_vl.reports.results import Report
    from mergekit_vl.reports.table import Table

    AnyRecipe = Recipe | Mapping[str, object] | str | Path
    """A recipe, plain data, a file, or the name of an installed one."""


@dataclass(frozen=True)
class RunResult:
    """A finished run: its report, and the folder with all of its files."""

    folder: Path
    report: Report
    recipe: Recipe

    @property
    def html(self) -> Path:
        """The page."""
        return self.folder / "report.html"

    def model(self, row: str | None = None, *, device: str = "auto") -> LoadedModel:
        """The model of a row; default the main strategy's."""
        return open_model(str(self.folder), registry(), row=row, device=device_of(device))

    def scores(self) -> dict[str, float]:
        """The headline of each row, in percent."""
        return {row.row: row.score for row in self.report.summary}

    @property
    def chosen(self) -> dict[str, object]:
        """What the main strategy chose in the first cell: a coefficient, a soup's ingredients."""
        row = next(row for row in self.report.cells[0].rows if row.row == self.report.main)
        return {what: value for what, (value, _) in row.chosen.items()}

    @property
    def changed(self) -> tuple[Changed, ...]:
        """What was gained and what was forgotten on each test, by class, with the images whose answer changed."""
        return changed(self.report)

    def _tables(self) -> list[Table]:
        made = changes_table(self.report)
        return [comparison(self.report), *([made] if made is not None else [])]

    def __repr__(self) -> str:
        return "\n".join([str(self.folder), *map(table_text, self._tables())])

    def _repr_html_(self) -> str:
        return "".join(render.html(table, titled=True) for table in self._tables())


@dataclass(frozen=True)
class BenchResult:
    """A finished bench."""

    folder: Path
    report: BenchReport

    @property
    def html(self) -> Path:
        """The page."""
        return self.folder / "report.html"

    def scores(self) -> dict[str, float]:
        """The headline of each row of the first table, in percent."""
        return {row.label: row.score for row in self.report.tables[0].rows}

    def _tables(self) -> list[Table]:
        from mergekit_vl.benchmark.comparison import comparison

        return [comparison(self.report, table) for table in self.report.tables if table.rows]

    def __repr__(self) -> str:
        return "\n".join([str(self.folder), *map(table_text, self._tables())])

    def _repr_html_(self) -> str:
        return "".join(render.html(table, titled=True) for table in self._tables())


@dataclass(frozen=True)
class Checked:
    """What would be done, from recipes and headers alone."""

    lines: tuple[str, ...]

    def __repr__(self) -> str:
        return "\n".join(self.lines)


def run(
    recipe: AnyRecipe,
    *overrides: str,
    out: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    allow_env: Sequence[str] = (),
    reporter: Reporter = PYTHON_WARNINGS,
) -> RunResult:
    """Tune, merge, evaluate and report, as the command `run`: `run("mergetune_coop", "seed=2")`.

    `recipe` is a file, the name of an installed recipe, a mapping of keys as the file would have, or a Recipe; overrides are of files
    and names. A run that is done is read and not repeated, unless by `force`; a killed one goes on where it was. `out` is the run
    folder, by default runs/<recipe>-<hash>. Raises UserError; what is not an error but should be known is a Python warning.
    """
    plan = _recipe(recipe, overrides, allow_env, lambda plan: experiments.build(plan, registry()))
    experiment = experiments.build(plan, registry())
    folder = Path(out) if out is not None else Path("runs") / f"{plan.name}-{plan.hash[:8]}"

    done, _ = experiments.run_in(experiment, folder, device=device, force=force, reporter=reporter)
    return RunResult(folder, done, plan)


def bench(
    recipe: AnyRecipe = "bench_small",
    *overrides: str,
    strategies: Sequence[str] = (),
    datasets: Sequence[str] | None = None,
    shots: Sequence[int] = (),
    out: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    allow_env: Sequence[str] = (),
    reporter: Reporter = PYTHON_WARNINGS,
) -> BenchResult:
    """Compare strategies under the same tuned models, images, selection and evaluator, as the command `bench`.

    `strategies` are names or labels, or `["all"]`; with + before them they come to the recipe's own. `datasets` are of the recipe by
    name, or others of its kind; `shots` are images per class, a table for each. Rows that failed are in the report's `left_out`.
    """
    from mergekit_vl.benchmark import plan as plans
    from mergekit_vl.benchmark import report, run
    from mergekit_vl.models.features import FeatureStore

    def build(made: Recipe) -> Plan:
        made = with_datasets(made, list(datasets), registry()) if datasets is not None else made
        return plans.build(made, registry(), strategies=list(strategies), shots=list(shots))

    plan = build(_recipe(recipe, overrides, allow_env, build))
    folder = Path(out) if out is not None else Path("runs") / f"bench-{plan.recipe.name}-{plan.place}"

    def load(folder: Path) -> BenchReport | None:
        found = report.load(folder)
        return found if found and found.hash == plan.hash else None

    with tidied(folder), alone(folder):
        done = claim(folder, plan.place, load, force=force)
        if done is None or done.failed:
            store = FeatureStore(reporter=reporter)
            done = run.run(plan, folder, device=device_of(device), store=store, reporter=reporter)
    return BenchResult(folder, done)


def check(
    recipe: Any,
    *overrides: str,
    base: object = None,
    strategy: str | ClosedForm | None = None,
    allow_env: Sequence[str] = (),
    **method_options: object,
) -> Checked:
    """Validate a recipe of a run or of a bench, and tell what it would do; reads no weights and no images.

    With a list of models, a `base` or a `strategy` it is what `merge` would do with these arguments: `check([a, b], base=zero_shot)`.

    Raises UserError for the first thing that is wrong, with its place and how to mend it.
    """

    if isinstance(recipe, (list, tuple)) or base is not None or strategy is not None:
        from mergekit_vl.api.merging import check_models

        return Checked(tuple(check_models(recipe, base, "ties" if strategy is None else strategy, method_options)))
    if method_options:
        raise UserError(
            f"{next(iter(method_options))}= is for models", where="check", hint="override the recipe's own keys"
        )

    from mergekit_vl.benchmark import forecast

    def lines(plan: Recipe) -> list[str]:
        return forecast.of_recipe(plan, registry())

    return Checked(tuple(lines(_recipe(recipe, overrides, allow_env, lines))))


def _recipe(
    given: AnyRecipe, overrides: Sequence[str], allow_env: Sequence[str], check: Callable[[Recipe], object]
) -> Recipe:
    if isinstance(given, (str, Path)):
        return load_recipe(str(given), overrides, allow_env=allow_env, check=check)
    if overrides or allow_env:
        raise UserError("overrides are of files and names", where="recipe", hint="change the mapping itself")
    recipe = given if isinstance(given, Recipe) else parse(given, name="recipe", where="recipe")
    check(recipe)
    return recipe
