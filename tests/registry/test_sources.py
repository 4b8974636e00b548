"""Keys know the code: what each kind of row depends on, and what it does not."""

import sys

import pytest

from mergekit_vl.experiments import experiment
from mergekit_vl.experiments.cell import WITHOUT
from mergekit_vl.recipes import recipe
from mergekit_vl.registry import sources
from mergekit_vl.registry.plugins import load_plugins

SHOWN = (
    *("reports.html", "reports.card", "reports.report", "reports.landscape_page", "benchmark.page", "benchmark.report"),
    *("commands.app", "commands.terminal", "commands.bench"),
)


def of(*modules, without=()):
    return {
        name.removeprefix("mergekit_vl.") for name in sources.closure([f"mergekit_vl.{m}" for m in modules], without)
    }


def test_a_methods_closure_is_its_maths():
    assert {"strategies.ties", "merging.task_vectors", "merging.prepass", "merging.engine", "merging.chunks"} <= of(
        "strategies.ties"
    )
    assert {"tuners.coop", "tuners.training", "tuners.sgd", "adapters.prompt"} <= of(
        "tuners.coop"
    )  # late imports are among them
    assert "strategies.slerp" not in of("strategies.ties")


@pytest.mark.parametrize("kind", ["strategies", "tuners", "backbones", "datasets", "protocols"])
def test_no_row_depends_on_what_shows_it(kind):
    for entry in load_plugins().entries[kind].values():
        assert not of(entry.resolve().__module__.removeprefix("mergekit_vl.")) & set(SHOWN), entry.name
    assert not of(
        "experiments.experiment", "models.evaluate", "benchmark.cell_rows", "benchmark.grid", without=WITHOUT
    ) & set(SHOWN)


def test_what_all_rows_share_holds_no_method():
    shared = of("experiments.experiment", "benchmark.cell_rows", "benchmark.grid", without=WITHOUT)
    assert {"experiments.cell", "models.evaluate", "benchmark.search", "storage.model_files"} <= shared
    assert not [name for name in shared if name.startswith(("strategies.", "tuners."))]


def test_a_plugins_own_modules_count_relative_ones_too(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "ourplugin"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "maths.py").write_text("import os\nHALF = 0.5\n")
    (package / "deep.py").write_text("from mergekit_vl.merging.task_vectors import x\n")
    (package / "method.py").write_text(
        "from typing import TYPE_CHECKING\nfrom .maths import HALF\nif TYPE_CHECKING:\n    import ourplugin.never\n"
        "class Method:\n    def merge(self):\n        from . import deep\n"
    )
    (package / "never.py").write_text("")
    found = sources.closure(["ourplugin.method"])
    assert {"ourplugin.method", "ourplugin.maths", "ourplugin.deep", "mergekit_vl.merging.task_vectors"} <= set(found)
    assert not {"ourplugin.never", "os"} & set(found) and "ourplugin.method" not in sys.modules
    (package / "maths.py").write_text("import os\nHALF = 0.25\n")
    sources._source.cache_clear()
    now = sources.closure(["ourplugin.method"])
    assert sources.changed(found, now) == ["ourplugin/maths.py"] and sources.digest(found) != sources.digest(now)


@pytest.mark.parametrize(
    "text", ["from mergekit_vl import endpoints, option", "import mergekit_vl as mk\nmk.option(mk.endpoints)"]
)
def test_what_a_plugin_takes_from_the_package_itself_counts(tmp_path, monkeypatch, text):
    monkeypatch.syspath_prepend(tmp_path)
    sources._source.cache_clear()
    sources._file.cache_clear()
    (tmp_path / "onefile.py").write_text(text)
    assert {"onefile", "mergekit_vl.strategies.in_memory", "mergekit_vl.options"} <= set(sources.closure(["onefile"]))
    sources._source.cache_clear()
    sources._file.cache_clear()


def test_a_run_is_done_by_its_code_and_its_recipe_alone_names_its_folder():
    given = {"dataset": {"name": "microworld", "task": "animals_emboss"}, "strategy": {"name": "ties"}}
    made = experiment.build(recipe.parse(given, name="r", where="r"), load_plugins())
    code = {name.removeprefix("mergekit_vl.") for name in made.code()}
    assert {
        "strategies.ties",
        "tuners.coop",
        "backbones.micro",
        "microworld.render",
        "models.views",
        "experiments.landscape",
    } <= code
    assert not code & set(SHOWN) and "strategies.slerp" not in code
