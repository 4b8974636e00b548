"""A class that does not fit its kind is told where it is registered: plugin, class, member, what was expected."""

import sys
from pathlib import Path

import pytest

from mergekit_vl.errors import UserError
from mergekit_vl.registry import contracts, plugins
from mergekit_vl.registry.plugins import KINDS, load_plugins

PLUGIN = """
from dataclasses import dataclass
from mergekit_vl.registry.hookspecs import hookimpl


@hookimpl
def register_KIND(register):
    register("odd", TARGET, "odd")


@dataclass(frozen=True)
class Odd:
    size: int = 1

BODY
"""
FITS = {
    "strategies": "def merge(self, inputs): ...",
    "tuners": "def tune(self, inputs, more=None): ...",
    "datasets": "def load(self, *given): ...",
    "protocols": "def task(self, dataset, seed): ...",
    "backbones": "def build(self, device): ...",
}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())
    yield
    sys.modules.pop("mergekit_vl_plugin_mine", None)
    sys.modules.pop("odd_module", None)


def told(tmp_path, *body, kind="strategies", target="Odd"):
    """Why the plugin was not loaded; None where it was."""
    text = PLUGIN.replace("KIND", kind).replace("TARGET", target)
    (tmp_path / "mine.py").write_text(text.replace("BODY", "\n".join(f"    {line}" for line in body)))
    registry = load_plugins(tmp_path)
    assert ("odd" in registry.entries[kind]) == ("mine" not in registry.failures)
    return registry.failures.get("mine")


@pytest.mark.parametrize("kind", FITS)
def test_what_a_plugin_must_write_is_one_method(tmp_path, kind):
    assert told(tmp_path, FITS[kind], kind=kind) is None


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("strategies", "strategy 'odd': Odd has no merge: merge(inputs: MergeInputs) -> Model was expected"),
        ("tuners", "tuner 'odd': Odd has no tune: tune(inputs: MergeInputs) -> Single was expected"),
        ("datasets", "dataset 'odd': Odd has no load: load(reporter: Reporter) -> Dataset was expected"),
        ("protocols", "protocol 'odd': Odd has no task: task(dataset: Dataset, seed: int) -> Task was expected"),
        ("backbones", "backbone 'odd': Odd has no build: build(device: str) -> Backbone was expected"),
    ],
)
def test_a_missing_member(tmp_path, kind, expected):
    assert told(tmp_path, kind=kind) == expected


MERGE = "merge(inputs: MergeInputs) -> Model was expected"
GRID = "grid: Mapping[str, Sequence[Any]] | Callable[[int], Mapping[str, Sequence[Any]]] was expected"
CONTROLS = "controls() -> Sequence[tuple[str, Strategy]] was expected"


@pytest.mark.parametrize(
    "body, expected",
    [
        ("def merge(self): ...", f"Odd.merge(self) cannot be called so: {MERGE}"),
        ("def merge(self, base, tuned): ...", f"Odd.merge(self, base, tuned) cannot be called so: {MERGE}"),
        ("def merge(self, *, inputs): ...", f"Odd.merge(self, *, inputs) cannot be called so: {MERGE}"),
        ("merge = 3", f"Odd.merge is 3: {MERGE}"),
        ("trains = 'yes'", "Odd.trains is 'yes': trains: bool was expected"),
        ("grid = [0.5]", f"Odd.grid is [0.5]: {GRID}"),
        ("controls = ()", f"Odd.controls is (): {CONTROLS}"),
        ("def controls(self, inputs): ...", f"Odd.controls(self, inputs) cannot be called so: {CONTROLS}"),
        ("def continued(self, options): ...", "Odd.continued is a method of instances: the class method "
         "continued(options: Mapping[str, Any]) -> dict[str, Any] was expected"),
    ],
)  # fmt: skip
def test_a_member_that_does_not_fit(tmp_path, body, expected):
    own = () if "merge" in body else (FITS["strategies"],)
    assert told(tmp_path, *own, body) == f"strategy 'odd': {expected}"


@pytest.mark.parametrize(
    "body",
    [
        "trains = True",
        "trains: bool = False",
        "trains = property(lambda self: self.size > 1)",
        "grid = {'size': (1, 2)}",
        "grid = staticmethod(lambda models: {'size': (1, models)})",
        "controls = lambda self: ()",
        "continued = classmethod(lambda cls, options: {})",
    ],
)
def test_what_a_strategy_may_have(tmp_path, body):
    assert told(tmp_path, FITS["strategies"], body) is None


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    reason = told(tmp_path, "trains = 1")
    assert reason == f"strategy 'odd': Odd has no merge: {MERGE}; Odd.trains is 1: trains: bool was expected"


@pytest.mark.parametrize(
    "target, expected",
    [
        ("Odd()", "Odd(size=1) is not a class: a frozen dataclass was expected"),
        ("None", "None is not a class: a frozen dataclass was expected"),
        ("'odd_module.Odd'", "'odd_module.Odd' is no place of a class: module:Class was expected"),
        ("'a:b:c'", "'a:b:c' is no place of a class: module:Class was expected"),
        ("type('Plain', (), {'merge': lambda self, inputs: None})",
         "Plain is not a dataclass: a frozen dataclass was expected, its fields are the options"),
    ],
)  # fmt: skip
def test_what_is_no_frozen_dataclass(tmp_path, target, expected):
    assert told(tmp_path, FITS["strategies"], target=target) == f"strategy 'odd': {expected}"


def test_a_class_given_by_its_place_is_told_when_it_is_used(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "odd_module.py").write_text(PLUGIN.replace("KIND", "tuners").replace("BODY", ""))
    monkeypatch.syspath_prepend(tmp_path / "there")
    assert told(tmp_path, target="'odd_module:Odd'") is None
    with pytest.raises(UserError) as caught:
        load_plugins(tmp_path).find("strategies", "odd").resolve()
    assert str(caught.value) == f"plugin mine: strategy 'odd': Odd has no merge: {MERGE}"


def test_builtins_fit_and_every_kind_has_a_contract():
    registry = load_plugins()
    for entries in registry.entries.values():
        for entry in entries.values():
            entry.resolve()  # raises for one that does not fit
    assert set(contracts.PROTOCOLS) == set(KINDS)


RESIDUAL = (Path(__file__).parent.parent / "adapters" / "plug" / "text_residual.py").read_text()


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("def check(", "def checked(", "TextResidual has no check: check(backbone: Backbone) -> None was expected"),
        ("about = About", "about_it = About", "TextResidual has no about: about: About was expected"),
        ('about = About("a text residual", "residuals", makes_texts=True, lr=1.0, weight_decay=0.0)', "about = 'a residual'",
         "TextResidual.about is 'a residual': about: About was expected"),
        ("def text_features(", "def texts(", "TextResidual has no text_features: "
         "text_features(backbone: Backbone, classes: Classes) -> Tensor was expected"),
        ("def save(self, path, *, backbone)", "def save(self, path)", "TextResidual.save(self, path) cannot be called so: "
         "save(path: Path, *, backbone: str) -> None was expected"),
        ("def networks(self, backbone, classes, *, training)", "def networks(self, backbone, classes)",
         "TextResidual.networks(self, backbone, classes) cannot be called so: "
         "networks(backbone: Backbone, classes: Sequence[Classes], *, training: bool) -> Sequence[Network[Self]] was expected"),
        ("    @classmethod\n    def load(cls,", "    def load(self,", "TextResidual.load is a method of instances: the class method "
         "load(path: Path, *, device: str = cpu) -> Self was expected"),
        ("    chosen = {}", "    chosen = {}\n\n    @classmethod\n    def recognises(cls): ...", "TextResidual.recognises(cls) cannot be called so: "
         "recognises(names: Collection[str]) -> bool was expected"),
        ("@dataclass(frozen=True, eq=False)\n", "", "TextResidual is not a dataclass: a frozen dataclass was expected, its fields are what it holds"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit(tmp_path, old, new, expected):
    assert old in RESIDUAL
    (tmp_path / "mine.py").write_text(RESIDUAL.replace(old, new, 1))
    registry = load_plugins(tmp_path)
    assert registry.failures == {"mine": f"adapter 'text_residual': {expected}"}
    assert "text_residual" not in registry.entries["adapters"] and "task_res" not in registry.entries["tuners"]


def test_an_adapter_that_fits(tmp_path):
    (tmp_path / "mine.py").write_text(RESIDUAL)
    assert load_plugins(tmp_path).failures == {}
