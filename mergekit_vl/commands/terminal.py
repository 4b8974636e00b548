"""What the commands share: everything that is written to the terminal, the device, and a run's own folder."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from mergekit_vl.errors import UserError, unknown
from mergekit_vl.printable import printable
from mergekit_vl.registry.calls import to_stderr
from mergekit_vl.registry.plugins import Registry, load_plugins

AllowEnv = Annotated[
    list[str] | None,
    typer.Option(
        help="an environment variable that the recipe may read as ${oc.env:NAME}; once for each", metavar="NAME"
    ),
]
ALL_CELLS = "all cells"
MARK, LOCK = ".recipe-hash", ".lock"
DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""One of these is there where torch may find a GPU on Linux: NVIDIA's, AMD's, that of WSL."""


@lru_cache(maxsize=1)
def registry() -> Registry:
    """The plugins, loaded once a process."""
    return load_plugins()


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
def alone(folder: Path) -> Iterator[None]:
    """Keep every other command out of a run's folder; raises UserError at once where another process is at work in it.

    Where nothing can be written there is no lock: what is there can still be told.
    """
    from mergekit_vl.system.atomic_files import made_parents
    from mergekit_vl.system.locks import locked

    hint = "choose another --out"
    if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK)):
        yield
        return
    with made_parents(folder / LOCK, hint=hint), locked(folder / LOCK, where=folder, hint=hint):
        yield


def claim(folder: Path, mark: str, load: Callable[[Path], Any], *, force: bool) -> Any:
    """Take a folder, `alone`, for what `mark` stands for; what `load` finds there if it is done already.

    Raises UserError for the folder of something else.
    """
    import shutil

    from mergekit_vl.system.atomic_files import PARTIAL, sweep, write_text

    file = folder / MARK
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file", where=str(folder), hint="choose another --out")
    if folder.is_dir() and any(path.suffix != PARTIAL and path.name != LOCK for path in folder.iterdir()):
        if not file.exists() or file.read_bytes().strip() != mark.encode():
            raise UserError(
                "this folder belongs to another recipe, or to other settings of it",
                where=str(folder),
                hint="choose another --out",
            )
        if force:  # what says that it is done goes first, and the mark stays: a kill leaves a run that goes on
            for path in sorted(folder.iterdir(), key=lambda path: path.suffix != ".json"):
                if path.name not in (MARK, LOCK):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        elif (found := load(folder)) is not None:
            return found
    write_text(file, mark + "\n")
    sweep(folder)
    return None


@contextmanager
def tidied(folder: Path) -> Iterator[None]:
    """What fails or is interrupted inside before its first result leaves no new folder behind."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except BaseException:
        if folder.is_dir() and [path.name for path in folder.iterdir()] == [MARK]:
            (folder / MARK).unlink()
        for place in new:
            if not place.is_dir() or any(place.iterdir()):
                break
            place.rmdir()
        raise


def check_device(name: str) -> None:
    """Raise UserError for what is no device's name; whether it is there is not asked."""
    kind, colon, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda"):
        raise unknown("device", name, ("auto", "cpu", "cuda"))
    if colon and not (kind != "auto" and number.isascii() and number.isdigit()):
        raise UserError(f"device {name!r}", where="command line", hint="write auto, cpu, cuda or cuda:0")


def device_of(name: str) -> str:
    """A device as torch names it; raises UserError for one that is not there.

    torch takes seconds and memory to import: without a driver it is not asked.
    """
    check_device(name)
    if name.startswith("cpu") or (name == "auto" and sys.platform == "linux" and not any(map(os.path.exists, DRIVERS))):
        return name.replace("auto", "cpu")
    import torch

    if name != "auto" and not torch.cuda.is_available():
        raise UserError(f"device {name}: no GPU is visible to torch", hint="use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


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
