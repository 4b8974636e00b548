"""What the commands share: everything that is written to the terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from mergekit_vl.errors import UserError
from mergekit_vl.printable import printable
from mergekit_vl.registry.calls import to_stderr

if TYPE_CHECKING:
    from mergekit_vl.commands.bars import Bars
    from mergekit_vl.reports.table import Table


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

    from mergekit_vl.reports.text_table import drawn

    console = Console(file=_stdout(), markup=False, emoji=False, highlight=False)
    _write(drawn(table, console), _stdout())


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
    """Warnings on stderr, lines on stdout, and bars on stderr.

    Nothing but warnings is shown unless `show`, and bars where stderr is a terminal, from `after` seconds on.
    """

    def __init__(self, show: bool, *, after: float = 0.0) -> None:
        self.show, self.since = show, time.monotonic() + after
        self.said: set[str] = set()
        self.bars: Bars | None = None
        self.lock = threading.Lock()

    def __enter__(self) -> TerminalReporter:
        return self

    def warn(self, text: str) -> None:
        warn(text)

    def tell(self, text: str) -> None:
        if self.show and text not in self.said:
            self.said.add(text)  # controls are trained as the row is, and say the same
            say(text)

    def progress(self, done: int, total: int, what: str) -> None:
        if not self.show or time.monotonic() < self.since:
            return
        with self.lock:
            if self.bars is None:
                from mergekit_vl.commands.bars import Bars  # with rich, for what takes a while

                self.bars = Bars()
            self.bars.progress(done, total, what)

    def __exit__(self, *error: object) -> None:
        if self.bars is not None:
            self.bars.stop()
