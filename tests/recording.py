"""A reporter that keeps what it is told."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Recording:
    warned: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    progressed: list[tuple[int, int, str]] = field(default_factory=list)
    then: Callable[[int, int, str], object] = lambda done, total, what: None
    """Called at each progress, for instance to kill the work there."""

    def warn(self, text):
        self.warned.append(text)

    def tell(self, text):
        self.told.append(text)

    def progress(self, done, total, what):
        self.progressed.append((done, total, what))
        self.then(done, total, what)
