"""The HTML page of a bench, with its plots inside it: it needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mergekit_vl.benchmark import plots
from mergekit_vl.benchmark.comparison import comparison
from mergekit_vl.benchmark.wording import headline, lead, reasons
from mergekit_vl.models import choices
from mergekit_vl.reports.html import metric_told
from mergekit_vl.reports.landscape_page import section
from mergekit_vl.reports.render import html as rendered
from mergekit_vl.reports.render import markup, page

if TYPE_CHECKING:
    from markupsafe import Markup

    from mergekit_vl.benchmark.records import BenchReport, BenchTable, CellRecord, ChosenFor, ChosenIn


@dataclass(frozen=True)
class Section:
    """What the page shows of one number of shots; no table where no row is there in every cell."""

    shots: str
    legend: str = ""
    table: Markup | None = None
    pareto: Markup | None = None
    costs: str = ""
    by_dataset: Markup | None = None


def html(report: BenchReport, cells: Sequence[CellRecord]) -> str:
    shown = [table for table in report.tables if table.rows]
    landscape = report.landscape
    return page(
        "bench.html",
        title=report.recipe,
        sortable=True,
        report=report,
        headline=headline(report),
        lead=lead(report),
        sections=[_section(report, table, cells) for table in report.tables],
        over_shots=markup(plots.over_shots(shown)) if len(shown) > 1 else "",
        landscape=section(landscape, report.base, report.tuned[0]) if landscape is not None else "",
        chosen=[(each, _counted(each), [_told(cell) for cell in each.cells]) for each in report.chosen],
        reasons=[line.removeprefix("- ") for line in reasons(report)],
        environment=", ".join(f"{name} {value}" for name, value in report.environment.items()),
    )


def _section(report: BenchReport, table: BenchTable, cells: Sequence[CellRecord]) -> Section:
    shots = f" with {table.shots} shots" if len(report.tables) > 1 else ""
    if not table.rows:
        return Section(shots)
    means = _by_dataset(cells, table, report)
    return Section(
        shots,
        f"Percent. Tuned: {', '.join(report.tuned)}. {metric_told(table.measured)} Click a column to sort.",
        rendered(comparison(report, table), sortable=True),
        markup(plots.pareto(table)),
        _costs(report, table),
        markup(plots.by_dataset(table, means)) if len(means) > 1 else None,
    )


def _costs(report: BenchReport, table: BenchTable) -> str:
    twice = [row.label for row in table.rows if (row.towers or 1) > 1]
    text = (
        "Seconds are those of one cell, without encoding images, which serves every row, and without the tuned models' own training. "
        f"A sample costs {report.image_ms:.3f} ms a tower on this machine (batches of 16), and what its heads take."
    )
    if twice:
        text += f" Rows that run several towers for a sample, and cost as many times as much: {', '.join(twice)}."
    heads = [row.label for row in table.rows if row.summary.forwards > 1 and (row.towers or 1) == 1]
    if heads:
        text += f" Several heads on one tower, which cost little: {', '.join(heads)}."
    return text


def _by_dataset(cells: Sequence[CellRecord], table: BenchTable, report: BenchReport) -> dict[str, list[float]]:
    """The headline of each row of the table, by data set, in percent, mean over seeds."""
    means: dict[str, list[float]] = {}
    for name in report.grid.datasets:
        own = [cell for cell in cells if cell.shots == table.shots and cell.dataset == name]
        by_row = [{row.row: row.scores.score for row in cell.rows if row is not None and row.done} for cell in own]
        means[name] = [100 * float(np.mean([scores[row.label] for scores in by_row])) for row in table.rows]
    return means


def _counted(each: ChosenFor) -> str:
    """The options that were chosen for a row, by number of cells."""
    counts: dict[str, int] = {}
    for cell in each.cells:
        counts[choices.text(cell.options)] = counts.get(choices.text(cell.options), 0) + 1
    return "; ".join(f"{value} ({n})" for value, n in sorted(counts.items(), key=lambda item: -item[1]))


def _told(cell: ChosenIn) -> str:
    """What was chosen in a cell, with what every configuration scored there."""
    tried = [
        f"{choices.text(one.options)}: {100 * one.score:.1f}"
        if one.score is not None
        else f"{choices.text(one.options)}: left out, {one.reason}"
        for one in cell.configurations or ()
    ]
    own = f"; {choices.text(cell.own)}" if cell.own else ""
    return f"{cell.cell}: {choices.text(cell.options)}{own}" + (f"   [{', '.join(tried)}]" if tried else "")
