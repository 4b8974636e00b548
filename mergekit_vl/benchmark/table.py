"""The tables of a bench: means, intervals, ranks, costs, what was chosen, and what is left out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from mergekit_vl.benchmark.records import (
    BenchRow,
    BenchTable,
    CellRecord,
    ChosenFor,
    ChosenIn,
    LeftOut,
    Reason,
    Record,
    RowCost,
)
from mergekit_vl.models import choices
from mergekit_vl.models.evaluate import Scores
from mergekit_vl.reports.intervals import ranks
from mergekit_vl.reports.report import paired, summary
from mergekit_vl.reports.results import CellResult, SummaryRow

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mergekit_vl.benchmark.grid import Bench
    from mergekit_vl.models.choices import Chosen
    from mergekit_vl.protocols.base import Metric


def table(bench: Bench, cells: Sequence[CellRecord], shots: int | None) -> BenchTable:
    """Rows that are there in every cell, averaged; rows whose logits are equal to the bit in all of them share one."""
    equal = _equal(bench, cells)
    rows = sorted(equal)
    if not rows:
        return BenchTable(shots)
    labels = [bench.entries[i].label for i in rows]
    results = [dataclasses.replace(cell.facts, rows=tuple(_done(cell, i).scores for i in rows)) for cell in cells]
    tuned = [entry.label for entry in bench.entries if entry.kind == "tuned"]
    tuned_row = next((label for label in labels if label in tuned), None)
    places = np.array([ranks([row.score for row in cell.rows]) for cell in results]).mean(0)
    made = [
        _row(
            dataclasses.replace(averaged, chosen=_choices(bench, cells, i, equal[i])),
            [_done(cell, i) for cell in cells],
            results,
            equal[i],
            labels[0],
            tuned_row,
            float(place),
        )
        for i, averaged, place in zip(rows, summary(results), places)
    ]
    return BenchTable(
        shots,
        metric=results[0].metric,
        note=next((cell.note for cell in results if cell.note), ""),
        n=len(cells),
        counts=results[0].counts,
        tuned_row=tuned_row,
        rows=tuple(made),
    )


def _equal(bench: Bench, cells: Sequence[CellRecord]) -> dict[int, list[str]]:
    """The rows of the table, by their place among the entries, each with those that are equal to it to the bit."""
    complete = [i for i in range(len(bench.entries)) if cells and all(cell.done(i) for cell in cells)]
    shown: dict[tuple[str, ...], int] = {}
    equal: dict[int, list[str]] = {}
    for i in complete:
        logits_of = tuple(json.dumps(dict(_done(cell, i).scores.digest), sort_keys=True) for cell in cells)
        own = bench.entries[i].kind in ("zero-shot", "tuned")  # always there, whatever else they are equal to
        first = i if own else shown.setdefault(logits_of, i)
        shown.setdefault(logits_of, i)
        equal.setdefault(first, [])
        if first != i:
            equal[first].append(bench.entries[i].label)
    return equal


def _done(cell: CellRecord, row: int) -> Record:
    found = cell.done(row)
    assert found is not None  # it is there in every cell
    return found


def _choices(
    bench: Bench, cells: Sequence[CellRecord], row: int, equal: Sequence[str]
) -> dict[str, tuple[Chosen, ...]]:
    """What was chosen for a row over all cells, and for the rows `equal` that share it."""
    chosen = choices.counted([_done(cell, row).choices for cell in cells])
    places = {entry.label: n for n, entry in enumerate(bench.entries)}
    for label in equal:
        own = choices.counted([_done(cell, places[label]).choices for cell in cells])
        chosen |= {f"{label}: {what}": values for what, values in own.items()}
    return chosen


def _row(
    of_row: SummaryRow,
    records: Sequence[Record],
    cells: Sequence[CellResult],
    equal: Sequence[str],
    base: str,
    tuned_row: str | None,
    rank: float,
) -> BenchRow:
    def mean(key: Callable[[RowCost], float | None]) -> float | None:
        return _mean([key(record.cost) for record in records if record.cost is not None])

    return BenchRow(
        dataclasses.replace(of_row, ms_per_sample=mean(lambda cost: cost.ms_per_sample) or 0.0),
        equal=tuple(equal),
        strategy=records[0].strategy,
        rank=rank,
        sd=_sd(cells, [record.scores.score for record in records]),
        minus_base=paired(cells, of_row.row, base) if of_row.row != base else None,
        minus_tuned=paired(cells, of_row.row, tuned_row) if tuned_row and of_row.row != tuned_row else None,
        default=_default(cells[0].metric, records),
        searched=any(record.searched for record in records),
        trains=records[0].trains or of_row.kind == "tuned",
        search_seconds=mean(lambda cost: cost.search_seconds),
        peak_bytes=mean(lambda cost: cost.peak_bytes),
        bytes=mean(lambda cost: cost.bytes),
        towers=mean(lambda cost: cost.towers),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _default(metric: Metric, records: Sequence[Record]) -> float | None:
    """The headline without the choice of options, of the averages, in percent; None where nothing was chosen, or it cannot be had."""
    if all(record.default is None for record in records):
        return None
    tests = [record.scores.tests if record.default is None else record.default.tests for record in records]
    known: list[Mapping[str, Scores]] = [each for each in tests if each is not None]
    if len(known) < len(tests):
        return None
    means = [
        100
        * float(np.mean([metric.column(name, {test: scores.acc1 for test, scores in each.items()}) for each in known]))
        for name in metric.columns
    ]
    return float(metric.score(means))


def _sd(cells: Sequence[CellResult], scores: Sequence[float]) -> float | None:
    """The standard deviation over seeds of the headline's mean over tasks, in points."""
    by_seed: dict[int, list[float]] = {}
    for cell, score in zip(cells, scores):
        by_seed.setdefault(cell.seed, []).append(score)
    means = [100 * float(np.mean(values)) for values in by_seed.values()]
    return float(np.std(means, ddof=1)) if len(means) > 1 else None


def selection_split(cell: CellRecord, record: Record) -> str | None:
    """The split that a row of a cell owes something to, be it by its tuned models."""
    own = [split for _, split in record.choices.values()]
    choice = record.scores.choice
    own += [choice.split] if choice is not None and choice.learnt else []
    if record.kind in ("merged", "control"):
        tuned = [each for each in cell.rows if each is not None and each.done and each.kind == "tuned"]
        own += [split for each in tuned for _, split in each.choices.values()]
    return next((split for split in own if split != "train"), None)


def left_out(bench: Bench, cells: Sequence[CellRecord]) -> tuple[LeftOut, ...]:
    """Rows that are not there in every cell, with their reasons and where."""
    out = []
    for i, entry in enumerate(bench.entries):
        records = [(cell.name, cell.rows[i]) for cell in cells]
        missing = [(name, record) for name, record in records if record is None or not record.done]
        if not missing:
            continue
        reasons: dict[str, list[str]] = {}
        for name, record in missing:
            reasons.setdefault(record.reason or "" if record else "not made", []).append(name)
        failed = any(record is None or record.status == "failed" for _, record in missing)
        told = tuple(Reason(reason, tuple(names)) for reason, names in reasons.items())
        status: Literal["inapplicable", "failed"] = "failed" if failed else "inapplicable"
        out.append(LeftOut(entry.label, status, told, len(records) - len(missing), len(records)))
    return tuple(out)


def chosen(bench: Bench, cells: Sequence[CellRecord]) -> tuple[ChosenFor, ...]:
    """What was chosen for each row: its options by cell with the headline that every configuration had there, and its own choices."""
    out = []
    for i, entry in enumerate(bench.entries):
        records = [(cell.name, record) for cell in cells if (record := cell.done(i))]
        searched = [(name, record) for name, record in records if record.searched]
        own = [(name, record) for name, record in records if record.scores.chosen]
        if searched or own:
            how = searched[0][1].search.how if searched and searched[0][1].search else ""
            out.append(ChosenFor(entry.label, how, tuple(_chosen_in(name, record) for name, record in searched or own)))
    return tuple(out)


def _chosen_in(cell: str, record: Record) -> ChosenIn:
    own = {what: value for what, (value, _) in record.scores.chosen.items()}
    return ChosenIn(cell, record.options, own, record.search.configurations if record.search is not None else None)
