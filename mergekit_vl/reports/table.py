"""A table as data: columns, rows of cells with intervals and marks, and notes. It is built once and rendered four ways.

`render.py` has the renderers for pages, Markdown and CSV, `commands/terminal.py` the one for the terminal. What a cell and its marks
look like as text is told here, so that they look the same everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Mark = Literal["", "best", "above", "below", "failed"]
"""Of a cell: the highest of its column; the 95% interval of a difference lies above or below 0; the row could not be made."""
GLYPHS: dict[Mark, str] = {"": "", "best": "^", "above": "*", "below": "*", "failed": "failed"}
CONTROL = "(c)"
"""What follows the label of a control."""


@dataclass(frozen=True)
class Column:
    header: str
    form: str = ""
    """The format of its numbers, ".1f"; the empty one for text."""
    interval: Literal["", "half", "range"] = ""
    """How a line of text tells the interval of a cell: "83.1 ±2.0" or "+1.2 (+0.4, +2.0)"; pages have the range."""
    place: Literal["anywhere", "document", "page"] = "anywhere"
    """Where it stands: in documents, which are Markdown, pages and CSV and no terminal; or in pages and CSV alone."""


@dataclass(frozen=True)
class Cell:
    value: float | str | None = None
    interval: tuple[float, float] | None = None
    """The 95% interval, in the unit of the value."""
    mark: Mark = ""


@dataclass(frozen=True)
class TableRow:
    label: str
    cells: tuple[Cell, ...]
    """One a column."""
    kind: str = ""
    """zero-shot, tuned, control or merged, where the rows are models."""
    main: bool = False
    equal: tuple[str, ...] = ()
    """Rows that this one stands for too: their logits are the same to the bit."""

    @property
    def name(self) -> str:
        """The label with what it stands for and its mark, as a line of text has them."""
        label = f"{self.label} {CONTROL}" if self.kind == "control" else self.label
        return " = ".join((label, *self.equal))


@dataclass(frozen=True)
class Table:
    columns: tuple[Column, ...]
    """Those beside the labels of the rows."""
    rows: tuple[TableRow, ...]
    title: str = ""
    notes: tuple[str, ...] = ()
    corner: str = "row"
    """The header above the labels."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(f"{row.label}: {len(row.cells)} cells under {len(self.columns)} columns")

    def narrow(self, *places: str) -> Table:
        """With the columns alone that stand in these places, and that have a value in some row."""
        full = [
            any(row.cells[i] != Cell() and row.cells[i].value != "" for row in self.rows)
            for i in range(len(self.columns))
        ]
        kept = [i for i, column in enumerate(self.columns) if column.place in places and full[i]]
        rows = tuple(dataclasses.replace(row, cells=tuple(row.cells[i] for i in kept)) for row in self.rows)
        return dataclasses.replace(self, columns=tuple(self.columns[i] for i in kept), rows=rows)

    def cells(self) -> Iterator[tuple[Column, Cell]]:
        for row in self.rows:
            yield from zip(self.columns, row.cells)

    def legend(self, *, ranges: bool = True) -> tuple[str, ...]:
        """The notes, and what the marks in the table mean; `ranges` tells whether intervals are shown."""
        marks = {cell.mark for _, cell in self.cells()}
        halves = ranges and any(column.interval == "half" and cell.interval for column, cell in self.cells())
        meanings = (
            ("± half of the 95% interval", halves),
            ("* the 95% interval excludes 0", bool(marks & {"above", "below"})),
            ("^ the highest", "best" in marks),
            (f"{CONTROL} a control", any(row.kind == "control" for row in self.rows)),
        )
        return (*self.notes, *(meaning for meaning, shown in meanings if shown))


def number(value: float | str | None, form: str) -> str:
    """A value as a reader sees it; nothing where there is none."""
    return "" if value is None else value if isinstance(value, str) else f"{value:{form}}"


def text(cell: Cell, column: Column, *, ranges: bool = True) -> str:
    """A cell on a line of text, with its mark, and with its interval if `ranges`."""
    told = number(cell.value, column.form) + GLYPHS[cell.mark]
    if cell.interval is None or not column.interval or not ranges:
        return told
    low, high = cell.interval
    if column.interval == "half":
        return f"{told} ±{(high - low) / 2:{column.form.lstrip('+')}}"
    return f"{told} ({low:{column.form}}, {high:{column.form}})"


def best(values: list[float]) -> list[Mark]:
    """The marks of a column in which the highest is best; none where all are as high."""
    return ["best" if value == max(values) and max(values) > min(values) else "" for value in values]
