"""Whatever stands in a recipe or a split file: it is read, or refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nearly import nearly, refused_or_read, spliced
from outcomes import counted
from PIL import Image
from safetensors.torch import save_file

from mergekit_vl.benchmark import plan as plans
from mergekit_vl.commands.merge_request import ask
from mergekit_vl.datasets.coop_layout import CoOpLayout
from mergekit_vl.experiments import experiment
from mergekit_vl.merge_files import streaming
from mergekit_vl.merge_files.mergekit_yaml import METHODS
from mergekit_vl.merge_files.plan import open_plan
from mergekit_vl.recipes.loading import installed_recipes, load_recipe
from mergekit_vl.recipes.recipe import Recipe
from mergekit_vl.registry.plugins import load_plugins

pytestmark = pytest.mark.filterwarnings("ignore:.* is now written:FutureWarning")
"""A former name of an option is taken, with a warning."""

RECIPES = [yaml.safe_load(path.read_text()) for path in installed_recipes().values()]
OVERRIDES = ["seed=x", "seed=${seed}", "seed.0=1", "strategy.0=3", "strategy.-1.name=ties", "strategy=[", "tuned.x=1"]
OVERRIDES += [
    "tuned.0.tuner.epochs=x",
    "a.b.c=1",
    "dataset.path=${oc.env:HOME}",
    "=1",
    "dataset={name: folder, path: x}",
]
FILES = [f"{name}.safetensors" for name in "abc"]
STRATEGIES = ("linear", "slerp", "nuslerp", "ties", "della", "breadcrumbs", "sce", "karcher", "model_stock", "tsv_m")
SINGLE = {"normalize": True, "normalize_weights": True, "rescale": True, "int8_mask": False, "filter_wise": False}
SINGLE |= {"nuslerp_row_wise": False, "nuslerp_flatten": True, "max_iter": 3, "epsilon": 0.1, "gamma": 0.01}


def _mergekits(method: str) -> dict:
    parameters = {name: SINGLE.get(name, 0.5) for name in METHODS[method]}
    models = [{"model": file, "parameters": dict(parameters)} for file in FILES[:2]]
    return {
        "merge_method": method,
        "base_model": FILES[2],
        "models": models,
        "parameters": parameters,
        "dtype": "float32",
    }


MERGES = [
    {"weights": {"models": [FILES[0], {"path": FILES[1]}], "base": FILES[2], "strategy": {"name": name}, "seed": 1}}
    for name in STRATEGIES
] + [_mergekits(method) for method in METHODS]
ITEMS = [[f"{i}.jpg", i % 2, ("cat", "dog")[i % 2]] for i in range(4)]
SPLIT = {"train": ITEMS, "val": ITEMS[:2], "test": ITEMS[2:]}


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    at = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        for i, file in enumerate(FILES):
            save_file({f"l.{n}.w": torch.arange(12.0).reshape(4, 3).cos() + i + n for n in range(2)}, file)
        Path("pets").mkdir()
        for file, _, _ in ITEMS:
            Image.new("RGB", (4, 4)).save(Path("pets", file))
        yield at


@counted(5000, 40)
@given(nearly(RECIPES).flatmap(lambda tree: spliced(_yaml(tree))), st.lists(st.sampled_from(OVERRIDES), max_size=2))
def test_recipes(text, overrides):
    registry = load_plugins()

    def check(recipe: Recipe) -> None:
        plan = plans.build(recipe, registry)
        plans.lineup(plan, ["pets"])
        assert plan.place and plan.hash and plan.time()
        if not recipe.every:
            experiment.build(recipe, registry)

    Path("r.yaml").write_text(text, errors="surrogatepass")
    refused_or_read(lambda: load_recipe("r.yaml", overrides, check=check).hash)


@counted(2000, 60)
@given(nearly(MERGES).flatmap(lambda tree: spliced(_yaml(tree))))
def test_recipes_of_merges(text):
    Path("m.yaml").write_text(text, errors="surrogatepass")
    shutil.rmtree("out", ignore_errors=True)

    def merge() -> None:
        plan = ask(["m.yaml"]).plan
        open_plan(plan)
        streaming.merge(plan, Path("out"))

    assert refused_or_read(merge) == Path("out").exists()


@counted(2000, 100)
@given(nearly([SPLIT]).flatmap(lambda tree: spliced(json.dumps(tree))))
def test_split_files(text):
    Path("pets", "split_zhou_pets.json").write_text(text, errors="surrogatepass")
    refused_or_read(CoOpLayout(".", "pets").load)


def _yaml(tree: object) -> str:
    return yaml.dump(tree, allow_unicode=False)
