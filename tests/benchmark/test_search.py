"""What bench tries of each strategy, and the selection tasks: never a test image."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from noise import Noise

from mergekit_vl.benchmark import search
from mergekit_vl.benchmark.search import Search, configurations
from mergekit_vl.datasets.base import Dataset, Split
from mergekit_vl.errors import UserError
from mergekit_vl.options import build, option
from mergekit_vl.protocols.base_to_novel import BaseToNovel
from mergekit_vl.protocols.few_shot import FewShot
from mergekit_vl.recipes.recipe import Spec, parse
from mergekit_vl.registry.plugins import load_plugins


@dataclass(frozen=True)
class Closed:
    a: int = option(0)
    b: str = option("x")

    grid = {"a": (0, 1, 2), "b": ("x", "y")}

    def __post_init__(self):
        if self.a == 2 and self.b == "y":
            raise UserError("not this one")


@dataclass(frozen=True)
class Trained(Closed):
    trains = True


def tried(cls, budget=8, training=4, grid=None, models=1, **given):
    spec = Spec("it", given, "here", "it", grid=grid)
    found = configurations(cls, spec, models, Search(budget, training))
    assert all(made == build(cls, options, where="here") for options, made in found)
    return [(made.a, made.b) for _, made in found]


def test_the_defaults_come_first_and_every_other_configuration_once():
    # (2, y) is refused by the class, (0, x) is the default itself
    assert tried(Closed) == [(0, "x"), (0, "y"), (1, "x"), (1, "y"), (2, "x")]
    assert tried(Closed, a=1) == [(1, "x"), (0, "x"), (0, "y"), (1, "y"), (2, "x")]


def test_a_large_grid_is_thinned_evenly_to_the_budget():
    assert tried(Closed, budget=3) == [(0, "x"), (0, "y"), (1, "y")]
    assert tried(Closed, budget=1) == [(0, "x")]
    assert tried(Trained) == tried(Closed, budget=4) and len(tried(Trained)) == 4


def test_the_recipes_grid_replaces_the_classs_and_its_mistakes_are_told():
    assert tried(Closed, grid={"a": [5]}) == [(0, "x"), (5, "x")] and tried(Closed, grid={}) == [(0, "x")]
    with pytest.raises(UserError, match="not this one"):
        tried(Closed, grid={"a": [2], "b": ["y"]})
    with pytest.raises(UserError, match="unknown key 'c'"):
        tried(Closed, grid={"c": [2]})


def test_a_grid_may_depend_on_the_number_of_models():
    class Ensemble(Closed):
        grid = staticmethod(lambda models: {"a": range(models)})

    assert tried(dataclass(frozen=True)(Ensemble), models=3) == [(0, "x"), (1, "x"), (2, "x")]


def test_every_built_in_grid_is_of_its_strategys_own_options():
    with_grid = 0
    for name, entry in load_plugins().entries["strategies"].items():
        cls = entry.resolve()
        spec = Spec(name, {}, name, name, grid=None)
        for models in (1, 3):
            found = configurations(cls, spec, models, Search(budget=100, training_budget=100))
        with_grid += len(found) > 1
    assert with_grid > 20


def test_no_strategy_has_an_option_that_a_recipe_would_read_as_its_own():
    import dataclasses

    for entry in load_plugins().entries["strategies"].values():
        names = {field.name for field in dataclasses.fields(entry.resolve())}
        assert not names & {"name", "label", "input", "grid", "batch_norm"}, entry.name


@pytest.mark.parametrize(
    "given, message",
    [
        ({"budget": 0}, "search: budget=0"),
        ({"by": "development"}, "by=development with 0 development datasets"),
        ({"development": [{"name": "microworld"}]}, "by=auto with 1 development datasets"),
        ({"by": "test"}, "by='test'"),
        ({"budgets": 3}, "unknown key 'budgets'"),
    ],
)
def test_a_wrong_search_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        build(Search, given, where="search")


# selection tasks

NAMES = tuple("abcdefgh")


def split(per_class, classes=range(8), seed=0):
    labels = np.repeat(np.array(list(classes)), per_class)
    return Split(Noise(len(labels), side=4, seed=seed), np.arange(len(labels)), labels)


def dataset(val=4):
    return Dataset("letters", NAMES, ("a photo of a {}.",), split(6), split(val, seed=1), split(9, seed=2))


def test_held_out_classes_come_from_the_tuned_ones_and_no_test_image_is_read():
    task = BaseToNovel(shots=5).task(dataset(), seed=1)  # base a to d
    chosen = search.by_held_out(task, seed=3)
    ((_, tuned_names, base), (_, held_names, novel)) = chosen.tests
    tuned, held = set(tuned_names.names), set(held_names.names)
    assert tuned | held == set("abcd") and not tuned & held and len(tuned) == 2
    assert chosen.data[0].classes.names == tuned_names.names and len(chosen.data[0].train) == 2 * 5
    assert len(base) == 2 * 4 and base.source is task.data[0].val.source  # validation images of what is tuned
    assert len(novel) == 2 * 5 and novel.source is task.data[0].train.source  # the held-out classes' own shots
    shown = task.data[0].classes.names
    own = {shown[label]: set() for label in task.data[0].train.labels}
    for row, label in zip(task.data[0].train.rows, task.data[0].train.labels):
        own[shown[label]].add(row)
    for row, label in zip(novel.rows, novel.labels):
        assert row in own[held_names.names[label]]
    assert {s.names for _, s, _ in search.by_held_out(task, seed=3).tests} == {tuned_names.names, held_names.names}
    others = {search.by_held_out(task, seed).tests[0][1].names for seed in range(8)}
    assert len(others) > 1  # redrawn by the seed


def test_validation_asks_the_same_models_for_their_validation_images():
    task = FewShot(shots=2).task(dataset(), seed=1)
    chosen = search.by_validation(task)
    ((_, classes, val),) = chosen.tests
    assert chosen.data is task.data and classes.names == NAMES and val is task.data[0].val
    assert chosen.metric.headline_of({"validation 0": 0.25}) == 0.25


def test_where_nothing_can_be_chosen():
    with pytest.raises(UserError, match="no validation images"):
        search.by_validation(FewShot(shots=None).task(dataset(val=0), seed=1))
    with pytest.raises(UserError, match="classes can be held out of base_to_novel alone"):
        search.by_held_out(FewShot(shots=2).task(dataset(), seed=1), seed=1)
    few = Dataset("few", NAMES[:6], ("{}",), split(6, range(6)), split(4, range(6)), split(4, range(6)))
    with pytest.raises(UserError, match="3 classes are too few"):
        search.by_held_out(BaseToNovel(shots=2).task(few, seed=1), seed=1)


def test_accuracy_decides_and_then_the_likelihood():
    def row(score, nll):
        return SimpleNamespace(score=score, tests={"x": SimpleNamespace(nll=nll), "y": SimpleNamespace(nll=0.0)})

    assert search.quality([row(0.5, 2.0), row(0.7, 4.0)]) == (pytest.approx(0.6), -1.5)
    assert search.quality([row(0.5, 1.0)]) > search.quality([row(0.5, 2.0)]) > search.quality([row(0.4, 0.0)])


def test_the_recipes_forms():
    plain = {
        "dataset": {"name": "microworld"},
        "strategy": [{"name": "ties", "grid": {"density": [0.1]}, "scale": 0.5}],
    }
    spec = parse(plain, name="it", where="it").strategies[0]
    assert spec.options == {"scale": 0.5} and spec.grid == {"density": [0.1]}
    for grid in ([0.1], {"density": 0.1}, {"density": []}):
        with pytest.raises(UserError, match="grid is a mapping of lists"):
            parse({**plain, "strategy": [{"name": "ties", "grid": grid}]}, name="it", where="it")
    with pytest.raises(UserError, match="search is a mapping"):
        parse({**plain, "search": 3}, name="it", where="it")
