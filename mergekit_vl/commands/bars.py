"""Bars on stderr, if that is a terminal: what is done now, and above it all cells where there are several."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

from mergekit_vl.printable import printable
from mergekit_vl.reporter import ALL_CELLS


class Bars:
    def __init__(self) -> None:
        what = TextColumn("{task.description}", markup=False)
        console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        columns = (SpinnerColumn(), what, BarColumn(), TimeRemainingColumn())
        self.drawn = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.tasks: dict[str, TaskID] = {}
        self.drawn.start()

    def progress(self, done: int, total: int, what: str) -> None:
        """As `Reporter.progress`."""
        if what not in self.tasks:
            for old in [name for name in self.tasks if name != ALL_CELLS] if what != ALL_CELLS else ():
                self.drawn.remove_task(self.tasks.pop(old))
            self.tasks[what] = self.drawn.add_task(printable(what), total=total or None)
        self.drawn.update(self.tasks[what], completed=done, total=total or None)

    def stop(self) -> None:
        self.drawn.stop()
