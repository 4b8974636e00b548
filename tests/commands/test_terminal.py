"""What goes to the terminal, and how a command ends: signals, closed pipes, full disks, narrow encodings, labels that act."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_vl.commands.exits import exit_code
from mergekit_vl.commands.terminal import TerminalReporter, say, say_table
from mergekit_vl.errors import UserError
from mergekit_vl.printable import printable, shortened
from mergekit_vl.reports.table import Cell, Column, Table, TableRow

PACKAGE = Path(__file__).parents[2] / "mergekit_vl"
ESCAPE = "b\x1b]0;owned\x07"
STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def heed_signals():
    """In the child: whoever started the tests may have signals ignored."""
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)


def mergekit_vl(*words, stdout=subprocess.PIPE, **environment):
    return subprocess.run(
        [sys.executable, "-m", "mergekit_vl", *words],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        preexec_fn=heed_signals,
        timeout=60,
    )


STOPPED = "import os, signal\nos.kill(os.getpid(), signal.{name})\n"


@pytest.mark.parametrize("how", STOPS)
def test_a_signal_while_modules_are_imported(how, tmp_path):
    (tmp_path / "typer.py").write_text(STOPPED.format(name=how.name))
    done = mergekit_vl("list", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr, done.stdout) == (128 + how, "interrupted\n", "")


@pytest.mark.parametrize("how", STOPS)
def test_a_signal_while_plugins_are_loaded_is_an_interruption_whatever_the_library_makes_of_it(how, tmp_path):
    hidden = (
        "try:\n    " + STOPPED.format(name=how.name).replace("\n", "\n    ") + "\nexcept BaseException:\n    exit(7)"
    )
    for text in (STOPPED.format(name=how.name), hidden):
        (tmp_path / "plugin.py").write_text(text)
        done = mergekit_vl("--plugins-dir", str(tmp_path), "list")
        assert (done.returncode, done.stderr, done.stdout) == (128 + how, "interrupted\n", "")


def test_a_signal_that_the_caller_ignores_stays_ignored(tmp_path):
    (tmp_path / "plugin.py").write_text(STOPPED.format(name="SIGHUP"))
    words = ["nohup", sys.executable, "-m", "mergekit_vl", "--plugins-dir", str(tmp_path), "list", "tuners"]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0 and "coop" in done.stdout


def test_a_pipe_that_is_closed_ends_it_without_a_word():
    reading, writing = os.pipe()
    os.close(reading)
    done = mergekit_vl("list", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("words", [["list"], ["--help"], ["show", "mergetune_coop"]])
def test_a_full_disk_is_told(words):
    with open("/dev/full", "w") as full:
        done = mergekit_vl(*words, stdout=full)
    assert done.returncode == 2
    assert re.fullmatch(r"error: (standard output: cannot be written: )?No space left on device\n", done.stderr)


def test_no_output_at_all():
    done = subprocess.run(["sh", "-c", f"{sys.executable} -m mergekit_vl list >&-"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


TABLE = """
from mergekit_vl.commands.exits import exit_code
from mergekit_vl.commands.terminal import say, say_table, warn
from mergekit_vl.reports.table import Cell, Column, Table, TableRow
def work():
    say_table(Table((Column("acc", ".1f", "half"),), (TableRow("日本 ±", (Cell(1.0, (0.5, 1.5)),)),), title="täsk"))
    say("zero-shot → fine-tuned, chat été")
    warn("été")
raise SystemExit(exit_code(work))
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_without_our_characters(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", TABLE], env=environment, capture_output=True)
    out = done.stdout.decode(encoding)
    assert done.returncode == 0 and r"\u65e5\u672c" in out and "zero-shot -> fine-tuned" in out
    assert ("1.0 +-0.5" in out and r"chat \xe9t\xe9" in out) if encoding == "ascii" else "1.0 ±0.5" in out


def test_what_acts_is_spelt_out_and_nothing_else():
    assert printable(ESCAPE) == r"b\x1b]0;owned\x07"
    assert printable("a\nb\tc\r\x7f\x9b") == r"a\nb\tc\r\x7f\x9b"
    assert printable("\u202eevil\u2066\u2028\udcff\ufeff") == r"\u202eevil\u2066\u2028\xff\ufeff"
    kept = "Chien d'été, собака, 犬, नमस्ते, 👩‍🚀, $x_1$, [red], <b>, \\n"
    assert printable(kept) == kept
    assert shortened("abcdefghij", 10) == "abcdefghij" and shortened("abcdefghijk", 10) == "abcdef…ijk"


def test_lines_and_tables_show_labels_as_they_are(capsys):
    say(f"{ESCAPE}: one", "[/red] two\nthree")
    rows = [
        TableRow(label, (Cell(1.0),)) for label in (r"[/blue] b\x1b]0;owned\x07", "[/red]", "[red]x", "l" * 400, "n\nm")
    ]
    say_table(Table((Column(":smile:", ".0f"),), tuple(rows), f"[red]{ESCAPE}", ("[/]",), corner="[bold]row"))
    with TerminalReporter(True) as reporter:
        reporter.progress(1, 2, f"[/red] {ESCAPE}")
        reporter.warn(f"[/red] {ESCAPE}")
        reporter.tell(f"[/blue] {ESCAPE}")
    out, err = capsys.readouterr()
    assert r"b\x1b]0;owned\x07: one" in out and r"[/red] two\nthree" in out
    for label in (
        r"[/blue] b\x1b]0;owned\x07",
        "[/red]",
        "[red]x",
        r"n\nm",
        "[/]",
        "[bold]row",
        ":smile:",
        r"[red]b\x1b]0;owned\x07",
    ):
        assert label in out
    assert out.count("l") >= 400 and not re.search(r"[\x00-\x09\x0b-\x1f]", out)
    assert r"[/red] b\x1b]0;owned\x07" in err and "\x07" not in err


def test_an_error_is_one_line_of_bearable_length(capsys):
    def fail():
        raise UserError("x" * 5000 + "\nend", where=ESCAPE)

    assert exit_code(fail) == 2
    err = capsys.readouterr().err
    assert err.startswith(r"error: b\x1b]0;owned\x07: xxx") and err.endswith("\\nend\n") and err.count("\n") == 1
    assert len(err) < 1100

    def lacking():
        raise MemoryError

    def unreadable():
        open("/nowhere/at all")

    assert exit_code(lacking) == 2 and exit_code(unreadable) == 2
    err = capsys.readouterr().err
    assert err == "error: the memory that is there is not enough\nerror: /nowhere/at all: No such file or directory\n"

    def bug():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        exit_code(bug)


def test_text_goes_to_the_terminal_in_one_place():
    writing = re.compile(r"typer\.echo|\bprint\(|Console\(|sys\.std(out|err)")
    found = {f.name for f in PACKAGE.rglob("*.py") if writing.search(f.read_text().replace("def _print(", ""))}
    assert found - {"app.py"} == {
        "terminal.py",
        "bars.py",
        "exits.py",
        "calls.py",
        "text_table.py",
    }  # the last draws into a text
