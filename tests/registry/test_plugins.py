"""The registry: built-ins, entry points and a plugins directory."""

import dataclasses
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from mergekit_vl.errors import UserError
from mergekit_vl.registry import plugins
from mergekit_vl.registry.plugins import KINDS, load_plugins

ROOT = Path(__file__).parents[2]
BUILTINS = {
    "backbones": ["micro", "photo", "clip", "vision"],
    "adapters": ["zero_shot", "prompt", "linear_head", "tower"],
    "tuners": ["coop", "kgcoop", "linear_probe", "full"],
    "strategies": [
        *("linear", "wise_ft", "uniform_soup", "greedy_soup", "ema", "slerp", "nuslerp", "multislerp", "karcher"),
        *("task_arithmetic", "lines", "monosoup", "ties", "dare_linear", "dare_ties", "della", "della_linear"),
        *(
            "breadcrumbs",
            "breadcrumbs_ties",
            "model_stock",
            "sce",
            "consensus",
            "emr",
            "tall_mask",
            "pcb",
            "tsv_m",
            "iso_c",
            "iso_cts",
        ),
        *("fisher", "regmean", "adamerging", "ensemble", "repair", "vrf", "mergetune"),
    ],
    "datasets": ["microworld", "clothing", "folder", "table", "coop_layout"],
    "protocols": ["base_to_novel", "few_shot", "robust", "multi_task", "new_and_kept"],
}
METHODS = {
    "backbones": "build",
    "adapters": "untuned",
    "tuners": "tune",
    "strategies": "merge",
    "datasets": "load",
    "protocols": "task",
}

GOOD = """
from dataclasses import dataclass

from mergekit_vl.registry.hookspecs import hookimpl
from mergekit_vl.options import option


@dataclass(frozen=True)
class Halfway:
    t: float = option(0.5, "how far")

    def merge(self, inputs):
        return inputs.base


@hookimpl
def register_strategies(register):
    register("halfway", Halfway, "half of the way")
"""
RAISES = "raise RuntimeError('the licence server is down')\n"
HOOK_RAISES = """
from mergekit_vl.registry.hookspecs import hookimpl


@hookimpl
def register_strategies(register):
    register("never", "nowhere:Never")
    raise LookupError("after one name")
"""
MISSPELT = """
from mergekit_vl.registry.hookspecs import hookimpl


@hookimpl
def register_strategy(register):
    register("lost", "nowhere:Lost")
"""
TAKEN = GOOD.replace('"halfway"', '"linear"')


@pytest.fixture(autouse=True)
def only_what_the_test_installs(monkeypatch):
    """Neither the machine's entry points nor its environment reach a test, and imported plugin files are forgotten."""
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())
    monkeypatch.delenv("MERGEKIT_VL_PLUGINS", raising=False)
    yield
    for name in [name for name in sys.modules if name.startswith("mergekit_vl_plugin_")]:
        del sys.modules[name]


def folder(tmp_path: Path, **files: str) -> Path:
    for stem, source in files.items():
        (tmp_path / f"{stem}.py").write_text(source)
    return tmp_path


def run(source: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_builtins_are_registered_by_name_only():
    registry = load_plugins()
    assert {kind: list(entries) for kind, entries in registry.entries.items()} == BUILTINS
    for entry in (e for entries in registry.entries.values() for e in entries.values()):
        assert isinstance(entry.target, str) and entry.summary and entry.owner == "mergekit_vl.registry.builtin_plugins"
    assert registry.failures == {}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in KINDS for name in BUILTINS[kind]])
def test_every_builtin_resolves(kind, name):
    cls = load_plugins().find(kind, name).resolve()
    assert dataclasses.is_dataclass(cls) and callable(getattr(cls, METHODS[kind]))


def test_loading_imports_no_builtin():
    kinds = tuple(f"mergekit_vl.{kind}" for kind in KINDS)
    done = run(
        "import sys; from mergekit_vl.registry import plugins; plugins.entry_points = lambda group: (); plugins.load_plugins()\n"
        f"print([name for name in sys.modules if name == 'torch' or name.startswith({kinds!r})])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_light_modules_import_without_torch():
    done = run(
        "import sys; sys.modules['torch'] = None\n"
        "from mergekit_vl import options; from mergekit_vl.registry import builtin_plugins as builtins, plugins; plugins.entry_points = lambda group: ()\n"
        "for kind, entries in plugins.load_plugins().entries.items():\n"
        "    for entry in entries.values():\n"
        "        if kind != 'backbones':\n"
        "            try:\n"
        "                entry.resolve()\n"
        "            except Exception as error:\n"
        "                print(error)\n"
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize(
    "kind, name, message",
    [
        ("strategies", "mergetun", "unknown strategy 'mergetun' (did you mean 'mergetune'?)"),
        ("tuners", "co-op", "unknown tuner 'co-op' (did you mean 'coop'?)"),
        (
            "protocols",
            "zzz",
            "unknown protocol 'zzz' (known: base_to_novel, few_shot, multi_task, new_and_kept, robust)",
        ),
    ],
)
def test_an_unknown_name_gets_the_nearest(kind, name, message):
    with pytest.raises(UserError) as caught:
        load_plugins().find(kind, name)
    assert str(caught.value) == message


def test_the_place_of_an_unknown_name_is_given():
    with pytest.raises(UserError, match="^recipe.yaml: strategy: unknown strategy"):
        load_plugins().find("strategies", "mergetun", where="recipe.yaml: strategy")


def test_a_file_of_the_plugins_directory(tmp_path):
    registry = load_plugins(folder(tmp_path, mine=GOOD))
    entry = registry.find("strategies", "halfway")
    assert (entry.owner, entry.summary) == ("mine", "half of the way")
    assert entry.resolve()().t == 0.5
    assert registry.failures == {} and registry.owners() == ("mergekit_vl.registry.builtin_plugins", "mine")


def test_the_environment_names_the_plugins_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGEKIT_VL_PLUGINS", str(folder(tmp_path, mine=GOOD)))
    assert "halfway" in load_plugins().entries["strategies"]


def test_an_installed_entry_point(tmp_path, monkeypatch):
    folder(tmp_path, some_distribution=GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    points = (
        EntryPoint("gone", "no_such_module", "mergekit_vl"),
        EntryPoint("theirs", "some_distribution", "mergekit_vl"),
    )
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == "mergekit_vl" else ())
    try:
        registry = load_plugins()
    finally:
        sys.modules.pop("some_distribution", None)
    assert registry.find("strategies", "halfway").owner == "theirs"
    assert registry.failures == {"gone": "ModuleNotFoundError: No module named 'no_such_module'"}


def test_a_plugin_that_raises_is_named_and_the_rest_goes_on(tmp_path):
    registry = load_plugins(
        folder(tmp_path, a_raises=RAISES, b_hook_raises=HOOK_RAISES, c_syntax="def :\n", z_good=GOOD)
    )
    assert registry.failures["a_raises"] == "RuntimeError: the licence server is down"
    assert registry.failures["b_hook_raises"] == "LookupError: after one name"
    assert registry.failures["c_syntax"].startswith("SyntaxError: ")
    assert len(registry.failures) == 3
    assert "halfway" in registry.entries["strategies"] and "linear" in registry.entries["strategies"]
    assert "never" not in registry.entries["strategies"]  # all of a plugin's names, or none
    assert registry.owners() == ("mergekit_vl.registry.builtin_plugins", "z_good")


def test_a_misspelt_hook_is_reported(tmp_path):
    registry = load_plugins(folder(tmp_path, a_misspelt=MISSPELT, z_good=GOOD))
    assert list(registry.failures) == ["a_misspelt"]
    assert "register_strategy" in registry.failures["a_misspelt"]
    assert "halfway" in registry.entries["strategies"]


@pytest.mark.parametrize(
    "files, name, owners",
    [
        ({"mine": TAKEN}, "linear", ("mergekit_vl.registry.builtin_plugins", "mine")),
        ({"first": GOOD, "second": GOOD}, "halfway", ("first", "second")),
    ],
)
def test_a_name_registered_twice_is_fatal(tmp_path, files, name, owners):
    with pytest.raises(UserError) as caught:
        load_plugins(folder(tmp_path, **files))
    assert f"strategies: {name!r} is registered twice, by {owners[0]} and by {owners[1]}" in str(caught.value)


def test_a_missing_plugins_directory(tmp_path):
    with pytest.raises(UserError, match="gone: no such plugins directory"):
        load_plugins(tmp_path / "gone")


def test_a_builtin_that_fails_is_fatal(monkeypatch):
    monkeypatch.setattr(plugins, "DEFAULT_PLUGINS", ("mergekit_vl.no_such_builtins",))
    with pytest.raises(ModuleNotFoundError, match="no_such_builtins"):
        load_plugins()


def test_a_target_that_cannot_be_imported_names_its_plugin(tmp_path):
    source = HOOK_RAISES.replace('    raise LookupError("after one name")\n', "")
    entry = load_plugins(folder(tmp_path, mine=source)).find("strategies", "never")
    with pytest.raises(
        UserError, match=r"never \(nowhere:Never\) of plugin mine cannot be imported: No module named 'nowhere'"
    ):
        entry.resolve()
