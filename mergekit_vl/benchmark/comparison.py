"""The comparison table of a bench, as data: the rows of every cell with their differences and costs, and those that failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_vl.benchmark import wording
from mergekit_vl.models import choices
from mergekit_vl.reports.comparison import accuracies, accuracy_cells, difference, sizes
from mergekit_vl.reports.intervals import NO_INTERVAL
from mergekit_vl.reports.table import Cell, Column, Table, TableRow

if TYPE_CHECKING:
    from mergekit_vl.benchmark.records import BenchReport, BenchRow, BenchTable

COSTS = (
    Column("search s", ".1f", place="page"),
    Column("seconds", ".2f", place="page"),
    Column("towers", ".0f"),
    Column("heads", ".0f"),
    Column("ms a sample", ".3f", place="page"),
    Column("peak MB", ".0f", place="page"),
    Column("MB", ".3f", place="page"),
)


def comparison(report: BenchReport, table: BenchTable) -> Table:
    """One table of the report, which has rows; the best row comes first, and those that failed in some cell come last."""
    rows = sorted(table.rows, key=lambda row: -row.score)
    measured = accuracies(table.measured)
    columns = (
        *measured,
        Column("sd", ".1f"),
        Column("rank", ".1f"),
        Column(f"minus {report.base}", "+.1f", "range"),
        Column(f"minus {table.tuned_row}", "+.1f", "range"),
        Column("default", ".1f"),
        Column("chosen", place="document"),
        *COSTS,
    )
    accuracy = accuracy_cells(table.measured, [row.summary for row in rows])
    made = [
        TableRow(row.label, (*cells, *_cells(row)), row.summary.kind, equal=row.equal)
        for row, cells in zip(rows, accuracy)
    ]
    there = {label for row in table.rows for label in (row.label, *row.equal)}
    for each in report.left_out:
        if each.status == "failed" and each.row not in there:
            headline = Cell(mark="failed")
            made.append(TableRow(each.row, (headline, *[Cell()] * (len(columns) - 1)), "merged"))
    differences = [d for row in table.rows for d in (row.minus_base, row.minus_tuned) if d is not None]
    none = any(d.low is None for d in differences)
    return Table(
        columns,
        tuple(made),
        title=f"{report.recipe}: {table.n} cells" + (f", {table.shots} shots" if table.shots else ""),
        notes=(*[NO_INTERVAL] * none, f"n = {sizes([row.summary for row in rows])}", "cost: towers and heads a sample"),
    )


def _cells(row: BenchRow) -> tuple[Cell, ...]:
    """Those after the accuracies."""
    megabytes = [None if size is None else size / 1e6 for size in (row.peak_bytes, row.bytes)]
    return (
        Cell(row.sd),
        Cell(row.rank),
        difference(row.minus_base),
        difference(row.minus_tuned),
        Cell(row.default),
        Cell(wording.chosen(row, most=choices.SHOWN)),
        Cell(row.search_seconds if row.searched else None),
        Cell(row.summary.seconds),
        Cell(row.towers),
        Cell(row.summary.forwards),
        Cell(row.summary.ms_per_sample),
        *map(Cell, megabytes),
    )
