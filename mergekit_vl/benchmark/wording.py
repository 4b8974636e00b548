"""What a bench says in sentences: on the page, in its README, on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_vl.models import choices
from mergekit_vl.reports.intervals import NO_INTERVAL

if TYPE_CHECKING:
    from mergekit_vl.benchmark.records import BenchReport, BenchRow

MOST = 3
"""Reasons that are told of a row."""


def headline(report: BenchReport) -> str:
    """The best row of the last table, and what is shown about it."""
    shown = next((table for table in report.tables[::-1] if table.rows), None)
    if shown is None:
        return "No row is there in every cell."
    best = max(shown.rows, key=lambda row: row.score)
    name = " = ".join([best.label, *best.equal])
    text = f"Highest {shown.measured.headline}: {name}, {best.score:.1f}"
    told = []
    for found, other in ((best.minus_base, report.base), (best.minus_tuned, shown.tuned_row)):
        if found is not None:
            verdict = "" if found.verdict in ("above", "below") else ", not significant"
            rest = "" if found.low is None else f" ({found.low:+.1f} to {found.high:+.1f}{verdict})"
            told.append(f"{found.mean:+.1f} against {other}{rest}")
    return f"{text}; {', '.join(told)}." if told else f"{text}."


def lead(report: BenchReport) -> str:
    """What was compared, on what, and how options were chosen, in one paragraph."""
    grid, search = report.grid, report.search
    shots = [s for s in grid.shots if s is not None]
    cells = sum(table.n for table in report.tables)
    note = next((table.note for table in report.tables if table.note), "")
    how = {
        "none": "No options were chosen: all rows are at their defaults.",
        "validation": "on validation images",
        "held_out": "on classes held out of those that are tuned on",
        "development": "on development datasets",
        "auto": "on classes held out of those that are tuned on"
        if report.protocol == "base_to_novel"
        else "on validation images",
    }[search.by]
    if search.by != "none":
        how = (
            f"Options were chosen cell by cell {how}, never on test, among at most {search.budget} configurations a strategy"
            f" ({search.training_budget} where it trains); “default” is the row without that choice."
        )
    first = next((row.minus_base for table in report.tables for row in table.rows if row.minus_base), None)
    paired = "Differences are paired, with 95% intervals from a bootstrap over " + (first.over if first else "tasks")
    if first and first.low is None:
        paired = f"Differences are paired, means over {first.over}: {NO_INTERVAL}"
    return (
        f"{len(grid.datasets)} datasets, seeds {', '.join(map(str, grid.seeds))}"
        + (f", {', '.join(map(str, shots))} shots" if shots else "")
        + f": {cells} cells{f' ({note})' if note else ''}. {how} {paired}."
        " sd is the standard deviation over seeds; rank is the mean place over cells, rows that are equal to the bit counting once."
    )


def chosen(row: BenchRow, *, most: int | None = None) -> str:
    """What was chosen for a row of the table."""
    return choices.told(row.summary.chosen, most=most)


def reasons(report: BenchReport) -> list[str]:
    """One line a reason, with the rows that share it."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for each in report.left_out:
        word = "failed" if each.status == "failed" else "not for these models"
        for reason in each.reasons[:MOST]:
            names = reason.cells
            where = "" if len(names) == each.of else f" in {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
            text = reason.reason.removeprefix(f"strategy {each.row}: ").removeprefix(f"{report.recipe}: {each.row}: ")
            rows.setdefault((word, where, text), []).append(each.row)
        if more := each.reasons[MOST:]:
            where = f" in {sum(len(reason.cells) for reason in more)} more cells"
            rows.setdefault((word, where, "see results.csv"), []).append(each.row)
    lost = [f"- all of {cell.cell} failed: {cell.reason}" for cell in report.lost_cells]
    return lost + [f"- {', '.join(names)}: {word}{where}: {text}" for (word, where, text), names in rows.items()]
