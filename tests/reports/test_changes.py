"""Gained and forgotten, with numbers by hand: two classes of four and two images, two seeds."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mergekit_vl.datasets.base import Split
from mergekit_vl.experiments.changes import changes
from mergekit_vl.models.evaluate import Scores
from mergekit_vl.models.model import Classes
from mergekit_vl.protocols.base import Metric, Task
from mergekit_vl.reports.changes import changed, changes_table, class_table, most_told
from mergekit_vl.reports.results import BackboneFacts, CellResult, Cost, Forgetting, Report, Row

LABELS = np.array([0, 0, 0, 0, 1, 1])
ANSWERS = {"zero-shot": [0, 0, 1, 1, 1, 1], "coop": [0, 0, 0, 0, 0, 0], "mine": [0, 1, 0, 0, 1, 0]}
METRIC = Metric("accuracy", {"test": ("test",)})


class Pictures:
    key = "pictures"
    files = tuple(f"{i}.png" for i in range(10))

    def __len__(self):
        return 10

    def load(self, index):
        return Image.new("RGB", (200, 100), (index, 0, 0))


SPLIT = Split(Pictures(), np.arange(4, 10), LABELS)
TASK = Task((object(),), (("test", Classes(("cat", "dog")), SPLIT),), METRIC)


def row(name, answers):
    hits = np.array(answers) == LABELS
    scores = Scores(6, float(hits.mean()), 0.0, 1.0, 1.0, 0.5, 1.0, 0.1)
    kind = {"zero-shot": "zero-shot", "coop": "tuned"}.get(name, "merged")
    right = {"test": "".join("01"[int(hit)] for hit in hits)}
    return Row(
        name, kind, {"test": scores}, scores.acc1, right, {}, 0, 1, Cost(0.0, 0.0), answers={"test": tuple(answers)}
    )


def report(*cells):
    return Report(
        *("r", "h", {}, "few_shot", METRIC, "", "", "mine", "zero-shot", "coop"), tuple(cells), (), (), Forgetting(()), (), {}, 0.0
    )  # fmt: skip


def cell(dataset="pets", seed=1, rows=None):
    rows = rows or tuple(row(*each) for each in ANSWERS.items())
    facts = CellResult(dataset, seed, BackboneFacts("b", "", ""), "", METRIC, {"test": 6}, rows)
    return replace(facts, changes=changes(TASK, rows, "mine"))


def test_classes_are_counted_before_and_after():
    (test,) = cell().changes
    cat, dog = test.classes
    assert (cat.name, cat.n, cat.before, cat.tuned, cat.after, cat.gained, cat.forgotten) == ("cat", 4, 2, 4, 3, 2, 1)
    assert (dog.name, dog.n, dog.before, dog.tuned, dog.after, dog.gained, dog.forgotten) == ("dog", 2, 2, 0, 1, 0, 1)


def test_pictures_are_those_whose_answer_turned_right_or_wrong():
    (test,) = cell().changes
    told = [(p.file, p.row, p.label, p.before, p.after, p.right) for p in test.pictures]
    assert told == [
        ("5.png", 5, "cat", "cat", "dog", False),
        ("9.png", 9, "dog", "dog", "cat", False),
        ("6.png", 6, "cat", "dog", "cat", True),
        ("7.png", 7, "cat", "dog", "cat", True),
    ]
    assert all(p.drawn.startswith("data:image/jpeg;base64,") for p in test.pictures)


def test_the_table_has_the_change_in_points():
    made = changes_table(report(cell()))
    (line,) = made.rows
    assert [c.header for c in made.columns] == ["n", "zero-shot", "coop", "mine", "change", "now right", "now wrong"]
    # 4 of 6 before, 4 of 6 tuned, 4 of 6 after: two images gained, two forgotten
    assert [c.value for c in line.cells] == [6, *[pytest.approx(400 / 6)] * 3, pytest.approx(0), 2, 2]
    low, high = line.cells[4].interval
    assert low < 0 < high and line.cells[4].mark == ""


def test_the_most_forgotten_class_stands_first():
    made = report(cell())
    table = class_table(made, changed(made)[0])
    assert [(r.label, r.cells[4].value) for r in table.rows] == [
        ("dog", pytest.approx(-50)),
        ("cat", pytest.approx(25)),
    ]
    assert list(most_told(made)) == ["gained most: cat +25 (n 4)", "forgotten most: dog -50 (n 2)"]


def test_seeds_of_a_data_set_are_averaged_and_data_sets_stand_apart():
    answers = {**ANSWERS, "mine": LABELS.tolist()}
    better = cell(seed=2, rows=tuple(row(*each) for each in answers.items()))
    made = report(cell(), better, cell(dataset="birds"))
    table = changes_table(made)
    assert [r.label for r in table.rows] == ["pets: test", "birds: test"]
    assert table.rows[0].cells[0].value == 12
    assert table.rows[0].cells[3].value == pytest.approx((400 / 6 + 100) / 2)
    assert table.rows[0].cells[5:] == tuple(replace(c, value=v) for c, v in zip(table.rows[0].cells[5:], (4, 2)))
    assert "cat (birds) +25 (n 4)" in next(most_told(made))


def test_json_holds_counts_and_pictures_without_their_pixels():
    there = cell()
    back = CellResult.from_json(there.to_json())
    (before,), (after,) = there.changes, back.changes
    assert after.classes == before.classes
    assert after.pictures == tuple(replace(p, drawn="") for p in before.pictures)


def test_a_report_of_an_earlier_version_has_no_such_table():
    old = report(replace(cell(), changes=None))
    assert changes_table(old) is None and list(most_told(old)) == []


def test_a_record_without_answers_shows_pictures_without_them():
    rows = tuple(replace(row(*each), answers={}) for each in ANSWERS.items())
    (test,) = changes(TASK, rows, "mine")
    assert {(p.before, p.after) for p in test.pictures} == {("", "")}
