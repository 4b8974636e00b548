"""What the commands share: everything that is written to the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TextIO

from mergekit_vl.errors import UserError
from mergekit_vl.printable import printable
from mergekit_vl.registry.calls import to_stderr
from mergekit_vl.reporter import ALL_CELLS
from mergekit_vl.reports.table import Table, text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table as RichTable

LABEL, FOLDED, WORDS = 20, 12, (20, 9, 7, 5)
"""Letters that the labels of a table's rows have at least, where headers are folded too, and that a word of a header may have then."""


@contextmanager
def ours_alone() -> Iterator[None]:
    """Inside, nothing but `say` writes to stdout: what plugins and libraries print goes to stderr."""
    _real.append(_stdout())
    try:
        with to_stderr():
            yield
    finally:
        _real.pop()


_real: list[TextIO | None] = []
"""The real stdout, while sys.stdout is another; None where whoever started us closed it."""


def _stdout() -> TextIO | None:
    return _real[-1] if _real else sys.stdout


def say(*lines: str, err: bool = False) -> None:
    """Print lines; what a label brings along - line ends, escapes of a terminal - is spelt out."""
    _write("".join(f"{printable(line)}\n" for line in lines), sys.stderr if err else _stdout())


def warn(text: str) -> None:
    say(f"warning: {text}", err=True)


def say_table(table: Table) -> None:
    """Print a table; where the terminal is narrow without the intervals, then with folded headers and labels, then without the last columns."""
    from rich.console import Console

    console = Console(file=_stdout(), markup=False, emoji=False, highlight=False)
    _write(_drawn(table, console), _stdout())


def table_text(table: Table, width: int = 120) -> str:
    """The same as text of this many letters a line, without colours: what objects of the Python API show as."""
    from rich.console import Console

    return _drawn(table, Console(width=width, color_system=None, markup=False, emoji=False, highlight=False))


def _drawn(table: Table, console: Console) -> str:
    with console.capture() as drawn:
        console.print(drawn_table(table.narrow("anywhere"), console.width))
    return drawn.get()


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


def _write(text: str, stream: TextIO | None) -> None:
    if stream is None:  # closed by whoever started us
        return
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where="standard output") from None


class TerminalReporter:
    """Warnings on stderr, lines on stdout, and bars on stderr: what is done now, and above it all cells where there are several.

    Nothing but warnings is shown unless `show`, and bars where stderr is a terminal, from `after` seconds on.
    """

    def __init__(self, show: bool, *, after: float = 0.0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

        what = TextColumn("{task.description}", markup=False)
        columns = (SpinnerColumn(), what, BarColumn(), TimeRemainingColumn())
        console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        self.bar = Progress(*columns, console=console, transient=True)
        self.show, self.bars, self.since = show, show and console.is_terminal, time.monotonic() + after
        self.tasks: dict[str, TaskID] = {}
        self.said: set[str] = set()

    def __enter__(self) -> TerminalReporter:
        return self

    def warn(self, text: str) -> None:
        warn(text)

    def tell(self, text: str) -> None:
        if self.show and text not in self.said:
            self.said.add(text)  # controls are trained as the row is, and say the same
            say(text)

    def progress(self, done: int, total: int, what: str) -> None:
        if not self.bars or time.monotonic() < self.since:
            return
        self.bar.start()
        if what not in self.tasks:
            for old in [name for name in self.tasks if name != ALL_CELLS] if what != ALL_CELLS else ():
                self.bar.remove_task(self.tasks.pop(old))
            self.tasks[what] = self.bar.add_task(printable(what), total=total or None)
        self.bar.update(self.tasks[what], completed=done, total=total or None)

    def __exit__(self, *error: object) -> None:
        if self.bars:
            self.bar.stop()
