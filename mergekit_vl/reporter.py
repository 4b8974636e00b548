"""How work tells what it does: one object, handed down from a command or a notebook to the innermost loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

ALL_CELLS = "all cells"
"""The progress over cells, which is shown beside that of the work in one of them."""


class Reporter(Protocol):
    """Any object with these methods; each may be called from a thread."""

    def warn(self, text: str) -> None:
        """Tell of something that may not be what was meant."""

    def tell(self, text: str) -> None:
        """Tell of something on the way that is worth a line."""

    def progress(self, done: int, total: int, what: str) -> None:
        """`done` of `total` steps of `what` are done; a total of 0 is not known."""


@dataclass(frozen=True)
class Silent:
    """It tells nobody."""

    def warn(self, text: str) -> None:
        pass

    def tell(self, text: str) -> None:
        pass

    def progress(self, done: int, total: int, what: str) -> None:
        pass


SILENT = Silent()


@dataclass(frozen=True)
class Within:
    """A reporter for one part of the work, which its progress names."""

    reporter: Reporter
    part: str

    def warn(self, text: str) -> None:
        self.reporter.warn(text)

    def tell(self, text: str) -> None:
        self.reporter.tell(text)

    def progress(self, done: int, total: int, what: str) -> None:
        self.reporter.progress(done, total, f"{self.part}: {what}")
