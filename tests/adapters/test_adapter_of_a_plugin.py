"""The open door: a plugin's own adapter is tuned, merged by every closed form, by MergeTune and Fisher, shown, saved, read and tested."""

import json
import sys
from pathlib import Path

import pytest
import torch
from noise import NAMES, inputs, split

from mergekit_vl.backbones.micro import Micro
from mergekit_vl.commands import app
from mergekit_vl.errors import Unsuitable
from mergekit_vl.models.model import Single
from mergekit_vl.options import build
from mergekit_vl.registry import plugins

PLUG = Path(__file__).parent / "plug"
ONE = {"wise_ft": {"alpha": 0.5}, "monosoup": {}}
TWO = {"slerp", "nuslerp"}
RECIPE = """
backbone: {name: micro}
dataset: {name: microworld, task: sea_and_sky_emboss}
protocol: {name: few_shot, shots: 2}
tuned: [{tuner: {name: task_res, epochs: 4, batch: 8}}]
strategy:
  - {name: mergetune, epochs: 3, batch: 8}
  - {name: mergetune, label: weights, epochs: 2, batch: 8, space: weights, surrogate: fisher, fisher_images: 4}
  - {name: wise_ft}
  - {name: linear, space: classifiers}
  - {name: fisher, with_base: true, images: 4}
"""


REGISTRY = plugins.load_plugins(PLUG)
RESIDUAL = REGISTRY.adapter("text_residual")


def tuned(seed):
    draw = torch.Generator().manual_seed(seed)
    return Single(backbone(), RESIDUAL(0.1 * torch.randn(3, backbone().width or 128, generator=draw), NAMES))


BUILT = []


def backbone():
    BUILT.extend([Micro().build("cpu")] * (not BUILT))
    return BUILT[0]


def closed_forms():
    entries = REGISTRY.entries["strategies"]
    return sorted(name for name, entry in entries.items() if "merge_chunk" in dir(entry.resolve()))


@pytest.mark.parametrize("name", closed_forms())
def test_every_closed_form_merges_it(name):
    count = 1 if name in ONE else 2 if name in TWO else 3
    models = tuple(tuned(seed) for seed in range(count))
    given = inputs(backbone(), split(3, side=48), tuned=models)
    one_task = given.data[0]
    given = type(given)(given.base, models, (one_task,) * count, given.features)
    strategy = build(REGISTRY.find("strategies", name).resolve(), ONE.get(name, {}), where=name)
    if hasattr(strategy, "task"):
        strategy = type(strategy)(task=0)
    merged = strategy.merge(given).adapter
    assert isinstance(merged, RESIDUAL) and merged.names == NAMES
    assert torch.isfinite(merged.residual).all()


def test_no_linear_map_is_told():
    models = (tuned(0), tuned(1))
    given = inputs(backbone(), split(3), tuned=models)
    strategy = REGISTRY.find("strategies", "regmean").resolve()()
    with pytest.raises(Unsuitable, match="a text residual has no linear map of image features"):
        strategy.merge(given)


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["mergekit-vl", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert not caught.value.code, words


@pytest.fixture
def plugged(monkeypatch):
    """Commands see the plugin."""
    monkeypatch.setattr(plugins, "load_plugins", lambda: REGISTRY)
    plugins.registry.cache_clear()
    yield
    plugins.registry.cache_clear()


def test_a_run_a_path_and_an_eval_of_it(plugged, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERGEKIT_VL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mergekit_vl.microworld.tasks.PER_CLASS", {"train": 4, "val": 2, "test": 3})
    Path("recipe.yaml").write_text(RECIPE)
    call(monkeypatch, "run", "recipe.yaml", "--quiet", "--out", "run")
    report = json.loads(Path("run/report.json").read_text())
    assert {row["row"] for row in report["cells"][0]["rows"]} >= {
        "task_res",
        "mergetune",
        "weights",
        "wise_ft",
        "fisher",
    }
    assert "holds the text residual that" in Path("run/README.md").read_text()
    spaces = {point["space"] for point in report["landscape"]}
    assert spaces == {"classifiers", "residuals"}
    capsys.readouterr()
    call(monkeypatch, "eval", "run", "--json")
    told = capsys.readouterr().out
    main = next(row for row in report["cells"][0]["rows"] if row["row"] == "mergetune")
    assert json.loads(told)["metrics"]["acc1"] == main["tests"]["test"]["acc1"]
    call(monkeypatch, "landscape", "recipe.yaml", "--points", "5", "--plane", "3", "--out", "run")
    assert {each["space"] for each in json.loads(Path("run/landscape.json").read_text())["points"]} == spaces
