"""The reporter of the Python API: warnings are Python's own."""

from __future__ import annotations

import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class PythonWarnings:
    """A reporter whose warnings are Python's; it tells nothing else."""

    def warn(self, text: str) -> None:
        warnings.warn(text, stacklevel=4)

    def tell(self, text: str) -> None:
        pass

    def progress(self, done: int, total: int, what: str) -> None:
        pass


PYTHON_WARNINGS = PythonWarnings()
