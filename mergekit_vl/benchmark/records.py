"""What a bench records and finds, as frozen dataclasses. Their fields are the keys of the JSON on disk, which is written and read here alone.

Keys that are not known are passed over, as in the files of a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mergekit_vl.models.evaluate import Scores
from mergekit_vl.protocols.base import Metric
from mergekit_vl.reports.landscape_results import MeanLandscape, current
from mergekit_vl.reports.results import (
    IF_THERE,
    LEFT_OUT,
    CellResult,
    Kind,
    Paired,
    Row,
    SummaryRow,
    fields_of,
    read,
    renamed,
)

Status = Literal["done", "inapplicable", "failed"]
OF_ROW = ("tests", "score", "right", "digest", "parameters", "forwards", "chosen", "learnt", "chosen_on")
"""Keys of a record that its `made` holds."""


@dataclass(frozen=True)
class RowCost:
    seconds: float
    """To make it, images being encoded."""
    ms_per_sample: float
    """Of its towers and heads."""
    search_seconds: float = 0.0
    peak_bytes: int | None = None
    bytes: int | None = None
    towers: float | None = None


@dataclass(frozen=True)
class Tried:
    """A configuration on the selection tasks: what it scored, or why it could not be used."""

    options: Mapping[str, object]
    score: float | None = field(default=None, metadata=IF_THERE)
    nll: float | None = field(default=None, metadata=IF_THERE)
    reason: str | None = field(default=None, metadata=IF_THERE)


@dataclass(frozen=True)
class Searched:
    """How the options of a row were chosen."""

    how: str
    """On which images, in words."""
    on: str | None = None
    """One of `choices.SPLITS`; None where nothing was chosen."""
    configurations: tuple[Tried, ...] = ()


@dataclass(frozen=True)
class Default:
    """What a row would be without the choice of its options; or why it would not be."""

    options: Mapping[str, object]
    tests: Mapping[str, Scores] | None = field(default=None, metadata=IF_THERE)
    score: float | None = field(default=None, metadata=IF_THERE)
    reason: str | None = field(default=None, metadata=IF_THERE)


@dataclass(frozen=True)
class Record:
    """A row of a cell."""

    row: str
    """Its label."""
    kind: Kind
    strategy: str | None
    status: Status
    reason: str | None = field(default=None, metadata=IF_THERE)
    """Why it is not done."""
    made: Row | None = field(default=None, metadata=LEFT_OUT)
    """Of one that is done: its scores; they are keys of the record in JSON."""
    options: Mapping[str, object] = field(default_factory=dict)
    cost: RowCost | None = field(default=None, metadata=IF_THERE)
    trains: bool = False
    search: Searched | None = field(default=None, metadata=IF_THERE)
    default: Default | None = field(default=None, metadata=IF_THERE)
    made_of: Mapping[str, object] | None = field(default=None, metadata=IF_THERE)
    """What it depends on: images, weights, checkpoints, code."""

    @property
    def done(self) -> bool:
        return self.status == "done"

    @property
    def scores(self) -> Row:
        assert self.made is not None  # it is done
        return self.made

    @property
    def choices(self) -> dict[str, tuple[object, str]]:
        """(value, split) by what was chosen: its options by the bench, the rest by the strategy itself."""
        on = self.search.on if self.search is not None else None
        return ({"options": (dict(self.options), on)} if on else {}) | (self.made.chosen if self.made else {})

    @property
    def searched(self) -> bool:
        return self.search is not None and bool(self.search.configurations)

    def to_json(self) -> dict[str, Any]:
        row = {} if self.made is None else {key: value for key, value in self.made.to_json().items() if key in OF_ROW}
        return fields_of(self) | row

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Record:
        """Of an earlier version's record too; raises ValueError or LookupError for what is none."""
        record: Record = read(cls, {key: value for key, value in found.items() if key != "made"})
        if not record.done:
            return record
        if record.cost is None:
            raise ValueError("a row that is done has its costs")
        return dataclasses.replace(record, made=Row.from_json(found))


@dataclass(frozen=True)
class CellRecord:
    """A cell with its rows in the order of the table, None where one is not made; it is put together and not stored."""

    name: str
    shots: int | None
    facts: CellResult
    rows: tuple[Record | None, ...]

    @property
    def dataset(self) -> str:
        return self.facts.dataset

    @property
    def seed(self) -> int:
        return self.facts.seed

    def done(self, row: int) -> Record | None:
        """The record of a row, if it is done."""
        record = self.rows[row]
        return record if record is not None and record.done else None


@dataclass(frozen=True)
class BenchRow:
    """A row of a table, averaged over cells. The fields of its summary are keys of the row in JSON."""

    summary: SummaryRow = field(metadata=LEFT_OUT)
    equal: tuple[str, ...]
    """Rows whose logits are equal to its to the bit, in every cell."""
    strategy: str | None
    rank: float
    """The mean place over cells."""
    sd: float | None
    """Over seeds, of the headline's mean over tasks, in points."""
    minus_base: Paired | None
    minus_tuned: Paired | None
    default: float | None
    """The headline without the choice of options, in percent."""
    searched: bool
    trains: bool
    search_seconds: float | None
    peak_bytes: float | None
    bytes: float | None
    towers: float | None

    @property
    def label(self) -> str:
        return self.summary.row

    @property
    def score(self) -> float:
        return self.summary.score

    def to_json(self) -> dict[str, Any]:
        return fields_of(self.summary) | fields_of(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> BenchRow:
        return read(cls, {**found, "summary": found})


@dataclass(frozen=True)
class BenchTable:
    """The rows that are there in every cell of one number of shots; no rows where there is no such cell."""

    shots: int | None
    metric: Metric | None = None
    note: str = ""
    n: int = 0
    """Cells."""
    counts: Mapping[str, int] = field(default_factory=dict)
    tuned_row: str | None = None
    """The first tuned model."""
    rows: tuple[BenchRow, ...] = ()

    @property
    def measured(self) -> Metric:
        assert self.metric is not None  # it has rows
        return self.metric

    def to_json(self) -> dict[str, Any]:
        return fields_of(self) | {"rows": [row.to_json() for row in self.rows]}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> BenchTable:
        found = dict(found)
        made: BenchTable = read(cls, {"tuned_row": found.get("anchor"), **found, "rows": ()})  # its name in 0.1.0
        return dataclasses.replace(made, rows=tuple(map(BenchRow.from_json, found["rows"])))


@dataclass(frozen=True)
class Grid:
    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    shots: tuple[int | None, ...]


@dataclass(frozen=True)
class SearchFacts:
    """How many configurations were tried, and where options were chosen."""

    budget: int
    training_budget: int
    by: str


@dataclass(frozen=True)
class Reason:
    reason: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class LeftOut:
    """A row that is not there in every cell."""

    row: str
    status: Literal["inapplicable", "failed"]
    reasons: tuple[Reason, ...]
    done: int
    """Cells in which it is there."""
    of: int
    """Cells."""


@dataclass(frozen=True)
class LostCell:
    """A cell whose base or tuned models could not be made."""

    cell: str
    reason: str


@dataclass(frozen=True)
class ChosenIn:
    """What was chosen for a row in one cell."""

    cell: str
    options: Mapping[str, object]
    own: Mapping[str, object]
    """By the strategy itself."""
    configurations: tuple[Tried, ...] | None


@dataclass(frozen=True)
class ChosenFor:
    row: str
    how: str
    cells: tuple[ChosenIn, ...]


@dataclass(frozen=True)
class Command:
    """What makes a row of a cell, or of all cells, again."""

    cells: str
    command: str


@dataclass(frozen=True)
class BenchReport:
    """A finished bench."""

    recipe: str
    hash: str
    protocol: str
    base: str
    tuned: tuple[str, ...]
    grid: Grid
    search: SearchFacts
    tables: tuple[BenchTable, ...]
    """One for each number of shots."""
    left_out: tuple[LeftOut, ...]
    lost_cells: tuple[LostCell, ...]
    chosen: tuple[ChosenFor, ...]
    repeat: Mapping[str, tuple[Command, ...]]
    """By row."""
    landscape: MeanLandscape | None
    environment: Mapping[str, object]
    image_ms: float
    """Milliseconds that the backbone takes for an image."""
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether a row or a whole cell failed."""
        return bool(self.lost_cells) or any(each.status == "failed" for each in self.left_out)

    def to_json(self) -> dict[str, Any]:
        return fields_of(self) | {"tables": [table.to_json() for table in self.tables]}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> BenchReport:
        found = renamed(found, landscape="path")
        landscape = current(found["landscape"]) if found["landscape"] is not None else None
        made: BenchReport = read(cls, {**found, "tables": (), "landscape": landscape})
        return dataclasses.replace(made, tables=tuple(map(BenchTable.from_json, found["tables"])))
