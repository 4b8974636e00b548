"""The files of a bench: JSON, CSV, Markdown, the page."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_vl.benchmark.comparison import comparison
from mergekit_vl.benchmark.records import BenchReport, CellRecord, Command, Grid, LostCell, Record, SearchFacts
from mergekit_vl.benchmark.table import chosen, left_out, selection_split, table
from mergekit_vl.benchmark.wording import lead, reasons
from mergekit_vl.experiments import landscape
from mergekit_vl.reports import render
from mergekit_vl.reports.landscape_results import CellLandscape, MeanLandscape
from mergekit_vl.reports.results import CellResult
from mergekit_vl.system.atomic_files import write_json, write_text

if TYPE_CHECKING:
    from mergekit_vl.benchmark.grid import Bench, Key
    from mergekit_vl.benchmark.plan import Entry

NAME = "bench.json"
"""Written last: it marks a bench as done."""


def write(bench: Bench, keys: Sequence[Key], *, seconds: float) -> BenchReport:
    """Write every file of a finished bench and return its report."""
    from mergekit_vl.benchmark import page
    from mergekit_vl.reports.report import environment, to_yaml

    plan = bench.plan
    everything = [_cell(bench, key) for key in keys]
    cells = [cell for cell in everything if cell.done(0)]  # without its base and tuned models a cell has no rows
    report = BenchReport(
        recipe=plan.recipe.name,
        hash=plan.hash,
        protocol=plan.recipe.protocol.name,
        base=plan.experiment.base_label,
        tuned=tuple(entry.label for entry in bench.entries if entry.kind == "tuned"),
        grid=Grid(tuple(dict.fromkeys(cell.dataset for cell in everything)), plan.recipe.seeds, plan.shots),
        search=SearchFacts(plan.search.budget, plan.search.training_budget, plan.search.by),
        tables=tuple(table(bench, [cell for cell in cells if cell.shots == shots], shots) for shots in plan.shots),
        left_out=left_out(bench, cells),
        lost_cells=tuple(_lost(cell) for cell in everything if not cell.done(0)),
        chosen=chosen(bench, cells),
        repeat={entry.label: commands for entry in bench.entries if (commands := repeat(bench, entry, cells))},
        landscape=_landscape(bench, keys),
        environment=environment(bench.ready.device),
        image_ms=bench.image_ms,
        seconds=seconds,
    )
    write_text(bench.out / "recipe.yaml", to_yaml(plan.recipe.plain))
    write_text(bench.out / "results.csv", results_csv(everything))
    for shown in report.tables:
        if shown.rows:
            name = "table" if len(plan.shots) == 1 else f"table-{shown.shots}shots"
            write_text(bench.out / f"{name}.csv", render.csv_text(comparison(report, shown)))
    write_text(bench.out / "README.md", markdown(report))
    write_text(bench.out / "report.html", page.html(report, cells))
    write_json(bench.out / NAME, report.to_json())
    return report


def load(out: Path) -> BenchReport | None:
    """The report of a finished bench; None where there is none that this version can read."""
    file = out / NAME
    try:
        return BenchReport.from_json(json.loads(file.read_text())) if file.exists() else None
    except (ValueError, LookupError, TypeError):
        return None


def _cell(bench: Bench, key: Key) -> CellRecord:
    facts = CellResult.from_json(json.loads((bench.folder(key) / "facts.json").read_text()))
    return CellRecord(key.name, key.shots, facts, tuple(bench.records(key)))


def _lost(cell: CellRecord) -> LostCell:
    first = cell.rows[0]
    return LostCell(cell.name, first.reason or "" if first is not None else "not made")


def repeat(bench: Bench, entry: Entry, cells: Sequence[CellRecord]) -> tuple[Command, ...]:
    """The command that makes a row again with `run`: one for all cells where the same options were chosen in them."""
    recipe, several = str(bench.out / "recipe.yaml"), len(bench.plan.shots) > 1
    by_strategy: dict[str, list[CellRecord]] = {}
    for cell in cells:
        if chain := _chain(bench, entry.label, cell):
            by_strategy.setdefault(json.dumps(chain), []).append(cell)
    out = []
    for strategy, of in by_strategy.items():
        words = ["mergekit-vl", "run", recipe, *bench.plan.recipe.allowing, f"strategy={strategy}", "controls=false"]
        if len(by_strategy) == 1 and len(of) == len(cells) and not several:
            return (Command("all", shlex.join(words)),)
        for cell in of:
            own = [f"seed={cell.seed}", *([f"protocol.shots={cell.shots}"] if several else [])]
            if not bench.plan.experiment.joint:
                own.append(f"dataset={json.dumps(_dataset(bench, cell.dataset))}")
            out.append(Command(cell.name, shlex.join(words + own)))
    return tuple(out)


def _chain(bench: Bench, label: str | None, cell: CellRecord) -> list[dict[str, object]]:
    """The strategies of a recipe that make a row of a cell: those that it is made of, and itself, with the options that were chosen."""
    by_label = {entry.label: (i, entry.spec) for i, entry in enumerate(bench.entries)}
    chain: list[dict[str, object]] = []
    while label in by_label:
        place, spec = by_label[label]
        record = cell.done(place)
        if spec is None or record is None:
            break
        more = {"input": spec.input} if spec.input is not None else {}
        more |= {"batch_norm": spec.batch_norm} if spec.batch_norm != "images" else {}
        chain.insert(0, {"name": spec.name, "label": label, **more, **record.options})
        label = spec.input
    return chain


def _dataset(bench: Bench, name: str) -> Any:
    """What the recipe says of a dataset, by its name once it is loaded."""
    given = bench.plan.recipe.plain["dataset"]
    given = given if isinstance(given, list) else [given]
    return next(plain for plain, made in zip(given, bench.ready.datasets) if made.name == name)


def _landscape(bench: Bench, keys: Sequence[Key]) -> MeanLandscape | None:
    """Points and barriers, averaged over the cells that have one; the plane of the first of them."""
    found: dict[str, list[tuple[Key, CellLandscape]]] = {}
    for key in keys:
        for entry in bench.entries:
            told = bench.landscape(key, entry)
            if told is not None and told.points:
                found.setdefault(entry.label, []).append((key, told))
    if not found:
        return None
    row, cells = max(found.items(), key=lambda item: len(item[1]))
    first = cells[0][1]
    cells = [(key, each) for key, each in cells if len(each.points) == len(first.points)]
    return landscape.averaged(row, [each for _, each in cells], first.plane, cells[0][0].name)


COLUMNS = ("dataset", "seed", "shots", "row", "strategy", "status", "score")
COSTS = ("seconds", "search_seconds", "ms_per_sample", "peak_bytes", "bytes", "towers")


def results_csv(cells: Sequence[CellRecord]) -> str:
    """One line a row and cell: accuracies as fractions, the options that were chosen, costs, and the reason where there is no model."""
    made = [(cell, record) for cell in cells for record in cell.rows if record is not None]
    tests = list(dict.fromkeys(test for _, record in made if record.made for test in record.made.tests))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    more = ("default_score", "options", "chosen", "selection_split", "forwards", *COSTS, "reason")
    writer.writerow([*COLUMNS, *(f"{test}_acc1" for test in tests), *more])
    for cell, record in made:
        own = [cell.dataset, cell.seed, cell.shots, record.row, record.strategy, record.status]
        rest = _measured(cell, record, tests) if record.done else ["" for _ in (*tests, *more)]
        writer.writerow([*own, *rest, record.reason])
    return out.getvalue()


def _measured(cell: CellRecord, record: Record, tests: Sequence[str]) -> list[object]:
    """The score of a row in a cell, and what follows it up to its costs."""
    row = record.scores
    accuracies = [row.tests[test].acc1 if test in row.tests else "" for test in tests]
    default = row.score if record.default is None else record.default.score
    chosen = {what: value for what, (value, _) in row.chosen.items()}
    told = [json.dumps(dict(record.options)), json.dumps(chosen), selection_split(cell, record)]
    costs = vars(record.cost)
    return [row.score, *accuracies, default, *told, row.forwards, *(costs[key] for key in COSTS)]


def markdown(report: BenchReport) -> str:
    """The folder's README: the tables, what is left out, and how to go on."""
    tables = [render.markdown(comparison(report, table)) if table.rows else None for table in report.tables]
    lines = [line.removeprefix("- ") for line in reasons(report)]
    return render.card("bench.md", report=report, lead=lead(report), tables=tables, reasons=lines)
