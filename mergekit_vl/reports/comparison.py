"""The comparison table of a run, and the smaller tables of its page, as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mergekit_vl.models import choices
from mergekit_vl.models.evaluate import wilson
from mergekit_vl.printable import shortened
from mergekit_vl.protocols.base import Metric
from mergekit_vl.reports.intervals import NO_INTERVAL
from mergekit_vl.reports.table import Cell, Column, Mark, Table, TableRow, best

if TYPE_CHECKING:
    from mergekit_vl.models.choices import Choice, Tried
    from mergekit_vl.reports.results import Difference, MeanPoint, Paired, Report, SummaryRow

MORE = (("acc5", "top-5"), ("mean_per_class_recall", "mean per class"), ("nll", "NLL"), ("ece", "ECE"))
HARMONIC = Metric("HM", {}, harmonic=True)
VERDICTS: dict[str, Mark] = {"above": "above", "below": "below"}


def comparison(
    report: Report, rows: Sequence[SummaryRow] | None = None, differences: Sequence[Difference] | None = None
) -> Table:
    """Every row with its accuracies, the headline, and the main row's headline minus its own; of all tasks unless others are given."""
    rows = report.summary if rows is None else rows
    minus = {d.minus: d for d in (report.differences if differences is None else differences)}
    metric, cells = report.metric, report.cells
    chosen = any(row.chosen for row in rows)
    columns = [
        *accuracies(metric),
        Column(f"{shortened(report.main, 30)} minus it", "+.1f", "range"),
        *[Column("chosen", place="document")] * chosen,
        Column("heads", ".0f"),
    ]
    made = []
    for row, values in zip(rows, accuracy_cells(metric, rows)):
        told = [Cell(choices.told(row.chosen, most=choices.SHOWN))] * chosen
        made.append(
            TableRow(
                row.row,
                (*values, difference(minus.get(row.row)), *told, Cell(row.forwards)),
                row.kind,
                row.row == report.main,
            )
        )
    where = f"{cells[0].dataset}, seed {cells[0].seed}" if len(cells) == 1 else f"mean of {len(cells)} cells"
    across = any(cell.interval for row in made for cell in row.cells)
    return Table(
        tuple(columns),
        tuple(made),
        title=f"{report.recipe}: {where}" + (f" ({report.note})" if report.note else ""),
        notes=(*[NO_INTERVAL] * (not across), f"n = {sizes(rows)}"),
    )


def accuracies(metric: Metric) -> list[Column]:
    """The columns that a protocol asks for, and its headline where there are several."""
    several = len(metric.columns) > 1
    return [
        *(Column(name, ".1f", "half") for name in metric.columns),
        *[Column(metric.headline, ".1f")] * several,
        *[Column("mean of HMs", ".1f", place="page")] * metric.harmonic,
        *[Column("normalised", ".1f")] * metric.normalised,
    ]


def accuracy_cells(metric: Metric, rows: Sequence[SummaryRow]) -> list[list[Cell]]:
    """The cells under these columns, row by row; the highest headline is marked."""
    several = len(metric.columns) > 1
    out = []
    for row, mark in zip(rows, best([row.score for row in rows])):
        cells = [Cell(column.acc1, column.interval) for column in row.columns.values()]
        if several:
            cells.append(Cell(row.score, mark=mark))
        else:
            cells = [Cell(cell.value, cell.interval, mark) for cell in cells]
        cells += [Cell(row.mean_of_scores)] * metric.harmonic
        out.append([*cells, *[Cell(row.normalised or 0.0)] * metric.normalised])
    return out


def difference(found: Difference | Paired | None) -> Cell:
    """A difference of headlines in points, marked where its interval excludes 0."""
    if found is None:
        return Cell()
    interval = None if found.low is None or found.high is None else (found.low, found.high)
    return Cell(found.mean, interval, VERDICTS.get(found.verdict, ""))


def sizes(rows: Sequence[SummaryRow]) -> str:
    """Test images by column."""
    return ", ".join(f"{column.n} {name}" for name, column in rows[0].columns.items())


def tried_table(report: Report) -> Table | None:
    """What the main row was chosen from, with what each candidate scored on the images that were chosen on, in percent; of the first cell."""
    choice = next(row for row in report.cells[0].rows if row.row == report.main).choice
    if choice is None or not choice.tried:
        return None
    rows = []
    for one in choice.tried:
        cells = [_share(accuracy, one.n[side]) for side, accuracy in one.accuracy.items()]
        cells.append(Cell(HARMONIC.score([100 * accuracy for accuracy in one.accuracy.values()])))
        rows.append(TableRow(one.label, tuple(cells), main=one.is_chosen(choice.values)))
    sides = choice.tried[0].n
    columns = [*(Column(side, ".1f", "half") for side in sides), Column("HM", ".1f")]
    sizes = ", ".join(f"{n} {side}" for side, n in sides.items())
    return Table(tuple(columns), tuple(rows), notes=(f"n = {sizes}, of validation",), corner="candidate")


def chosen_told(report: Report) -> Iterator[str]:
    """Lines of the terminal: what every row chose; of candidates that are on record, how the chosen one and the ends scored."""
    for row in report.summary:
        choice = next(each for each in report.cells[0].rows if each.row == row.row).choice
        if choice is not None and choice.tried:
            yield _best_told(row.row, choice)
            continue
        for what, values in row.chosen.items():
            yield f"{row.row}: {choices.told({what: values})}, chosen on {choices.SPLITS[values[0].split]}"


def _best_told(label: str, choice: Choice) -> str:
    """Of the first cell."""
    best = next(one for one in choice.tried if one.is_chosen(choice.values))

    def scores(one: Tried) -> str:
        return ", ".join(f"{100 * accuracy:.1f} {side}" for side, accuracy in one.accuracy.items())

    ends = [f"{one.method} {scores(one)}" for one in (choice.tried[0], choice.tried[-1]) if one is not best]
    told = f"{label}: {best.label} is the best of {len(choice.tried)} on {choices.SPLITS[choice.split]} ({scores(best)}; {'; '.join(ends)})"
    meaning = {"base": ": nothing that was tuned is worth what it costs", "tuned": ": nothing had to be repaired"}
    return told + meaning.get(best.method, "")


def _share(accuracy: float, n: int) -> Cell:
    low, high = wilson(accuracy * n, n)
    return Cell(100 * accuracy, (100 * low, 100 * high))


def beyond_top1(report: Report) -> Table:
    """The other scores of each column."""
    names = list(report.metric.columns)
    rows = []
    for row in report.summary:
        found = [(vars(row.columns[name])[key], key) for key, _ in MORE for name in names]
        cells = [Cell(100 * value if key in ("acc5", "mean_per_class_recall") else value) for value, key in found]
        rows.append(TableRow(row.row, tuple(cells), main=row.row == report.main))
    columns = [
        Column(f"{name} {what}", ".3f" if key in ("nll", "ece") else ".1f") for key, what in MORE for name in names
    ]
    return Table(tuple(columns), tuple(rows))


def choices_table(report: Report) -> Table:
    """Every choice with its values in the cells."""
    rows = [
        TableRow(row.row, (Cell(what), Cell(choices.SPLITS[values[0].split]), Cell(choices.told({"": values}))))
        for row in report.summary
        for what, values in row.chosen.items()
    ]
    return Table((Column("what"), Column("on"), Column("value")), tuple(rows))


def costs(report: Report) -> Table:
    columns = (
        Column("parameters", ".0f"),
        Column("heads a sample", ".0f"),
        Column("seconds to make", ".1f"),
        Column("ms a sample, features to logits", ".4f"),
    )
    rows = [
        TableRow(
            row.row,
            (Cell(row.parameters), Cell(row.forwards), Cell(row.seconds), Cell(row.ms_per_sample)),
            main=row.row == report.main,
        )
        for row in report.summary
    ]
    return Table(columns, tuple(rows))


def by_task(report: Report) -> Table | None:
    """The headline on each task, a task a row; None where there is one task."""
    tasks = list(dict.fromkeys(cell.dataset for cell in report.cells))
    if len(tasks) == 1:
        return None
    names = [row.row for row in report.cells[0].rows]
    rows = []
    for task in tasks:
        own = [cell for cell in report.cells if cell.dataset == task]
        means = [100 * float(np.mean([cell.rows[i].score for cell in own])) for i in range(len(names))]
        rows.append(TableRow(task, tuple(map(Cell, means))))
    return Table(tuple(Column(name, ".1f") for name in names), tuple(rows), corner="task")


def by_test(report: Report) -> Table | None:
    """Every test, where a column is the mean of several; else None."""
    if all(len(tests) == 1 for tests in report.metric.columns.values()):
        return None
    tests = list(report.cells[0].rows[0].tests)
    inside = [cell for cell in report.cells if list(cell.rows[0].tests) == tests]
    rows = []
    for i, row in enumerate(report.cells[0].rows):
        means = [100 * float(np.mean([cell.rows[i].tests[test].acc1 for cell in inside])) for test in tests]
        rows.append(TableRow(row.row, tuple(map(Cell, means)), main=row.row == report.main))
    return Table(tuple(Column(test, ".1f") for test in tests), tuple(rows))


def coefficients(lines: Mapping[str, Sequence[MeanPoint]], columns: Sequence[str]) -> Table:
    """Accuracy along the straight line from zero-shot to tuned: a coefficient a row, the spaces beside each other."""
    rows = []
    for points in zip(*lines.values()):
        found = [point.columns[name] for point in points for name in columns]
        rows.append(TableRow(f"{points[0].alpha:.1f}", tuple(Cell(column.acc1, column.interval) for column in found)))
    heads = [Column(f"{space}: {name}", ".1f", "half") for space in lines for name in columns]
    return Table(tuple(heads), tuple(rows), corner="coefficient")
