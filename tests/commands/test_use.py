"""`eval` and `predict` on a backbone, on a checkpoint, and on a finished run."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from mergekit_vl.commands import app
from mergekit_vl.errors import UserError
from mergekit_vl.experiments import experiment
from mergekit_vl.experiments.open_run import open_model
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.recipes import recipe
from mergekit_vl.registry import plugins
from mergekit_vl.reporter import SILENT

PLAIN = {
    "dataset": {"name": "microworld", "task": "sea_and_sky_emboss"},
    "protocol": {"name": "few_shot", "shots": 2},
    "tuned": [{"tuner": {"name": "linear_probe", "l2": 0.1}}],
    "strategy": [{"name": "ensemble"}, {"name": "wise_ft"}],
    "controls": False,
}


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["mergekit-vl", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        app.main()
    captured = capsys.readouterr()
    return caught.value.code or 0, captured.out, captured.err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Few images a class, so that it takes seconds; the main row is an ensemble."""
    place = tmp_path_factory.mktemp("use")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergekit_vl.microworld.tasks.PER_CLASS", {"train": 4, "val": 2, "test": 3})
        ready = experiment.build(recipe.parse(PLAIN, name="use", where="use"), plugins.load_plugins())
        store = FeatureStore(place / "cache")
        report = experiment.run(ready, place / "run", device="cpu", store=store, reporter=SILENT).to_json()
    return place / "run", report


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr("mergekit_vl.microworld.tasks.PER_CLASS", {"train": 4, "val": 2, "test": 3})
    monkeypatch.setenv("MERGEKIT_VL_CACHE", str(tmp_path / "cache"))


def test_eval_gives_the_reports_numbers(run, monkeypatch, capsys):
    folder, report = run
    for row in ("ensemble", "linear_probe", "wise_ft", "zero-shot"):
        code, out, _ = call(monkeypatch, capsys, "eval", folder, "--row", row, "--json")
        told = next(r for r in report["cells"][0]["rows"] if r["row"] == row)["tests"]["test"]
        found = json.loads(out)
        assert code == 0 and found["metrics"]["acc1"] == told["acc1"] and found["nll"] == pytest.approx(told["nll"])
        assert {"dataset", "model", "task", "language", "metrics"} <= found.keys()


def test_eval_of_a_backbone_and_of_weights_on_it(run, monkeypatch, capsys):
    words = ("--dataset", "microworld", "task=sea_and_sky_emboss", "--json")
    zero_shot = json.loads(call(monkeypatch, capsys, "eval", "micro", *words)[1])
    told = next(r for r in run[1]["cells"][0]["rows"] if r["row"] == "zero-shot")["tests"]["test"]
    assert zero_shot["metrics"]["acc1"] == told["acc1"]
    file = next((run[0] / "state").glob("*/linear_probe.safetensors"))
    tuned = json.loads(call(monkeypatch, capsys, "eval", "micro", "--checkpoint", file, *words)[1])
    told = next(r for r in run[1]["cells"][0]["rows"] if r["row"] == "linear_probe")["tests"]["test"]
    assert tuned["metrics"]["acc1"] == told["acc1"]


def test_predict_names_what_the_model_answers(run, monkeypatch, capsys, tmp_path):
    from mergekit_vl.microworld.tasks import TASKS

    images, _ = TASKS["sea_and_sky_emboss"].images("test")
    for i in (0, 7):
        Image.fromarray(images[i]).save(tmp_path / f"{i}.png")
    code, out, _ = call(monkeypatch, capsys, "predict", run[0], tmp_path / "0.png", tmp_path / "7.png", "--json")
    found = json.loads(out)
    names = [name for name, _, _ in TASKS["sea_and_sky_emboss"].members]
    right = next(r for r in run[1]["cells"][0]["rows"] if r["row"] == "ensemble")["right"]["test"]
    for each, i in zip(found, (0, 7), strict=True):
        logits_of = each["classes"]
        assert (logits_of[0]["class"] == names[i // 3]) == (right[i] == "1")
        assert len(logits_of) == 3 and 1 >= logits_of[0]["p"] >= logits_of[1]["p"] >= logits_of[2]["p"] >= 0
    code, out, _ = call(
        monkeypatch, capsys, "predict", "micro", tmp_path / "0.png", "--classes", "fish,boat", "--top", "1"
    )
    assert code == 0 and out.startswith(f"{tmp_path / '0.png'}: ") and out.count(",") == 0


def test_what_cannot_be_used(run, monkeypatch, capsys, tmp_path):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "ok.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    os.mkfifo(tmp_path / "fifo.png")
    many = ",".join(f"class {i}" for i in range(99))  # no file has so long a name
    for words, message in (
        (("eval", "nowhere"), "'nowhere' is no model"),
        (("eval", "micro", "--dataset", "folder", "path=["), "'path=[' cannot be applied: "),
        (("eval", "micro"), "no dataset (name one: --dataset folder path=~/pets)"),
        (("eval", run[0], "--row", "ensembel"), "unknown row 'ensembel' (did you mean 'ensemble'?)"),
        (("eval", run[0], "--split", "dev"), "unknown split 'dev'"),
        (("predict", "micro", tmp_path / "ok.png"), "no class names (name them: --classes"),
        (("predict", "micro", tmp_path / "gone.png", "--classes", "a,b"), "gone.png: no such image"),
        (("predict", "micro", tmp_path / "bad.png", "--classes", "a,b"), "bad.png: cannot be decoded"),
        (("predict", "micro", tmp_path / "fifo.png", "--classes", many), "fifo.png: is a FIFO (give a regular file)"),
        (("predict", "micro", "/dev/zero", "--classes", many), "/dev/zero: is a device (give a regular file)"),
        (("predict", "micro", tmp_path / "ok.png", "--classes", "/dev/zero"), "/dev/zero: is a device"),
        (
            ("predict", "micro", tmp_path / "ok.png", "--classes", "a,b", "--max-megapixels", 8e-5),
            "more than 8e-05 mill",
        ),
        (("predict", "micro", tmp_path / "ok.png", "--classes", "dog"), "class names 'dog' (at least two, each once)"),
    ):
        code, out, err = call(monkeypatch, capsys, *words)
        assert code == 2 and not out and message in err and err.strip().count("\n") == 0, err
    with pytest.raises(UserError, match="--row is for runs"):
        open_model("micro", plugins.load_plugins(), row="ensemble", device="cpu")


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", "null", "[" * 100_000, '{"cells": [{"rows": [1]}], "main": 2}', "\x00"]
)
@pytest.mark.parametrize("name", ["report.json", "shots.json", "ensemble.model.json"])
def test_a_damaged_run_is_one_line(run, monkeypatch, capsys, tmp_path, name, text):
    place = tmp_path / "run"
    shutil.copytree(run[0], place)
    file = next(place.rglob(name))
    file.write_text(text)
    code, out, err = call(monkeypatch, capsys, "eval", place)
    assert code == 2 and not out and f"{file}: " in err and err.strip().count("\n") == 0, err
    file.unlink()
    code, out, err = call(monkeypatch, capsys, "eval", place)
    assert code == 2 and not out and err.strip().count("\n") == 0, err
