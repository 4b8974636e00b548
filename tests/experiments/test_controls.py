"""A strategy brings the controls that it wants beside it; the package knows none by name."""

import re
import sys
from pathlib import Path

import pytest

from mergekit_vl.benchmark import plan
from mergekit_vl.errors import UserError
from mergekit_vl.experiments import experiment
from mergekit_vl.recipes.recipe import parse
from mergekit_vl.registry import plugins
from mergekit_vl.registry.plugins import load_plugins
from mergekit_vl.strategies.mergetune import MergeTune

PLUGIN = """
from dataclasses import dataclass, replace
from mergekit_vl.registry.hookspecs import hookimpl


@hookimpl
def register_strategies(register):
    register("tuned_on", TunedOn, "")
    register("plain", Plain, "")


@dataclass(frozen=True)
class TunedOn:
    epochs: int = 5
    pull: float = 1.0
    trains = True

    def merge(self, inputs):
        return inputs.tuned[0]

    def controls(self):
        return [("without the pull", replace(self, pull=0.0))]

    @classmethod
    def continued(cls, options):
        return {"epochs": options.get("epochs", 1), "pull": 0.0}


@dataclass(frozen=True)
class Plain:
    def merge(self, inputs):
        return inputs.base
"""


@pytest.fixture
def registry(tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())
    (tmp_path / "mine.py").write_text(PLUGIN)
    yield load_plugins(tmp_path)
    sys.modules.pop("mergekit_vl_plugin_mine", None)


def recipe(*strategies, **more):
    given = {"dataset": {"name": "microworld"}, "strategy": [{"name": name} for name in strategies], **more}
    return parse(given, name="small", where="small")


def test_a_run_makes_the_controls_of_its_strategies(registry):
    made = experiment.build(recipe("plain", "tuned_on"), registry)
    assert made.rows == ("zero-shot", "coop", "without the pull", "plain", "tuned_on")
    assert made.controls[0][1].pull == 0.0
    both = experiment.build(recipe("tuned_on", "mergetune"), registry)
    assert [label for label, _ in both.controls] == ["without the pull", "continued", "CE only"]
    assert both.controls[1:] == MergeTune().controls()
    for without in (recipe("plain"), recipe("tuned_on", controls=False)):
        assert experiment.build(without, registry).controls == ()


def test_of_two_strategies_that_want_the_same_control_the_first_has_it(registry):
    strategies = [{"name": "mergetune", "epochs": 3}, {"name": "mergetune", "label": "again", "epochs": 4}]
    given = {"dataset": {"name": "microworld"}, "strategy": strategies}
    made = experiment.build(parse(given, name="small", where="small"), registry)
    assert [(label, control.epochs) for label, control in made.controls] == [("continued", 3), ("CE only", 3)]


def test_a_control_is_a_row_like_others(registry):
    strategies = [{"name": "tuned_on"}, {"name": "plain", "label": "without the pull"}]
    with pytest.raises(UserError, match="two rows are called 'without the pull'"):
        experiment.build(
            parse({"dataset": {"name": "microworld"}, "strategy": strategies}, name="small", where="small"), registry
        )


def continued(registry, *strategies, **more):
    made = plan.build(recipe(*strategies, **more), registry)
    return [(e.spec.name, e.spec.options) for e in plan.lineup(made, ["any"]) if e.label == "continued"]


def test_a_bench_trains_on_with_the_first_strategy_that_can(registry):
    assert continued(registry, "plain", "tuned_on", "mergetune") == [("tuned_on", {"epochs": 1, "pull": 0.0})]
    plain = {"lambda": 0.0, "beta": 0.0, "tau": 1.0}
    assert continued(registry, "mergetune", "tuned_on") == [("mergetune", plain)]
    ((name, options),) = continued(registry, "plain", tuned=[{"tuner": {"name": "coop", "epochs": 7}}])
    assert name == "mergetune" and options["epochs"] == 7 and plain.items() <= options.items()
    assert continued(registry, "plain", controls=False) == []


def test_neither_run_nor_bench_knows_a_strategy_by_the_name_of_mergetune():
    package = Path(experiment.__file__).parent.parent
    files = [file for room in ("experiments", "bench", "commands") for file in (package / room).glob("*.py")]
    names = [(file.name, line) for file in files for line in re.findall(r".*mergetune\b.*", file.read_text(), re.I)]
    assert names == []  # `mergetune_suite` is a recipe
