"""The suite's recorded means stand beside runs that they can be compared with, and beside no others."""

import pytest

from mergekit_vl.experiments import suite
from mergekit_vl.experiments.experiment import build
from mergekit_vl.recipes.loading import load_recipe
from mergekit_vl.registry.plugins import load_plugins

REGISTRY = load_plugins()


def beside(*overrides, recipe="mergetune_coop"):
    return suite.beside(build(load_recipe(recipe, overrides), REGISTRY), REGISTRY)


def test_the_demo_and_its_other_tasks_and_seeds():
    line = beside()
    assert line.startswith("recorded mean HM of the whole suite with these settings (15 tasks, 3 seeds; ")
    assert "zero-shot 67.1, coop 61.3, continued 62.0, CE only 62.3, mergetune 70.9" in line
    assert beside("seed=2", "dataset.task=nature_texture") == line


def test_rows_that_are_others_there_are_left_out():
    assert "mergetune 70.9" not in beside("strategy.0.lambda=2") and "CE only 62.3" in beside("strategy.0.lambda=2")
    assert "CE only" not in beside("strategy.0.batch=64")  # the controls train as the main row does
    assert beside("strategy=[{name: ensemble, average: logits}]").endswith("zero-shot 67.1, coop 61.3")
    assert "continued" not in beside("controls=false") and "mergetune 70.9" in beside("controls=false")


@pytest.mark.parametrize(
    "override",
    [
        "tuned.0.tuner.name=kgcoop",
        "tuned.0.tuner.epochs=2",
        "protocol.shots=4",
        "protocol={name: few_shot}",
        "dataset={name: folder, path: pets}",
        "backbone={name: clip, arch: ViT-B-32}",
    ],
)
def test_other_settings_have_nothing_beside_them(override):
    assert beside(override) is None
