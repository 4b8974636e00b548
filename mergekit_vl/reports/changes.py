"""Gained and forgotten: accuracy before and after, by data set, test and class, with the images whose answer changed.

Before is the base, after the main row; the tuned model, from which the merge was made, stands between them. A model that was tuned and
not merged forgets in the columns that it was not tuned on: what the merge gave back is the difference of the last two columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mergekit_vl.printable import shortened
from mergekit_vl.reports.comparison import VERDICTS
from mergekit_vl.reports.intervals import over_images
from mergekit_vl.reports.results import ClassChange
from mergekit_vl.reports.table import Cell, Column, Table, TableRow

if TYPE_CHECKING:
    from mergekit_vl.reports.intervals import Difference
    from mergekit_vl.reports.results import Picture, Report, TestChange

MOST = 4
"""Classes that a line of text names."""


@dataclass(frozen=True)
class Change:
    """Right answers on the images of a class, or of a test, in the seeds of one data set."""

    name: str
    seeds: tuple[ClassChange, ...]
    """Counts of images, by seed."""

    @property
    def n(self) -> int:
        return sum(seed.n for seed in self.seeds)

    def percent(self, when: str) -> float:
        """Of `before`, `tuned` or `after`: the mean over seeds."""
        return 100 * float(np.mean([vars(seed)[when] / seed.n for seed in self.seeds]))

    @property
    def difference(self) -> Difference:
        """After minus before, a fraction, with the interval of paired images."""
        pairs = [_pairs(seed) for seed in self.seeds]
        return over_images([[[after] for after, _ in pairs], [[before] for _, before in pairs]], lambda rates: rates[0])

    def total(self, what: str) -> int:
        """Images that were `gained` or `forgotten`."""
        return sum(vars(seed)[what] for seed in self.seeds)


@dataclass(frozen=True)
class Changed:
    """One test of one data set."""

    dataset: str
    test: str
    whole: Change
    classes: tuple[Change, ...]
    """The most forgotten first."""
    pictures: tuple[Picture, ...]
    """Of the first seed."""
    label: str
    """The test, after the data set where there are several."""


def changed(report: Report) -> tuple[Changed, ...]:
    """Every test of every data set, in the order of the cells; nothing for a report of an earlier version, which did not tell classes."""
    found: dict[tuple[str, str], list[TestChange]] = {}
    for cell in report.cells:
        for each in cell.changes or ():
            found.setdefault((cell.dataset, each.test), []).append(each)
    several = len({dataset for dataset, _ in found}) > 1
    return tuple(
        _changed(dataset, test, seeds, f"{dataset}: {test}" if several else test)
        for (dataset, test), seeds in found.items()
    )


def _changed(dataset: str, test: str, seeds: Sequence[TestChange], label: str) -> Changed:
    by_class: dict[str, list[ClassChange]] = {}
    for seed in seeds:
        for one in seed.classes:
            by_class.setdefault(one.name, []).append(one)
    classes = sorted((Change(name, tuple(counts)) for name, counts in by_class.items()), key=_points)
    whole = Change(test, tuple(_sum(test, seed.classes) for seed in seeds))
    return Changed(dataset, test, whole, tuple(classes), seeds[0].pictures, label)


def _sum(name: str, classes: Sequence[ClassChange]) -> ClassChange:
    counts = ("n", "before", "tuned", "after", "gained", "forgotten")
    return ClassChange(name, *(sum(vars(one)[what] for one in classes) for what in counts))


def _pairs(one: ClassChange) -> tuple[np.ndarray, np.ndarray]:
    """(after, before) of each image, 1 where it is right, up to their order."""
    both = one.before - one.forgotten
    kinds = [both, one.gained, one.forgotten, one.n - both - one.gained - one.forgotten]
    return np.repeat([1, 1, 0, 0], kinds), np.repeat([1, 0, 1, 0], kinds)


def changes_table(report: Report, tests: Sequence[Changed] | None = None) -> Table | None:
    """A test a row; None where nothing is known."""
    tests = changed(report) if tests is None else tests
    if not tests:
        return None
    rows = [_row(each.label, each.whole) for each in tests]
    return Table(
        _columns(report),
        tuple(rows),
        title=f"Gained and forgotten: {shortened(report.main, 30)} against {report.base}",
        notes=("intervals are of paired test images",),
        corner="test",
    )


def class_table(report: Report, test: Changed) -> Table:
    """The classes of a test, the most forgotten first."""
    return Table(_columns(report), tuple(_row(one.name, one) for one in test.classes), corner="class")


def _columns(report: Report) -> tuple[Column, ...]:
    return (
        Column("n", ".0f"),
        Column(report.base, ".1f"),
        Column("own tuned" if report.metric.normalised else shortened(report.tuned_row, 24), ".1f"),
        Column(shortened(report.main, 24), ".1f"),
        Column("change", "+.1f", "range"),
        Column("now right", ".0f"),
        Column("now wrong", ".0f"),
    )


def _row(label: str, of: Change) -> TableRow:
    d = of.difference
    interval = None if d.low is None or d.high is None else (100 * d.low, 100 * d.high)
    shares = [Cell(of.percent(when)) for when in ("before", "tuned", "after")]
    cells = (
        Cell(of.n),
        *shares,
        Cell(100 * d.mean, interval, VERDICTS.get(d.verdict, "")),
        Cell(of.total("gained")),
        Cell(of.total("forgotten")),
    )
    return TableRow(label, cells)


def most_told(report: Report) -> Iterator[str]:
    """One line of the classes that gained most, and one of those that were forgotten most; in points, with the number of images."""
    tests = changed(report)
    classes = [(one, each) for each in tests for one in each.classes]
    several = len({each.dataset for each in tests}) > 1
    for what, sign in (("gained most", 1), ("forgotten most", -1)):
        by_points = sorted(classes, key=lambda pair: -sign * _points(pair[0]))
        told = [
            f"{one.name}{f' ({each.dataset})' * several} {_points(one):+.0f} (n {one.n})"
            for one, each in by_points[:MOST]
            if sign * _points(one) > 0
        ]
        if told:
            yield f"{what}: {', '.join(told)}"


def _points(one: Change) -> float:
    return one.percent("after") - one.percent("before")
