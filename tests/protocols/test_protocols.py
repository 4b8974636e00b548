"""What protocols make of a dataset, how tests become a headline, the microworld's shifts, and small whole runs of each protocol."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from noise import Noise
from PIL import Image

from mergekit_vl.datasets import microworld
from mergekit_vl.datasets.base import Dataset, Split
from mergekit_vl.datasets.microworld import Microworld
from mergekit_vl.errors import UserError
from mergekit_vl.experiments import experiment
from mergekit_vl.microworld.shifts import SHIFTS
from mergekit_vl.microworld.tasks import TASKS
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.protocols.base import Metric
from mergekit_vl.protocols.base_to_novel import METRIC
from mergekit_vl.protocols.few_shot import FewShot
from mergekit_vl.protocols.multi_task import MultiTask
from mergekit_vl.protocols.robust import Robust
from mergekit_vl.recipes.recipe import parse
from mergekit_vl.registry.plugins import load_plugins
from mergekit_vl.reporter import SILENT
from mergekit_vl.reports import report
from mergekit_vl.reports.results import CellResult

NAMES = ("ant", "bee", "cat", "dog")


def split(per_class, classes=range(4), seed=0):
    labels = np.repeat(np.array(list(classes)), per_class)
    return Split(Noise(len(labels), side=4, seed=seed), np.arange(len(labels)), labels)


def dataset(name="pets", shifts=(), **more):
    splits = split(6), split(5, seed=1), split(3, seed=2)
    return Dataset(name, NAMES, ("a photo of a {}.",), *splits, shifts=dict(shifts), **more)


# the headline


def test_a_headline_is_the_mean_of_columns_that_are_means_of_tests():
    metric = Metric("mean of ID and OOD", {"ID": ("ID",), "OOD": ("a", "b", "c")})
    accuracies = {"ID": 0.9, "a": 0.3, "b": 0.6, "c": 0.0}
    assert metric.column("ID", accuracies) == 0.9 and metric.column("OOD", accuracies) == pytest.approx(0.3)
    assert metric.headline_of(accuracies) == pytest.approx(0.6)
    draws = {name: np.array([value, 1.0]) for name, value in accuracies.items()}
    np.testing.assert_allclose(metric.headline_of(draws), [0.6, 1.0])


def test_a_harmonic_headline():
    assert METRIC.headline_of({"base": 0.6, "novel": 0.3}) == pytest.approx(0.4) and METRIC.score([60.0, 30.0]) == 40.0
    assert (
        METRIC.headline_of({"base": 0.6, "novel": 0.0}) == 0.0
        and type(METRIC.headline_of({"base": 0.5, "novel": 0.5})) is float
    )
    np.testing.assert_allclose(METRIC.score([np.array([0.6, 0.0]), np.array([0.3, 0.5])]), [0.4, 0.0])


def cell(rows):
    """Rows of (kind, accuracy of each of two tasks in percent), as a run leaves them."""
    metric = {"headline": "mean accuracy", "columns": {"x": ("x",), "y": ("y",)}, "harmonic": False, "normalised": True}
    out = []
    for i, (kind, *accuracies) in enumerate(rows):
        tests = {
            name: {
                "n": 100,
                "acc1": a / 100,
                "low": 0.0,
                "high": 1.0,
                "acc5": 1.0,
                "mean_per_class_recall": a / 100,
                "nll": 1.0,
                "ece": 0.0,
            }
            for name, a in zip("xy", accuracies)
        }
        cost = {"seconds": 1.0, "ms_per_sample": 1.0}
        row = {"row": f"{kind} {i}", "kind": kind, "tests": tests, "score": sum(accuracies) / 200, "cost": cost}
        out.append(row | {"parameters": 0, "forwards": 1, "right": {}, "digest": {}})
    backbone = {"spec": "", "pretrained": "", "digest": ""}
    facts = {"dataset": "x + y", "seed": 1, "metric": metric, "backbone": backbone, "note": "", "counts": {}}
    return CellResult.from_json(facts | {"rows": out})


def test_normalised_accuracy_divides_by_each_tasks_own_model():
    made = cell([("zero-shot", 40, 30), ("tuned", 80, 20), ("tuned", 10, 60), ("merged", 72, 45)])
    rows = {row.row: row for row in report.summary([made])}
    # zero-shot: 40/80 and 30/60; the first tuned: 1 and 20/60; merged: 0.9 and 0.75
    assert [row.normalised for row in rows.values()] == pytest.approx([50, 100 * 2 / 3, 100 * 1.125 / 2, 82.5])
    assert rows["merged 3"].score == pytest.approx(58.5)


def test_a_task_whose_own_model_is_never_right_is_left_out_of_the_normalised_accuracy():
    made = cell([("zero-shot", 40, 30), ("tuned", 80, 20), ("tuned", 10, 0), ("merged", 72, 45)])
    assert report.summary([made])[3].normalised == pytest.approx(90)
    made = cell([("zero-shot", 0, 0), ("tuned", 0, 0), ("tuned", 0, 0)])
    assert report.summary([made])[0].normalised == 0.0


# protocols


def counts(split):
    return np.bincount(split.labels, minlength=4).tolist()


def test_few_shot_tunes_and_tests_all_classes():
    task = FewShot(shots=2).task(dataset(), seed=1)
    (data,) = task.data
    assert counts(data.train) == [2] * 4 and counts(data.val) == [2] * 4 and data.classes.names == NAMES
    ((name, classes, test),) = task.tests
    assert (name, classes.names, len(test)) == ("test", NAMES, 12) and task.metric.headline_of({"test": 0.25}) == 0.25
    assert counts(FewShot(shots=6).task(dataset(), seed=1).data[0].val) == [4] * 4  # min(shots, 4)
    other = FewShot(shots=2).task(dataset(), seed=2).data[0]
    assert other.train.rows.tolist() != data.train.rows.tolist()
    with pytest.raises(UserError, match="pets: class 'ant' has 6 images, 7 shots were asked for"):
        FewShot(shots=7).task(dataset(), seed=1)


def test_robust_tests_a_shift_against_the_classes_that_it_shows():
    some = split(2, classes=(3, 1), seed=5)
    task = Robust().task(dataset(shifts={"all": split(1, seed=4), "some": some}), seed=1)
    (data,) = task.data
    assert len(data.train) == 24 and len(data.val) == 20  # no shots: the whole splits
    tests = {name: (classes.names, test.labels.tolist()) for name, classes, test in task.tests}
    assert list(tests) == ["ID", "all", "some"] and tests["ID"][0] == NAMES and tests["all"][0] == NAMES
    assert tests["some"] == (("bee", "dog"), [1, 1, 0, 0])
    assert task.tests[2][2].rows.tolist() == [0, 1, 2, 3]
    assert task.metric.columns == {"ID": ("ID",), "OOD": ("all", "some")}
    assert task.metric.headline_of({"ID": 0.8, "all": 0.2, "some": 0.4}) == pytest.approx(0.55)
    assert counts(Robust(shots=1).task(dataset(shifts={"all": split(1)}), seed=1).data[0].train) == [1] * 4
    with pytest.raises(UserError, match="protocol robust: pets has no shifted test images .name them: dataset.shifts"):
        Robust().task(dataset(), seed=1)


def test_multi_task_makes_one_cell_of_all_datasets():
    two = [dataset(), replace(dataset("toys"), classes=("a", "b", "c", "d"))]
    task = MultiTask(shots=3).task(two, seed=1)
    assert [len(data.train) for data in task.data] == [12, 12] and MultiTask.joint
    assert [(name, classes.names) for name, classes, _ in task.tests] == [("pets", NAMES), ("toys", tuple("abcd"))]
    assert task.metric.normalised and task.metric.headline_of({"pets": 0.5, "toys": 1.0}) == 0.75
    assert [len(data.train) for data in MultiTask().task(two, seed=1).data] == [24, 24]


# the microworld's shifts


def test_shifts_by_name_are_those_that_can_be_drawn():
    assert set(microworld.NAMES) == {"clean", "texture", *SHIFTS} and len(set(microworld.NAMES)) == len(
        microworld.NAMES
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("nigt",), r"dataset.shifts: unknown shift 'nigt' \(did you mean 'night'\?\)"),
        (("night:2",), r"dataset.shifts: strength '2' \(a number above 0, 1 at most\)"),
        (("night:0",), "strength '0'"),
        (("night:nan",), "strength 'nan'"),
        (("night:much",), "strength 'much'"),
        (("night", "blur", "night"), r"dataset.shifts: night is named twice \(name each rendering once\)"),
        (("night", "night:0.5"), "night:0.5 is named twice"),
    ],
)
def test_shifts_that_make_no_sense(given, message):
    with pytest.raises(UserError, match=message):
        Microworld(shifts=given)


def test_a_shift_shows_the_same_classes_in_other_scenes():
    assert Microworld(shifts=("night", "night:0.25")).shifts  # two strengths are two renderings
    spec = replace(TASKS["fantasy_mosaic"], classes=2)
    clean, labels = spec.images("test", shift=("clean", 0.5))
    night, _ = spec.images("test", shift=("night", 1.0))
    own, same = spec.images("test")
    assert labels.tolist() == same.tolist() == [0] * 40 + [1] * 40 and clean.shape == night.shape == own.shape
    assert night.mean() < 0.6 * clean.mean()
    assert not np.array_equal(clean, own)
    again, _ = spec.images("test", shift=("night", 1.0))
    assert np.array_equal(again, night)


# whole runs


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run in this process; what it sets in torch is put back."""
    fast = torch.backends.mha.get_fastpath_enabled()
    monkeypatch.setattr("mergekit_vl.microworld.tasks.PER_CLASS", {"train": 20, "val": 2, "test": 4})

    def go(**given):
        recipe = parse(given, name="small", where="small")
        made = experiment.build(recipe, load_plugins())
        store = FeatureStore(tmp_path / "cache")
        quiet = {"reporter": SILENT}
        out = experiment.run(made, tmp_path / "out", device="cpu", store=store, **quiet).to_json()
        assert json.loads((tmp_path / "out" / "report.json").read_text())["summary"]
        assert (tmp_path / "out" / "report.html").exists()
        return {row["row"]: row for row in out["summary"]}, out

    yield go
    torch.use_deterministic_algorithms(False)
    torch.backends.mha.set_fastpath_enabled(fast)


def check_mean(row, columns):
    assert list(row["columns"]) == columns
    assert row["score"] == pytest.approx(np.mean([c["acc1"] for c in row["columns"].values()]))


def ends(out, space):
    return {
        p["alpha"]: {n: c["acc1"] for n, c in p["columns"].items()} for p in out["landscape"] if p["space"] == space
    }


def accuracies(row):
    return {name: column["acc1"] for name, column in row["columns"].items()}


WORLD = {"name": "microworld", "task": "fantasy_mosaic"}


def test_a_robust_run_of_linear_probes(run):
    rows, out = run(
        dataset=WORLD | {"shifts": ["clean", "night"]},
        protocol={"name": "robust", "shots": 2},
        tuned=[{"tuner": {"name": "linear_probe"}}],
        strategy=[{"name": "mergetune", "epochs": 2}, {"name": "wise_ft"}, {"name": "ensemble"}],
    )
    assert list(rows) == ["zero-shot", "linear_probe", "continued", "CE only", "mergetune", "wise_ft", "ensemble"]
    for row in rows.values():
        check_mean(row, ["ID", "OOD"])
    assert rows["zero-shot"]["columns"]["OOD"]["n"] == 2 * 80
    path = ends(out, "heads")
    assert path[0.0] == pytest.approx(accuracies(rows["zero-shot"]))
    assert path[1.0] == pytest.approx(accuracies(rows["linear_probe"]))
    assert path[0.5] == pytest.approx(accuracies(rows["wise_ft"]))


def test_a_robust_run_of_towers_and_the_same_again_from_its_files(run):
    given = {
        "dataset": WORLD | {"shifts": ["night"]},
        "protocol": {"name": "robust", "shots": 1},
        "tuned": [{"tuner": {"name": "full", "epochs": 2, "batch": 10, "lr": 1e-4}}],
        "strategy": [{"name": "mergetune", "epochs": 2, "batch": 10, "alphas": [], "n_alpha": 1}],
        "controls": False,
    }
    rows, out = run(**given)
    path = ends(out, "towers")
    assert path[0.0] == pytest.approx(accuracies(rows["zero-shot"]))
    assert path[1.0] == pytest.approx(accuracies(rows["full"]))
    again, _ = run(**given)
    assert {n: (r["score"], r["seconds"]) for n, r in again.items()} == {
        n: (r["score"], r["seconds"]) for n, r in rows.items()
    }


def test_a_multi_task_run(run):
    rows, out = run(
        dataset=[WORLD, {"name": "microworld", "task": "sea_and_sky_blinds"}],
        protocol={"name": "multi_task", "shots": 1},
        tuned=[{"tuner": {"name": "full", "head": "text", "epochs": 1, "batch": 10, "lr": 1e-4}}],
        strategy=[{"name": "task_arithmetic"}, {"name": "emr"}],
        controls=False,
    )
    tasks = ["fantasy_mosaic", "sea_and_sky_blinds"]
    assert list(rows) == ["zero-shot", *(f"full on {t}" for t in tasks), "task_arithmetic", "emr"]
    merged = rows["task_arithmetic"]
    check_mean(merged, tasks)
    own = [rows[f"full on {t}"]["columns"][t]["acc1"] for t in tasks]
    ours = [merged["columns"][t]["acc1"] for t in tasks]
    assert merged["normalised"] == pytest.approx(100 * np.mean([a / b for a, b in zip(ours, own)]))
    assert out["landscape"] == []
    check_mean(rows["emr"], tasks)
    assert (rows["emr"]["parameters"], rows["emr"]["forwards"]) == (2 * merged["parameters"], 1)


def test_a_few_shot_run_of_an_image_classifier_on_files(run, tmp_path):
    draw = np.random.default_rng(0)
    for part, n in (("train", 3), ("val", 1), ("test", 2)):
        for label in range(3):
            folder = tmp_path / "images" / part / f"thing {label}"
            folder.mkdir(parents=True)
            for i in range(n):
                picture = draw.integers(0, 120, (40, 40, 3), dtype=np.uint8)
                picture[..., label] += 120
                Image.fromarray(picture).save(folder / f"{i}.png")
    rows, _ = run(
        backbone={"name": "vision", "arch": "mobilenetv3_small_050", "batch": 8},
        dataset={"name": "folder", "path": str(tmp_path / "images")},
        protocol={"name": "few_shot", "shots": 3},
        tuned=[{"tuner": {"name": "linear_probe"}}],
        strategy=[{"name": "wise_ft"}, {"name": "mergetune", "epochs": 2}],
        controls=False,
    )
    assert list(rows) == ["class means", "linear_probe", "wise_ft", "mergetune"]
    check_mean(rows["linear_probe"], ["test"])
    assert rows["linear_probe"]["parameters"] == rows["wise_ft"]["parameters"] > 3 * 500
    (kept,) = (tmp_path / "out" / "state").glob("*/wise_ft.safetensors")
    assert kept.stat().st_size > 0


def test_what_needs_a_text_tower_says_so_before_anything_is_tuned(run):
    with pytest.raises(UserError, match="an image classifier has no text tower"):
        run(
            backbone={"name": "vision", "arch": "mobilenetv3_small_050"},
            dataset=[WORLD, {"name": "microworld", "task": "sea_and_sky_blinds"}],
            protocol={"name": "multi_task", "shots": 1},
            tuned=[{"tuner": {"name": "full"}}],
            strategy=[{"name": "task_arithmetic"}],
        )
