"""Benches at a small size: what they hold, that they go on, that nothing of a test split chooses anything, and what fails."""

import csv
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from recording import Recording

from mergekit_vl.benchmark import plan, report, run, wording
from mergekit_vl.benchmark.records import BenchReport, Record
from mergekit_vl.errors import UserError
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.recipes.loading import load_recipe
from mergekit_vl.recipes.recipe import parse, with_datasets
from mergekit_vl.registry.plugins import load_plugins
from mergekit_vl.reporter import SILENT
from mergekit_vl.reports.intervals import ranks

PLUGIN = """
from dataclasses import dataclass
from mergekit_vl.registry.hookspecs import hookimpl
from mergekit_vl.options import option
from mergekit_vl.strategies.wise_ft import WiseFT

@dataclass(frozen=True)
class Boom:
    def merge(self, inputs):
        raise ValueError("boom went off")

@dataclass(frozen=True)
class Nan:
    def merge(self, inputs):
        model = WiseFT().merge(inputs)
        model.adapter.ctx.fill_(float("nan"))
        return model

@dataclass(frozen=True)
class Half:
    t: float = option(0.5, "")
    def merge(self, inputs):
        return WiseFT(self.t).merge(inputs)

@hookimpl
def register_strategies(register):
    register("boom", Boom, "raises")
    register("nan", Nan, "is not finite")
    register("half", Half, "WiSE-FT by another name")
"""
SMALL = {
    "dataset": [{"name": "microworld", "task": "fantasy_mosaic"}, {"name": "microworld", "task": "fantasy_thermal"}],
    "protocol": {"name": "base_to_novel", "shots": 4},
    "tuned": [{"tuner": {"name": "coop", "epochs": 2, "lr": 0.02}}],
    "strategy": [
        {"name": "wise_ft", "grid": {"alpha": [0.2, 0.8]}},
        {"name": "slerp"},
        {"name": "ensemble"},
        {"name": "mergetune", "epochs": 2, "batch": 16, "grid": {"lambda": [2.0]}},
        {"name": "wise_ft", "label": "merged back", "input": "mergetune", "grid": {}},
        {"name": "ema"},
        {"name": "boom"},
        {"name": "nan"},
        {"name": "half"},
    ],
    "search": {"budget": 3},
    "seed": [1, 2],
}


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "mine.py").write_text(PLUGIN)
    return load_plugins(folder)


@pytest.fixture(scope="module", autouse=True)
def small_world():
    """Few images a class; what a bench sets in torch is put back."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergekit_vl.microworld.tasks.PER_CLASS", {"train": 20, "val": 2, "test": 4})
        yield
    torch.use_deterministic_algorithms(False)
    torch.backends.mha.set_fastpath_enabled(fast)


def go(given, registry, out, *, store=None, strategies=(), shots=()):
    made = plan.build(parse(given, name="small", where="small"), registry, strategies=strategies, shots=shots)
    quiet = {"reporter": SILENT}
    return run.run(made, out, device="cpu", store=store or FeatureStore(out.parent / "cache"), **quiet)


@pytest.fixture(scope="module")
def finished(registry, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "out"
    return go(SMALL, registry, out), out


def records(out, cell="fantasy_mosaic-seed1-4shots"):
    found = [json.loads(file.read_text()) for file in sorted((out / "cells" / cell / "records").glob("*.json"))]
    return {record["row"]: record for record in found if "kind" in record}


def test_the_rows(finished):
    made, _ = finished
    (table,) = made.tables
    rows = {row.label: row for row in table.rows}
    equal = [name for row in table.rows for name in row.equal]
    everything = {*rows, *equal}
    always = {"zero-shot", "coop", "continued", "best single model", "average"}
    assert everything == always | {"wise_ft", "slerp", "ensemble", "mergetune", "merged back", "half"}
    assert table.n == 4 and rows["ensemble"].summary.forwards == 2 and rows["ensemble"].towers == 1
    # half is WiSE-FT at its default, which is the plain average of two: one row, one count
    assert "half" in equal and ("average" in equal) != ("average" in rows and "half" in rows["average"].equal)
    assert rows["zero-shot"].minus_base is None and rows["coop"].minus_tuned is None
    told = rows["coop"].minus_base
    assert (told.over, told.low, told.verdict) == ("2 tasks", None, "no interval")
    assert rows["coop"].summary.columns["base"].interval is None
    assert "no interval is given across fewer than 5 tasks" in wording.lead(made)
    mergetune = rows["mergetune"]
    assert mergetune.trains and mergetune.summary.seconds > 0 and mergetune.bytes == 4 * 4 * 128
    assert all(row.sd is not None for row in table.rows)
    assert sum(row.rank for row in table.rows) == pytest.approx(len(rows) * (len(rows) + 1) / 2)


def test_what_is_not_in_the_table_is_listed_with_its_reason(finished):
    made, _ = finished
    out = {each.row: each for each in made.left_out}
    assert set(out) == {"ema", "boom", "nan"}
    assert out["ema"].status == "inapplicable" and "at least 2 tuned models" in out["ema"].reasons[0].reason
    assert out["boom"].status == out["nan"].status == "failed"
    assert out["boom"].reasons[0].reason == "ValueError: boom went off (mine.py:10)"
    assert "not finite" in out["nan"].reasons[0].reason and len(out["nan"].reasons[0].cells) == 4
    told = wording.reasons(made)
    assert "- ema: not for these models: at least 2 tuned models, not 1 (name more models)" in told


def test_the_choice_and_the_default_beside_it(finished):
    _, out = finished
    for cell in ("fantasy_mosaic-seed1-4shots", "fantasy_thermal-seed2-4shots"):
        record = records(out, cell)["wise_ft"]
        tried = record["search"]["configurations"]
        assert [c["options"] for c in tried] == [{}, {"alpha": 0.2}, {"alpha": 0.8}]
        best = max(tried, key=lambda c: (c["score"], -c["nll"]))
        assert record["options"] == best["options"]
        assert ("default" in record) == (record["options"] != {})
        # five base classes are tuned on and five held out, of 2 validation images and 4 shots a class
        assert record["search"]["how"] == "10 base, 20 novel" and record["search"]["on"] == "held_out"
    assert len(records(out)["slerp"]["search"]["configurations"]) == 3  # the budget
    assert len(records(out)["mergetune"]["search"]["configurations"]) == 2


def test_files(finished):
    made, out = finished
    assert {"bench.json", "report.html", "results.csv", "table.csv", "README.md", "recipe.yaml", "cells"} <= {
        path.name for path in out.iterdir()
    }
    with (out / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 * 14 and {line["status"] for line in lines} == {"done", "inapplicable", "failed"}
    own = next(
        line for line in lines if (line["row"], line["dataset"], line["seed"]) == ("coop", "fantasy_thermal", "2")
    )
    splits = {line["row"]: line["selection_split"] for line in lines if line["status"] == "done"}
    assert splits["zero-shot"] == splits["coop"] == splits["continued"] == splits["average"] == ""
    assert splits["wise_ft"] == splits["best single model"] == "held_out"
    assert float(own["base_acc1"]) == records(out, "fantasy_thermal-seed2-4shots")["coop"]["tests"]["base"]["acc1"]
    with (out / "table.csv").open() as file:
        shown = {line["row"]: line for line in csv.DictReader(file)}
    rows = {row.label: row for row in made.tables[0].rows}
    assert set(shown) == {*rows, "boom", "nan"} and float(shown["coop"]["HM"]) == rows["coop"].score
    assert shown["boom"]["base mark"] == shown["nan"]["base mark"] == "failed" and shown["average"]["kind"] == "control"
    assert shown["wise_ft"]["chosen"].startswith("options ") and shown["coop"]["chosen"] == ""
    assert {each.split for each in rows["wise_ft"].summary.chosen["options"]} == {"held_out"}
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 4 and "boom went off" in page and "class=sortable" in page
    assert "| mergetune |" in (out / "README.md").read_text()
    landscape = made.landscape
    assert landscape.row == "mergetune" and landscape.cells == 4 and landscape.plane.space == "classifiers"
    assert {(b.space, b.segment) for b in landscape.barriers} >= {("contexts", "merged -> tuned")}


def test_the_report_is_read_back(finished):
    made, out = finished
    stored = json.loads((out / "bench.json").read_text())
    assert report.load(out) == made and BenchReport.from_json(stored | {"of a later version": 1}).to_json() == stored
    for record in records(out).values():
        assert Record.from_json(record).to_json() == record
    (out.parent / "other").mkdir()
    (out.parent / "other" / "bench.json").write_text('{"recipe": "small"}')
    assert report.load(out.parent / "other") is None


def choices(out):
    return {
        (cell.name, row): (record.get("options"), record.get("search"))
        for cell in sorted((out / "cells").iterdir())
        for row, record in records(out, cell.name).items()
    }


def scores(out):
    return {
        (cell.name, row): (record["status"], record.get("score"), record.get("digest"))
        for cell in sorted((out / "cells").iterdir())
        for row, record in records(out, cell.name).items()
    }


def test_corrupting_the_test_labels_changes_no_choice(finished, registry, tmp_path, monkeypatch):
    import dataclasses

    from mergekit_vl.datasets.microworld import Microworld

    load = Microworld.load

    def corrupted(self, *args):
        made = load(self, *args)
        labels = np.random.default_rng(0).permutation(made.test.labels)
        return dataclasses.replace(made, test=dataclasses.replace(made.test, labels=labels))

    monkeypatch.setattr(Microworld, "load", corrupted)
    go(SMALL | {"seed": 1}, registry, tmp_path / "out")
    one = {key: value for key, value in choices(finished[1]).items() if "seed1" in key[0]}
    assert choices(tmp_path / "out") == one
    assert scores(tmp_path / "out") != {k: v for k, v in scores(finished[1]).items() if "seed1" in k[0]}


class NoForward(FeatureStore):
    def _encode(self, *args):
        raise AssertionError("an image was encoded")


def test_what_is_done_is_not_made_again_and_a_new_strategy_encodes_no_image(finished, registry, monkeypatch):
    from mergekit_vl.experiments.cell import Cell

    _, out = finished
    before, store = scores(out), NoForward(out.parent / "cache")
    made = []
    own = Cell.scored
    monkeypatch.setattr(Cell, "scored", lambda self, *given: made.append(given) or own(self, *given))
    kept = [s for s in SMALL["strategy"] if s["name"] not in ("boom", "nan")]
    again = go(SMALL | {"strategy": kept}, registry, out, store=store)
    assert made == [] and [each.row for each in again.left_out] == ["ema"]
    more = go(SMALL | {"strategy": kept}, registry, out, store=store, strategies=["+task_arithmetic"])
    assert len(made) <= 4 * (3 + 2)  # three configurations on the selection task, the chosen one and the default
    assert "task_arithmetic" in {name for row in more.tables[0].rows for name in (row.label, *row.equal)}
    assert {k: v for k, v in scores(out).items() if k[1] != "task_arithmetic"} == before


@pytest.mark.parametrize("write", [3, 17, 40])
def test_killed_anywhere_it_goes_on_and_gives_the_same(finished, registry, tmp_path, monkeypatch, write):
    """Not a signal here but an exception that nothing catches, at the write of a file: what is on disk is the same."""

    class Kill(BaseException):
        pass

    left = [write]

    def replace(a, b, real=os.replace):
        left[0] -= 1
        if not left[0]:
            raise Kill
        return real(a, b)

    given = SMALL | {"dataset": SMALL["dataset"][:1], "seed": 1}
    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(os, "replace", replace)
        go(given, registry, tmp_path / "out", store=FeatureStore(finished[1].parent / "cache"))
    assert not (tmp_path / "out" / "bench.json").exists()
    go(given, registry, tmp_path / "out", store=FeatureStore(finished[1].parent / "cache"))
    want = {
        k: v
        for k, v in scores(finished[1]).items()
        if k[0] == "fantasy_mosaic-seed1-4shots" and k[1] != "task_arithmetic"
    }
    assert scores(tmp_path / "out") == want


def test_a_plugin_at_work_makes_its_own_rows_again_and_says_so(registry, tmp_path, monkeypatch):
    import inspect
    from pathlib import Path

    from mergekit_vl.registry import sources
    from mergekit_vl.strategies.wise_ft import WiseFT

    small = SMALL | {"dataset": SMALL["dataset"][:1], "seed": 1, "controls": False}
    given = small | {
        "strategy": [{"name": "half", "grid": {}}, {"name": "wise_ft", "label": "again", "input": "half", "grid": {}}]
    }
    given["strategy"].append({"name": "slerp", "grid": {}})
    go(given, registry, tmp_path / "out")
    before = {row: record["digest"] for row, record in records(tmp_path / "out").items()}
    path = Path(inspect.getsourcefile(registry.find("strategies", "half").resolve()))
    text, made, told = path.read_text(), [], []
    own = WiseFT.merge
    monkeypatch.setattr(WiseFT, "merge", lambda self, inputs: made.append(self) or own(self, inputs))
    asked = plan.build(parse(given, name="small", where="small"), registry)
    old = asked.hash
    try:
        path.write_text(text + "\n# another version\n")
        sources._source.cache_clear()
        assert asked.hash != old
        store = NoForward(tmp_path / "cache")
        run.run(asked, tmp_path / "out", device="cpu", store=store, reporter=Recording(told))
    finally:
        path.write_text(text)
        sources._source.cache_clear()
    assert told == ["mergekit_vl_plugin_mine.py changed since: rows that depend on it are made again"]
    assert len(made) == 4  # half; again, with the half that it is made of; the path by way of half
    assert {row: record["digest"] for row, record in records(tmp_path / "out").items()} == before


def test_a_bench_that_is_killed_before_its_landscape_draws_it(registry, tmp_path, monkeypatch):
    from mergekit_vl.experiments import landscape

    class Kill(BaseException):
        pass

    def kill(*arguments):
        raise Kill

    given = SMALL | {"dataset": SMALL["dataset"][:1], "seed": 1, "strategy": [{"name": "slerp", "grid": {}}]}
    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(landscape, "landscapes", kill)
        go(given, registry, tmp_path / "out")
    assert {"zero-shot", "coop", "slerp"} <= set(records(tmp_path / "out"))
    made = go(given, registry, tmp_path / "out")
    assert made.landscape.row == "slerp" and made.landscape.points
    assert "The loss landscape" in (tmp_path / "out" / "report.html").read_text()


def test_shots_are_a_table_each(registry, tmp_path):
    given = SMALL | {"seed": 1, "dataset": SMALL["dataset"][:1], "strategy": [{"name": "wise_ft", "grid": {}}]}
    made = go(given, registry, tmp_path / "out", shots=(1, 2))
    assert [(table.shots, table.counts["train"]) for table in made.tables] == [(1, 10), (2, 20)]
    assert made.tables[0].rows[0].minus_tuned.over == "test images"
    assert made.tables[0].rows[0].minus_tuned.low is not None
    assert "By shots" in (tmp_path / "out" / "report.html").read_text()


def test_few_shot_chooses_on_validation_images_of_the_same_models(registry, tmp_path):
    given = {
        "dataset": {"name": "microworld", "task": "fantasy_mosaic"},
        "protocol": {"name": "few_shot", "shots": 2},
        "tuned": [{"tuner": {"name": "linear_probe"}}],
        "strategy": [{"name": "wise_ft", "grid": {"alpha": [0.2]}}],
        "search": {"budget": 2},
    }
    go(given, registry, tmp_path / "out")
    cell = "fantasy_mosaic-seed1-2shots"
    assert records(tmp_path / "out", cell)["wise_ft"]["search"]["how"] == "40 validation 0"
    assert not (tmp_path / "out" / "cells" / cell / "select" / "linear_probe.json").exists()  # nothing was tuned twice


def test_robust_and_development_tasks(registry, tmp_path):
    given = {
        "dataset": {"name": "microworld", "task": "fantasy_mosaic", "shifts": ["night"]},
        "protocol": {"name": "robust", "shots": 2},
        "tuned": [{"tuner": {"name": "linear_probe"}}],
        "strategy": [{"name": "wise_ft", "grid": {"alpha": [0.2]}}, {"name": "ensemble", "input": "linear_probe"}],
        "search": {
            "by": "development",
            "development": [{"name": "microworld", "task": "household_scatter", "shifts": ["night"]}],
        },
    }
    made = go(given, registry, tmp_path / "out")
    assert list(made.tables[0].metric.columns) == ["ID", "OOD"]
    how = records(tmp_path / "out", "fantasy_mosaic-seed1-2shots")["wise_ft"]["search"]["how"]
    assert how == "development tasks: 80 ID, 80 night"
    assert (tmp_path / "out" / "development" / "household_scatter-seed1-2shots" / "linear_probe.json").exists()


def test_multi_task_with_a_model_that_needs_the_task(registry, tmp_path):
    given = {
        "dataset": [{"name": "microworld", "task": t} for t in ("fantasy_mosaic", "sea_and_sky_blinds")],
        "protocol": {"name": "multi_task", "shots": 1},
        "tuned": [{"tuner": {"name": "full", "head": "text", "epochs": 1, "batch": 10, "lr": 1e-4}}],
        "strategy": [{"name": "task_arithmetic", "grid": {"scale": [0.8]}}, {"name": "emr"}, {"name": "wise_ft"}],
        "search": {"budget": 2},
        "controls": False,
    }
    made = go(given, registry, tmp_path / "out")
    rows = {row.label: row for row in made.tables[0].rows}
    assert {"full on fantasy_mosaic", "full on sea_and_sky_blinds", "average", "task_arithmetic", "emr"} <= set(rows)
    assert rows["task_arithmetic"].summary.normalised > 0 and rows["emr"].towers == 1
    (out,) = made.left_out
    assert out.row == "wise_ft" and ("at most 1" in out.reasons[0].reason or "1 tuned" in out.reasons[0].reason)


def test_anchors_that_come_to_nothing_fail_their_cells_and_wrong_recipes_end_at_once(registry, tmp_path):
    given = SMALL | {"seed": 1, "tuned": [{"tuner": {"name": "coop", "epochs": 3, "lr": 1e30}}]}
    made = go(given, registry, tmp_path / "out")
    assert made.tables[0].rows == () and [cell.cell for cell in made.lost_cells] == [
        f"fantasy_{task}-seed1-4shots" for task in ("mosaic", "thermal")
    ]
    assert made.lost_cells[0].reason.startswith("its tuned models failed: ") and made.failed
    given = SMALL | {"tuned": [{"tuner": {"name": "coop", "init": "word " * 40}}]}
    with pytest.raises(UserError):
        go(given, registry, tmp_path / "other")


@pytest.mark.parametrize(
    "names, given, message",
    [
        (["ties", "nosuch"], {}, "unknown strategy 'nosuch'"),
        (["merged back"], {}, "merged back is made of mergetune"),
        ([], {"strategy": [{"name": "ties", "label": "coop"}]}, "two rows are called 'coop'"),
        ([], {"strategy": [{"name": "ties", "grid": {"dens": [1]}}]}, "unknown key 'dens'"),
    ],
)
def test_a_wrong_bench_is_refused(registry, names, given, message):
    with pytest.raises(UserError, match=message):
        plan.build(parse(SMALL | given, name="small", where="small"), registry, strategies=names)


def test_all_strategies_and_datasets_by_name(registry):
    recipe = parse({**SMALL, "strategy": "all"}, name="small", where="small")
    made = plan.build(recipe, registry)
    assert {"ties", "mergetune", "half"} <= {spec.name for spec, _ in made.strategies} and len(made.strategies) > 30
    own = plan.build(parse(SMALL, name="small", where="small"), registry, strategies=["all"])
    assert len(own.strategies) == len(made.strategies) + 1  # `merged back` is a second wise_ft
    changed = with_datasets(parse(SMALL, name="small", where="small"), ["fantasy_thermal", "tools_swirl"], registry)
    assert [spec.options["task"] for spec in changed.datasets] == ["fantasy_thermal", "tools_swirl"]
    assert plan.build(changed, registry).place == plan.build(parse(SMALL, name="small", where="small"), registry).place


def test_ranks_share_their_places():
    assert ranks([0.5, 0.7, 0.7, 0.1]) == [3.0, 1.5, 1.5, 4.0]


def command(*wording, cwd, **environment):
    code = f"import sys; sys.argv = {['mergekit-vl', *map(str, wording)]!r}\nfrom mergekit_vl.commands.app import main; main()"
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)


def test_the_command_line(tmp_path):
    cache = {"MERGEKIT_VL_CACHE": str(tmp_path / "cache")}
    wording = ["bench", "tuned.0.tuner.epochs=1", "--datasets", "fantasy_mosaic", "--shots", "1"]
    planned = command(*wording, "--dry-run", cwd=tmp_path)
    assert planned.returncode == 0 and "cells     1, with " in planned.stdout and not list(tmp_path.iterdir())
    wording += ["--strategies", "slerp,ema", "--out", "b"]
    done = command(*wording, cwd=tmp_path, **cache)
    assert done.returncode == 0, done.stderr
    assert "report: b/report.html" in done.stdout and "ema: not for these models" in done.stdout
    again = command(*wording, "--json", cwd=tmp_path, **cache)
    assert again.returncode == 0 and "already done" in again.stderr
    told = json.loads(again.stdout)
    # the command of a row gives the row
    (one,) = [c["command"] for c in told["repeat"]["slerp"]]
    repeated = command(*shlex.split(one)[1:], "--json", cwd=tmp_path, **cache)
    assert repeated.returncode == 0, repeated.stderr
    rows = {row["row"]: row["score"] for row in json.loads(repeated.stdout)["summary"]}
    (table,) = told["tables"]
    assert rows["slerp"] == next(r["score"] for r in table["rows"] if "slerp" in (r["row"], *r["equal"]))
    other = command(*wording, "--out", "runs", cwd=tmp_path, **cache)
    assert other.returncode == 2 and "belongs to another recipe" in other.stderr
    shown = command("cache", cwd=tmp_path, **cache)
    assert "files " in shown.stdout and str(tmp_path / "cache") in shown.stdout
    assert command("cache", "--older-than", "1", cwd=tmp_path, **cache).returncode == 2
    kept = command("cache", "--clear", "--older-than", "1", cwd=tmp_path, **cache)
    assert kept.stdout.startswith("deleted 0 files") and list((tmp_path / "cache").glob("*/*"))
    assert command("cache", "--clear", cwd=tmp_path, **cache).returncode == 0 and not list(
        (tmp_path / "cache").glob("*")
    )


def test_a_failing_row_ends_with_3(tmp_path):
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "mine.py").write_text(PLUGIN)
    environment = {"MERGEKIT_VL_CACHE": str(tmp_path / "cache"), "MERGEKIT_VL_PLUGINS": str(tmp_path / "plugins")}
    wording = [
        "bench",
        "tuned.0.tuner.epochs=1",
        "--datasets",
        "fantasy_mosaic",
        "--shots",
        "1",
        "--strategies",
        "boom,half",
    ]
    done = command(*wording, "--out", "b", cwd=tmp_path, **environment)
    assert done.returncode == 3 and "boom: failed: ValueError: boom went off (mine.py:10)" in done.stdout
    assert "Traceback" not in done.stderr and (tmp_path / "b" / "report.html").exists()
    mended = (
        (tmp_path / "plugins" / "mine.py")
        .read_text()
        .replace('raise ValueError("boom went off")', "return inputs.base")
    )
    (tmp_path / "plugins" / "mine.py").write_text(mended)
    assert command(*wording, "--out", "b", cwd=tmp_path, **environment).returncode == 0


def test_the_small_bench_and_the_others_are_valid(registry):
    for name in ("bench_small", "bench_micro", "bench_few_shot_micro", "bench_robust_micro", "bench_multi_task_micro"):
        made = plan.build(load_recipe(name), registry)
        assert made.cells() >= 1 and len(made.strategies) > 30
    assert plan.build(load_recipe("bench_micro"), registry).cells() == 24
