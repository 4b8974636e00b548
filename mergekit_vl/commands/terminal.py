"""What the commands share: everything that is written to the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TextIO

import typer

from mergekit_vl.errors import UserError
from mergekit_vl.printable import printable
from mergekit_vl.registry.calls import to_stderr

AllowEnv = Annotated[
    list[str] | None,
    typer.Option(
        help="an environment variable that the recipe may read as ${oc.env:NAME}; once for each", metavar="NAME"
    ),
]
ALL_CELLS = "all cells"


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


@dataclass(frozen=True)
class Column:
    header: str
    left: bool = False
    folds: bool = False
    """Whether its cells take several lines where the terminal is narrow."""


def say_table(
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    *,
    caption: str = "",
    strong: Sequence[int] = (),
) -> None:
    """Print a table; the rows with the numbers `strong` are bold."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=printable(title), caption=printable(caption) or None, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
        show_edge=False, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    for column in columns:
        justify = "left" if column.left else "right"
        table.add_column(printable(column.header), justify=justify, no_wrap=not column.folds, overflow="fold")
    for i, row in enumerate(rows):
        table.add_row(*map(printable, row), style="bold" if i in strong else "")
    console = Console(file=_stdout(), markup=False, emoji=False, highlight=False)
    with console.capture() as drawn:
        console.print(table)
    _write(drawn.get(), _stdout())


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


@contextmanager
def counting(show: bool) -> Iterator[Callable[[int], None]]:
    """A line on stderr, where that is a terminal, that counts the elements which it is told of, after two seconds."""
    if not show or sys.stderr is None or not sys.stderr.isatty():
        yield lambda elements: None
        return
    began, state = time.monotonic(), {"done": 0, "shown": 0.0}

    def tell(elements: int) -> None:
        state["done"] += elements
        now = time.monotonic()
        if now - began > 2 and now - state["shown"] > 0.5:
            state["shown"] = now
            _write(f"\r{state['done'] / 1e6:.0f} M elements", sys.stderr)

    try:
        yield tell
    finally:
        _write("\r\033[K", sys.stderr)


class TerminalProgress:
    """Rich progress on stderr: what is done now, and above it all cells where there are several, each with the time left."""

    def __init__(self, show: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

        what = TextColumn("{task.description}", markup=False)
        columns = (SpinnerColumn(), what, BarColumn(), TimeRemainingColumn())
        self.console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not show)
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> TerminalProgress:
        self.bar.start()
        return self

    def __call__(self, done: int, total: int, what: str) -> None:
        if what not in self.tasks:
            for old in [name for name in self.tasks if name != ALL_CELLS] if what != ALL_CELLS else ():
                self.bar.remove_task(self.tasks.pop(old))
            self.tasks[what] = self.bar.add_task(printable(what), total=total or None)
        self.bar.update(self.tasks[what], completed=done, total=total or None)

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(printable(text))

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
