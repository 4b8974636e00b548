"""One table, by hand, through all four renderers: the same numbers and the same marks."""

import csv
import io

import pytest

from mergekit_vl.commands.terminal import say_table
from mergekit_vl.reports import render
from mergekit_vl.reports.table import Cell, Column, Table, TableRow, best

TABLE = Table(
    columns=(
        Column("acc", ".1f", "half"),
        Column("HM", ".1f"),
        Column("minus <base>", "+.1f", "range"),
        Column("chosen", place="document"),
        Column("MB", ".2f", place="page"),
    ),
    rows=(
        TableRow("base", (Cell(50.0, (47.0, 53.0)), Cell(60.0), Cell(), Cell(""), Cell(1.5)), "zero-shot"),
        TableRow(
            "mine",
            (Cell(70.25, (68.0, 72.0)), Cell(75.0, mark="best"), Cell(15.0, (10.0, 20.0), "above"), Cell("a|b"), Cell(2)),
            "merged",
            main=True,
            equal=("yours",),
        ),
        TableRow("average", (Cell(40.0, (38.0, 42.0)), Cell(50.0), Cell(-10.0, (-12.0, 1.0)), Cell(""), Cell()), "control"),
        TableRow("lost", (Cell(), Cell(mark="failed"), Cell(), Cell(), Cell()), "merged"),
    ),
    title="two tasks",
    notes=("n = 100",),
)  # fmt: skip
LEGEND = ("n = 100", "* the 95% interval excludes 0", "^ the highest", "(c) a control")


def words(line):
    return line.split()


def test_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    say_table(TABLE)
    title, heads, _, *rows, notes = capsys.readouterr().out.rstrip().splitlines()[:8]
    assert title.strip() == "two tasks" and words(heads) == ["row", "acc", "HM", "minus", "<base>"]
    assert words(rows[0]) == ["base", "50.0", "±3.0", "60.0"]
    assert words(rows[1]) == ["mine", "=", "yours", "70.2", "±2.0", "75.0^", "+15.0*", "(+10.0,", "+20.0)"]
    assert words(rows[2]) == ["average", "(c)", "40.0", "±2.0", "50.0", "-10.0", "(-12.0,", "+1.0)"]
    assert words(rows[3]) == ["lost", "failed"]
    assert notes.startswith("n = 100; ± half of the 95% interval; *")


@pytest.mark.parametrize(
    "width, there, left",
    [("50", "+15.0*", "±"), ("36", "+15.0*", "±"), ("28", "75.0^", "+15.0*")],
)
def test_a_narrow_terminal_goes_without_intervals_then_without_the_last_columns(
    width, there, left, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", width)
    say_table(TABLE)
    out = capsys.readouterr().out
    assert there in out and left not in out and max(map(len, out.splitlines())) <= int(width)
    assert ("in a wider terminal" in " ".join(out.split())) == (width == "28")


def test_markdown():
    lines = str(render.markdown(TABLE)).splitlines()
    assert lines[:2] == [
        "| row | acc | HM | minus &lt;base&gt; | chosen |",
        "|---|---:|---:|---:|---|",
    ]
    assert lines[2:6] == [
        "| base | 50.0 ±3.0 | 60.0 |  |  |",
        r"| mine = yours | 70.2 ±2.0 | 75.0^ | +15.0\* (+10.0, +20.0) | a\|b |",
        "| average (c) | 40.0 ±2.0 | 50.0 | -10.0 (-12.0, +1.0) |  |",
        "| lost |  | failed |  |  |",
    ]
    legend = ("n = 100", "± half of the 95% interval", r"\* the 95% interval excludes 0", *LEGEND[2:])
    assert lines[7] == "; ".join(legend)


def test_html():
    page = str(render.html(TABLE, sortable=True))
    assert "<th>minus &lt;base&gt;</th>" in page and "class=sortable" in page
    assert '<td data-value="50.0">50.0 <span class=range>47.0 to 53.0</span></td>' in page
    assert '<tr class="merged main"><td>mine<span class=equal>= yours</span></td>' in page
    assert '<td class="best" data-value="75.0">75.0<span class=mark>^</span></td>' in page
    assert "+15.0<span class=mark>*</span> <span class=range>+10.0 to +20.0</span></td>" in page
    assert '<tr class="control"><td>average <span class=mark>(c)</span></td>' in page
    assert '<td class="failed" data-value=""><span class=mark>failed</span></td>' in page
    assert f"<p class=notes>{'; '.join(LEGEND)}</p>" in page


def test_csv_has_every_number_in_full():
    base, mine, average, lost = csv.DictReader(io.StringIO(render.csv_text(TABLE)))
    assert mine == {
        "row": "mine", "kind": "merged", "equal to the bit": "yours",
        "acc": "70.25", "acc low": "68.0", "acc high": "72.0",
        "HM": "75.0", "HM mark": "best",
        "minus <base>": "15.0", "minus <base> low": "10.0", "minus <base> high": "20.0", "minus <base> mark": "above",
        "chosen": "a|b", "MB": "2",
    }  # fmt: skip
    assert (base["minus <base>"], base["kind"], average["minus <base> mark"]) == ("", "zero-shot", "")
    assert (lost["HM"], lost["HM mark"]) == ("", "failed")


def test_a_row_has_a_cell_for_each_column():
    with pytest.raises(ValueError, match="short: 1 cells under 2 columns"):
        Table((Column("a"), Column("b")), (TableRow("short", (Cell(),)),))


def test_the_highest_is_marked_where_there_are_others():
    assert best([1.0, 3.0, 3.0]) == ["", "best", "best"] and best([1.0, 1.0]) == ["", ""]
