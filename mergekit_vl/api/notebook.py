"""What notebooks see: objects as HTML, and warnings as Python's own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_vl.printable import in_html


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


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    """A table; whatever stands in it is text and no HTML."""
    head = "".join(f"<th>{in_html(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{in_html(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    above = f"<caption>{in_html(title)}</caption>" if title else ""
    return f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
