"""A table as text, for terminals and for what objects of the Python API show as."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mergekit_vl.printable import printable
from mergekit_vl.reports.table import Table, text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

LABEL, FOLDED, WORDS = 20, 12, (20, 9, 7, 5)
"""Letters that the labels of a table's rows have at least, where headers are folded too, and that a word of a header may have then."""


def table_text(table: Table, width: int = 120) -> str:
    """Text of this many letters a line, without colours: what objects of the Python API show as."""
    from rich.console import Console

    return drawn(table, Console(width=width, color_system=None, markup=False, emoji=False, highlight=False))


def drawn(table: Table, console: Console) -> str:
    """What the console would print of the table."""
    with console.capture() as out:
        console.print(drawn_table(table.narrow("anywhere"), console.width))
    return out.get()


def drawn_table(table: Table, width: int) -> RichTable:
    """The table as rich draws it in this many letters: main rows and best cells are bold, kinds and marks are told as text."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    body, widths, notes = _fitted(table, width)
    made = RichTable(
        title=printable(table.title), caption=printable("; ".join(notes)) or None, title_justify="left",
        caption_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    made.add_column(printable(table.corner), overflow="fold")
    for column, letters in zip(table.columns, widths):
        justify: Literal["left", "right"] = "right" if column.form else "left"
        made.add_column(printable(column.header), justify=justify, width=letters, overflow="fold")
    for row, cells in zip(table.rows, body):
        shown = [
            Text(printable(told), style="bold" if cell.mark == "best" else "") for told, cell in zip(cells, row.cells)
        ]
        made.add_row(printable(row.name), *shown[: len(widths)], style="bold" if row.main else "")
    return made


def _fitted(table: Table, width: int) -> tuple[list[list[str]], list[int], tuple[str, ...]]:
    """The cells as text, the widths of the columns that fit beside the labels, and the notes below."""
    from rich.cells import cell_len

    longest = max((cell_len(printable(row.name)) for row in table.rows), default=0)
    headers = [column.header for column in table.columns]
    body: list[list[str]] = []
    widths: list[int] = []
    for ranges in (True, False):
        body = [
            [text(cell, column, ranges=ranges) for column, cell in zip(table.columns, row.cells)] for row in table.rows
        ]
        widths = [max(map(cell_len, cells)) for cells in zip(headers, *body)]
        if min(longest, LABEL) + sum(2 + letters for letters in widths) < width:
            return body, widths, table.legend(ranges=ranges)
    least = [max(map(cell_len, cells)) for cells in zip(*body)] or [0] * len(headers)
    for word in WORDS:
        words = [max(map(cell_len, header.split()), default=0) for header in headers]
        widths = [max(letters, min(word, most)) for letters, most in zip(least, words)]
        if min(longest, FOLDED) + sum(2 + letters for letters in widths) < width:
            return body, widths, table.legend(ranges=False)
    while len(widths) > 1 and min(longest, FOLDED) + sum(2 + letters for letters in widths) >= width:
        widths.pop()
    left = ", ".join(headers[len(widths) :])
    return body, widths, (*table.legend(ranges=False), f"in a wider terminal: {left}")
