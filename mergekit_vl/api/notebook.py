"""Objects as notebooks show them."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_vl.printable import in_html


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    """A table; whatever stands in it is text and no HTML."""
    head = "".join(f"<th>{in_html(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{in_html(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    above = f"<caption>{in_html(title)}</caption>" if title else ""
    return f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
