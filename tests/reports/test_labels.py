"""Labels, class names and names of files are data: reports survive them, show them as they are, and nothing in them acts."""

import contextlib
import dataclasses
import io
import json
import re
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image

from mergekit_vl.benchmark import plots
from mergekit_vl.benchmark.records import BenchRow, BenchTable
from mergekit_vl.commands import app
from mergekit_vl.printable import in_code, in_html, in_markdown, printable
from mergekit_vl.protocols.base import Metric
from mergekit_vl.reports.landscape_page import section
from mergekit_vl.reports.landscape_results import Barrier, MeanLandscape
from mergekit_vl.reports.results import LinePoint, SummaryRow
from mergekit_vl.system.atomic_files import slug, write_json

LABELS = ["$\\foo$", "[/red]", "L" * 400, "a\nb", "b\x1b]0;owned\x07", "\u202eevil", "<script>alert(1)</script>", "a/b", "a b",
          "_hidden", "犬", "|pipe|`code`"]  # fmt: skip
CLASSES = ["$x_1$ \\foo$", "[red]dog", "<b>cat"]
DATASET = "[red]$\\x$\u202e"
TUNED = "tuned *x* [/b]\x07"


def call(*words):
    """Run the console script in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["mergekit-vl", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            app.main()
    return stop.value.code or 0, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    place = tmp_path_factory.mktemp("labels")
    for split in ("train", "val", "test"):
        for k, name in enumerate(CLASSES):
            (place / "photos" / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (9, 9), (80 * k, 10 * i, 0)).save(place / "photos" / split / name / f"{i}.png")
    recipe = {
        "dataset": {"name": "folder", "path": str(place / "photos"), "label": DATASET},
        "protocol": {"name": "few_shot", "shots": 2},
        "tuned": [{"tuner": {"name": "linear_probe", "l2": 0.1, "label": TUNED}}],
        "controls": False,
        "strategy": [{"name": "wise_ft", "alpha": i / 20, "label": label} for i, label in enumerate(LABELS)],
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEKIT_VL_CACHE", str(place / "cache"))
        code, out, err = call("run", place / "recipe.yaml", "--out", place / "run")
    assert code == 0, err
    return place, out, err


class Seen(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def test_the_terminal_shows_them_and_nothing_acts(finished):
    _, out, err = finished
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out)
    for label in (*LABELS[:2], *LABELS[3:], TUNED, DATASET):
        assert printable(label) in out, label
    assert out.count("L") >= 400


def test_json_has_the_names_themselves(finished):
    run = finished[0] / "run"
    report = json.loads((run / "report.json").read_text())
    assert [row["row"] for row in report["summary"]] == ["zero-shot", TUNED, *LABELS]
    results = [json.loads(file.read_text()) for file in (run / "results").iterdir()]
    assert {result["strategy"] for result in results} == {"zero-shot", TUNED, *LABELS}
    assert {result["dataset"] for result in results} == {DATASET}
    shots = json.loads(next((run / "state").glob("*/shots.json")).read_text())
    assert sorted(shots["classes"]) == ["$x 1$ \\foo$", "<b>cat", "[red]dog"]  # an underscore of a folder is a space


def test_the_page_shows_them_as_text(finished):
    page = (finished[0] / "run" / "report.html").read_text()
    seen = Seen()
    seen.feed(page)
    assert "b" not in seen.tags and seen.tags.count("script") == 1, "the one that sorts tables"
    for label in (*LABELS, TUNED):
        assert printable(label) in seen.text, label
    assert "<!-- $\\foo$ -->" in page  # matplotlib notes what it draws: letters, no formula


def test_the_card_shows_them_as_text(finished):
    card = (finished[0] / "run" / "README.md").read_text()
    assert "<script" not in card and "<b>" not in card
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 2 + len(LABELS)
    assert "| \\$\\\\foo\\$ |" in card and "| \\|pipe\\|\\`code\\` |" in card and "| a\\\\nb |" in card


def test_every_row_can_be_used_under_its_name(finished):
    place, *_ = finished
    image = next((place / "photos").rglob("*.png"))
    for label in ("a/b", "a b", "L" * 400, "b\x1b]0;owned\x07"):
        code, out, err = call("predict", place / "run", image, "--row", label, "--top", "1")
        assert code == 0 and "\x1b" not in out + err, err
    code, out, err = call("predict", place / "run", image, "--row", "\x1b[31m")
    assert code == 2 and r"unknown row '\x1b[31m'" in err and "\x1b" not in err


def test_escapes_in_class_names_do_not_reach_the_terminal(finished):
    place, *_ = finished
    image = next((place / "photos").rglob("*.png"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEKIT_VL_CACHE", str(place / "cache"))
        code, out, _ = call("predict", "micro", image, "--classes", "dog,cat\x1b]0;owned\x07")
    assert code == 0 and r"cat\x1b]0;owned\x07" in out and "\x1b" not in out


def test_file_names():
    assert slug("wise_ft") == "wise_ft" and slug("ViT-B-16+v2.1") == "ViT-B-16+v2.1" and slug("犬") == "犬"
    names = [slug(label) for label in (*LABELS, "a_b", "", "..", "a?b", "犬" * 200, "L" * 401)]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w.+-]+", name) and len(name.encode()) <= 100 for name in names)


def test_what_is_no_unicode_is_written_all_the_same(tmp_path):
    write_json(tmp_path / "a.json", {"file": "dog\udcff.png"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"file": "dog\udcff.png"}


def test_html_and_markdown():
    assert in_html('<a href="x">\'&\n') == "&lt;a href=&quot;x&quot;&gt;&#x27;&amp;\\n"
    assert in_markdown("wise_ft _x_ *y* a|b [l](u) #1 $z$ ~ `c` <i>&") == (
        r"wise_ft \_x\_ \*y\* a\|b \[l\](u) \#1 \$z\$ \~ \`c\` &lt;i&gt;&amp;"
    )
    assert in_code("runs/a b.safetensors") == "`runs/a b.safetensors`"
    assert in_code("a`b|<i>") == r"a\`b\|&lt;i&gt;" and in_code("\x1b") == r"\\x1b"


@pytest.mark.parametrize("label", [*LABELS, "half \ud83d"])
def test_the_plots_of_a_bench_and_of_a_path(label):
    rows = [
        BenchRow(
            SummaryRow(name, kind, {}, score, score, 1, 1, (), {}, 1.0, score / 50),
            (), None, 1.0, None, None, None, None, False, False, None, None, None, None,
        )
        for name, kind, score in (
            ("zero-shot", "zero-shot", 50.0),
            (label, "tuned", 60.0),
            (f"{label}2", "merged", 70.0),
        )
    ]  # fmt: skip
    shown = BenchTable(2, Metric("HM", {}), rows=tuple(rows))
    drawings = [
        plots.pareto(shown),
        plots.by_dataset(shown, {label: [50.0, 60.0, 70.0], "other": [40.0, 50.0, 60.0]}),
        plots.over_shots([shown, dataclasses.replace(shown, shots=4)]),
    ]
    tests = {label: {"nll": 1.0, "acc1": 0.5}}
    segments = ("zero-shot -> tuned", "zero-shot -> merged", "merged -> tuned")
    points = tuple(LinePoint(segment, "heads", a, tests) for segment in segments for a in (0.0, 1.0))
    barriers = tuple(Barrier("heads", segment, tests) for segment in segments)
    path = MeanLandscape(label, 1, points, barriers, None, label)
    drawings.append(section(path, "zero-shot", label))
    assert all(drawing.count("<svg") == 1 and "\x1b" not in drawing for drawing in drawings)
    if label == "$\\foo$":
        assert all("<!-- $\\foo$" in drawing for drawing in drawings)
