"""What a run found, as frozen dataclasses. Their fields are the keys of the JSON on disk, which is written and read here alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from mergekit_vl.models.choices import Choice, Chosen
from mergekit_vl.models.evaluate import Scores
from mergekit_vl.options import Options
from mergekit_vl.protocols.base import Metric

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T", bound=Options)
Kind = Literal["zero-shot", "tuned", "control", "merged"]
LEFT_OUT = {"json": False}
"""Of a field that is not on disk."""
IF_THERE = {"json": "if there"}
"""Of a field whose key is on disk where it has a value."""


@dataclass(frozen=True)
class Cost:
    seconds: float
    """To make it, images being encoded."""
    ms_per_sample: float
    """From features to logits."""


@dataclass(frozen=True)
class Row:
    """A model's scores in one cell."""

    row: str
    """Its label."""
    kind: Kind
    tests: Mapping[str, Scores]
    score: float
    """The protocol's headline, a fraction."""
    right: Mapping[str, str]
    """By test: 1 for each image that it has right, else 0."""
    digest: Mapping[str, str]
    """By test: of its logits."""
    parameters: int
    forwards: int
    cost: Cost
    choice: Choice | None = field(default=None, metadata=LEFT_OUT)
    answers: Mapping[str, tuple[int, ...]] = field(default_factory=dict, metadata=LEFT_OUT)
    """By test: the class that it names of each image. Cells have it on record; reports, and records of earlier versions, do not."""

    def to_json(self) -> dict[str, Any]:
        choice = self.choice
        values = dict(choice.values) if choice is not None else {}
        learnt = choice is not None and choice.learnt
        told = {"chosen": {} if learnt else values, "learnt": values if learnt else {}}
        tried = {"tried": plain(choice.tried)} if choice is not None and choice.tried else {}
        return fields_of(self) | told | {"chosen_on": choice.split if choice is not None else None} | tried

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Row:
        """Of an earlier version's row too, which did not tell the split: it was `val`."""
        learnt = bool(found.get("learnt"))
        values = found["learnt"] if learnt else found.get("chosen")
        choice = None
        if values:
            on, tried = found.get("chosen_on", "val"), found.get("tried", ())
            choice = {"values": values, "split": on, "learnt": learnt, "tried": tried}
        return read(cls, {**found, "choice": choice})

    @property
    def chosen(self) -> dict[str, tuple[object, str]]:
        """(value, split) by what was chosen and not learnt."""
        if self.choice is None or self.choice.learnt:
            return {}
        return {what: (value, self.choice.split) for what, value in self.choice.values.items()}

    def accuracies(self, key: str = "acc1") -> dict[str, float]:
        """One of its scores by test."""
        return {test: vars(scores)[key] for test, scores in self.tests.items()}


@dataclass(frozen=True)
class BackboneFacts:
    spec: str
    pretrained: str
    digest: str


@dataclass(frozen=True)
class LinePoint:
    """A point between two models in one cell."""

    segment: str
    space: str
    alpha: float
    tests: Mapping[str, Mapping[str, float]]
    """acc1 and nll by test."""


@dataclass(frozen=True)
class ClassChange:
    """Right answers on the test images of one class."""

    name: str
    n: int
    before: int
    """The base's."""
    tuned: int
    after: int
    """The main row's."""
    gained: int
    """Images that are right after and were wrong before."""
    forgotten: int
    """Images that are wrong after and were right before."""


@dataclass(frozen=True)
class Picture:
    """A test image whose answer was right before and is wrong after, or the other way round."""

    row: int
    """Of the image source."""
    label: str
    before: str
    """The base's answer; empty where it is not on record."""
    after: str
    right: bool
    """Whether `after` is right."""
    file: str = ""
    """Where images are files."""
    drawn: str = field(default="", metadata=LEFT_OUT)
    """A small JPEG as a data URI."""


@dataclass(frozen=True)
class TestChange:
    """What changed on one test from the base to the main row."""

    test: str
    classes: tuple[ClassChange, ...]
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class CellResult:
    """One task and one seed."""

    dataset: str
    seed: int
    backbone: BackboneFacts
    note: str
    metric: Metric
    counts: Mapping[str, int]
    """Images: to tune on, to choose on, and of each test."""
    rows: tuple[Row, ...] = ()
    landscape: tuple[LinePoint, ...] = field(default=(), metadata=LEFT_OUT)
    changes: tuple[TestChange, ...] | None = field(default=None, metadata=IF_THERE)
    """By test, from the base to the main row; None in reports of earlier versions."""

    def to_json(self) -> dict[str, Any]:
        return fields_of(self) | {"rows": [row.to_json() for row in self.rows]}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> CellResult:
        facts: CellResult = read(cls, {key: value for key, value in found.items() if key != "rows"})
        return dataclasses.replace(facts, rows=tuple(Row.from_json(row) for row in found.get("rows", ())))


@dataclass(frozen=True)
class Column:
    """A column of a table, averaged over cells, accuracy in percent."""

    acc1: float
    interval: tuple[float, float] | None
    n: int | None = field(default=None, metadata=IF_THERE)
    acc5: float | None = field(default=None, metadata=IF_THERE)
    mean_per_class_recall: float | None = field(default=None, metadata=IF_THERE)
    nll: float | None = field(default=None, metadata=IF_THERE)
    ece: float | None = field(default=None, metadata=IF_THERE)


@dataclass(frozen=True)
class OnDataset:
    dataset: str
    columns: Mapping[str, Column]
    score: float


@dataclass(frozen=True)
class SummaryRow:
    """A row of the table, averaged over cells, in percent; its headline is that of the averages, as is customary."""

    row: str
    kind: Kind
    columns: Mapping[str, Column]
    score: float
    mean_of_scores: float
    parameters: int
    forwards: int
    datasets: tuple[OnDataset, ...]
    chosen: Mapping[str, tuple[Chosen, ...]]
    seconds: float
    ms_per_sample: float
    normalised: float | None = field(default=None, metadata=IF_THERE)


@dataclass(frozen=True)
class Paired:
    """A headline minus another, in points."""

    mean: float
    low: float | None
    high: float | None
    verdict: str
    over: str


@dataclass(frozen=True)
class Difference:
    """The main row's headline minus another row's, in points."""

    minus: str
    mean: float
    low: float | None
    high: float | None
    verdict: str
    over: str


@dataclass(frozen=True)
class Forgetting:
    """The tables over the tasks where the tuned model forgets; none where there are too few."""

    tasks: tuple[str, ...]
    summary: tuple[SummaryRow, ...] | None = field(default=None, metadata=IF_THERE)
    differences: tuple[Difference, ...] | None = field(default=None, metadata=IF_THERE)


@dataclass(frozen=True)
class MeanPoint:
    """A point of the landscape, averaged over cells."""

    segment: str
    space: str
    alpha: float
    columns: Mapping[str, Column]


@dataclass(frozen=True)
class Report:
    """A finished run."""

    recipe: str
    hash: str
    code: Mapping[str, str]
    """Module -> hash, of everything that made it."""
    protocol: str
    metric: Metric
    note: str
    selection: str
    main: str
    base: str
    tuned_row: str
    """The first tuned model."""
    cells: tuple[CellResult, ...]
    summary: tuple[SummaryRow, ...]
    differences: tuple[Difference, ...]
    forgetting: Forgetting
    landscape: tuple[MeanPoint, ...]
    environment: Mapping[str, object]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return fields_of(self) | {"cells": [cell.to_json() for cell in self.cells]}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Report:
        found = renamed(found, tuned_row="anchor", landscape="path")
        points = [renamed(point, segment="leg") for point in found["landscape"]]
        made: Report = read(cls, {**found, "cells": (), "landscape": points})
        return dataclasses.replace(made, cells=tuple(CellResult.from_json(cell) for cell in found["cells"]))


def renamed(found: Mapping[str, Any], **formerly: str) -> dict[str, Any]:
    """JSON of 0.1.0 too, with keys as they are called now."""
    return {now: found[then] for now, then in formerly.items() if then in found} | dict(found)


def fields_of(made: Options) -> dict[str, Any]:
    """A dataclass as JSON holds it."""
    fields = [(f.name, vars(made)[f.name], f.metadata.get("json", True)) for f in dataclasses.fields(made)]
    return {name: plain(v) for name, v, told in fields if told is True or (told == "if there" and v is not None)}


def plain(value: object) -> Any:
    """As JSON holds it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return fields_of(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def read(cls: type[T], found: Mapping[str, Any]) -> T:
    """Raises ValueError for what is not so; keys that are not known are passed over."""
    made: T = _reader(cls).validate_python(found)
    return made


@cache
def _reader(cls: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)
