"""Renderers: tables and templates as pages (HTML), Markdown and CSV.

Templates are Jinja2's and lie in `templates/`. Whatever text they are given is escaped, by `printable.in_html` or `in_markdown`;
`Markup` alone, which only this code makes, stands as it is.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from mergekit_vl.printable import in_html, in_markdown
from mergekit_vl.reports.table import CONTROL, GLYPHS, Table, number, text

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def html(table: Table, *, sortable: bool = False, titled: bool = False) -> Markup:
    """The table for a page; with `sortable` for one that has the script `sort.js`, with `titled` for a place without headings."""
    return page("table.html", table=table, sortable=sortable, titled=titled)


def notebook_table(rows: Sequence[Sequence[str]], *, header: Sequence[str] = (), title: str = "") -> Markup:
    """Rows of text for a notebook; without a header the first cell of a row is its heading."""
    return page("notebook_table.html", rows=rows, header=header, title=title)


def markdown(table: Table) -> Markup:
    return card("table.md", table=table.narrow("anywhere", "document"))


def csv_text(table: Table) -> str:
    """Every number in full; the ends of intervals and the marks are columns of their own, and so are kinds and equal rows."""
    intervals = [column.interval != "" for column in table.columns]
    marks = [any(row.cells[i].mark for row in table.rows) for i in range(len(table.columns))]
    kinds, equal = any(row.kind for row in table.rows), any(row.equal for row in table.rows)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = [table.corner, *["kind"] * kinds, *["equal to the bit"] * equal]
    for column, interval, mark in zip(table.columns, intervals, marks):
        name = column.header
        header += [name, *[f"{name} low", f"{name} high"] * interval, *[f"{name} mark"] * mark]
    writer.writerow(header)
    for row in table.rows:
        values: list[Any] = [row.label, *[row.kind] * kinds, *["; ".join(row.equal)] * equal]
        for cell, interval, mark in zip(row.cells, intervals, marks):
            values += [cell.value, *(cell.interval or (None, None)) * interval, *[cell.mark] * mark]
        writer.writerow(["" if value is None else value for value in values])
    return out.getvalue()


def markup(text: str) -> Markup:
    """Text that is HTML or Markdown already: plots as SVG, code."""
    from markupsafe import Markup

    return Markup(text)  # noqa: S704


def page(template: str, **values: object) -> Markup:
    """A template as HTML."""
    return markup(_environment(in_html).get_template(template).render(values))


def card(template: str, **values: object) -> Markup:
    """A template as Markdown."""
    return markup(_environment(in_markdown).get_template(template).render(values))


@cache
def _environment(escape: Callable[[str], str]) -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def escaped(value: object) -> Any:
        return Markup(escape(value)) if isinstance(value, str) and not isinstance(value, Markup) else value  # noqa: S704

    made = Environment(
        loader=PackageLoader("mergekit_vl.reports"),
        autoescape=True,
        finalize=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.globals |= {"text": text, "number": number, "GLYPHS": GLYPHS, "CONTROL": CONTROL}
    return made
