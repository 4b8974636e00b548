"""What was chosen is told with the images that it was chosen on: in results, table, card and page."""

import json

import pytest
import torch

from mergekit_vl.experiments import experiment
from mergekit_vl.models import choices
from mergekit_vl.models.evaluate import Scores
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.printable import in_markdown
from mergekit_vl.recipes.recipe import parse
from mergekit_vl.registry.plugins import load_plugins
from mergekit_vl.reporter import SILENT
from mergekit_vl.reports import report
from mergekit_vl.reports.results import Report, Row


@pytest.fixture(scope="module", autouse=True)
def small_world():
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergekit_vl.microworld.tasks.PER_CLASS", {"train": 4, "val": 2, "test": 4})
        yield
    torch.use_deterministic_algorithms(False)
    torch.backends.mha.set_fastpath_enabled(fast)


def run(out, tuned, strategies, **more):
    given = {
        "dataset": {"name": "microworld", "task": "fantasy_mosaic"},
        "protocol": {"name": "few_shot", "shots": 2},
        "tuned": [{"tuner": {"name": "linear_probe", **each}} for each in tuned],
        "strategy": strategies,
        "controls": False,
        **more,
    }
    made = experiment.build(parse(given, name="small", where="small"), load_plugins())
    quiet = {"reporter": SILENT}
    told = experiment.run(made, out, device="cpu", store=FeatureStore(out.parent / "cache"), **quiet).to_json()
    results = [json.loads(file.read_text()) for file in (out / "results").glob("*.json")]
    return told, {(result["strategy"], result["seed"]): result for result in results}


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    out = tmp_path_factory.mktemp("chosen") / "out"
    strategies = [
        {"name": "wise_ft", "input": "fixed"},
        {"name": "ensemble", "weights": "validation", "input": "fixed"},
        {"name": "vrf", "input": "fixed", "k": 1},
        {"name": "greedy_soup"},
        {"name": "uniform_soup"},
    ]
    return *run(out, [{}, {"label": "fixed", "l2": 0.01}], strategies, seed=[1, 2]), out


def test_a_result_tells_the_split_that_it_owes_something_to(chosen):
    _, results, _ = chosen
    splits = {row: result["selection_split"] for (row, seed), result in results.items() if seed == 1}
    assert splits == {
        "zero-shot": None, "linear_probe": "val", "fixed": None, "wise_ft": None, "ensemble": "val", "vrf": "val",
        "greedy_soup": "val", "uniform_soup": "val",  # whose first model has a penalty that validation chose
    }  # fmt: skip
    assert set(results["ensemble", 1]["chosen"]) == {"weights"} and results["wise_ft", 1]["chosen"] == {}
    assert sum(results["ensemble", 2]["chosen"]["weights"]) == pytest.approx(1)
    assert set(results["greedy_soup", 1]["chosen"]["ingredients"]) <= {"linear_probe", "fixed"}
    assert set(results["vrf", 1]["chosen"]) == {"a", "b", "temperatures"}


def test_table_card_and_page_tell_it(chosen):
    told, results, out = chosen
    rows = {row["row"]: row for row in told["summary"]}
    assert rows["fixed"]["chosen"] == rows["wise_ft"]["chosen"] == {} and rows["ensemble"]["chosen"]["weights"]
    both = rows["greedy_soup"]["chosen"]["ingredients"]
    assert {each["split"] for each in both} == {"val"} and sum(each["cells"] for each in both) == 2
    assert told["selection"] == (
        "nothing was chosen on test; chosen on validation images: l2 of linear_probe, weights of ensemble, a of vrf, b of vrf, "
        "temperatures of vrf, ingredients of greedy_soup; other hyperparameters are the recipe's"
    )
    card = (out / "README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("| greedy_soup"))
    assert in_markdown(f"ingredients {choices.text(both[0]['value'])}") in line
    assert in_markdown(told["selection"][1:]) in card
    page = (out / "report.html").read_text()
    assert (
        "<h2>What was chosen</h2>" in page
        and '<td class="text">ingredients</td><td class="text">validation images</td>' in "".join(page.splitlines())
    )


def test_a_report_is_read_as_it_was_written(chosen):
    told, _, out = chosen
    found = report.load(out)
    assert json.loads(json.dumps(told)) == found.to_json() == json.loads((out / "report.json").read_text())
    assert Report.from_json(found.to_json()) == found


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"recipe": "old", "cells": [{"rows": [{"row": "zero-shot"}]}]}'])
def test_a_report_of_another_version_is_no_finished_run(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    assert report.load(tmp_path) is None


def test_where_nothing_was_chosen_it_says_so(tmp_path):
    told, results = run(tmp_path / "out", [{"l2": 0.01}], [{"name": "wise_ft"}, {"name": "ensemble"}])
    assert told["selection"] == "nothing was chosen on test; hyperparameters are the recipe's"
    assert {result["selection_split"] for result in results.values()} == {None}
    assert "What was chosen" not in (tmp_path / "out" / "report.html").read_text()


def test_choices_are_counted_over_cells():
    cells = [{"alpha": (0.5, "val")}, {"alpha": (0.3, "val")}, {"alpha": (0.3, "val")}, {}]
    found = choices.counted(cells)
    assert [(each.value, each.cells) for each in found["alpha"]] == [(0.3, 2), (0.5, 1)]
    assert choices.told(found) == "alpha 0.3 (2 cells), 0.5 (1 cell)"
    assert choices.told(found, most=1) == "alpha 0.3 (2 cells) and 1 more"
    assert choices.told(choices.counted(cells[:1])) == "alpha 0.5"
    assert choices.text({"weights": [0.25, 0.75], "average": "logits"}) == "weights=[0.25, 0.75], average=logits"
    assert choices.text({}) == "defaults"


def test_rows_of_an_earlier_version_are_read():
    scores = {
        "n": 4,
        "acc1": 0.5,
        "low": 0.2,
        "high": 0.8,
        "acc5": 1.0,
        "mean_per_class_recall": 0.5,
        "nll": 1.0,
        "ece": 0.0,
    }
    told = {
        "tests": {"test": scores},
        "score": 0.5,
        "right": {"test": "0101"},
        "digest": {"test": "ab"},
        "parameters": 3,
        "forwards": 1,
    }
    told |= {"cost": {"seconds": 1.0, "ms_per_sample": 0.1}, "learnt": {}}
    row = Row.from_json({"row": "probe", "kind": "tuned", "chosen": {"l2": 0.1}, **told})
    merged = Row.from_json({"row": "wise_ft", "kind": "merged", "chosen": {}, **told})
    assert row.chosen == {"l2": (0.1, "val")} and row.tests["test"] == Scores(**scores)
    now = {"row": "wise_ft", "kind": "merged", "chosen": {}, "chosen_on": None, **told}
    assert merged.to_json() == now and Row.from_json(now) == merged
    learnt = {**now, "learnt": {"scale": [1.0, 2.0]}, "chosen_on": "train"}
    assert Row.from_json(learnt).to_json() == learnt and Row.from_json(learnt).chosen == {}
    assert [report.selection_split([row, merged], each, {}) for each in (row, merged)] == ["val", "val"]
    assert report.selection_split([row, merged], merged, {"wise_ft": "zero-shot"}) is None
