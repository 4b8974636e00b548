"""Forms: what is told of data that does not fit, by its place."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import pytest
from annotated_types import MinLen

from mergekit_vl.errors import UserError
from mergekit_vl.recipes.forms import AsText, Form, Keys, Listed, Told, read
from mergekit_vl.recipes.recipe import parse


class Pet(Form):
    name: str
    age: int = 1


class Zoo(Form):
    pets: Annotated[list[Pet], Listed, MinLen(1)]
    label: AsText | None = None
    open: bool = True

    TOLD: ClassVar[Mapping[str, Told]] = {
        "pets": Told("{key} is empty", "name one"),
        "pets.*": Told("{place} needs a name", "write {place}: {{name: cat}}"),
        "pets.*.age": Told("age={value}", "a whole number", within=True),
        "open": Told("{key}={value}", "true or false"),
    }
    KEYS: ClassVar[Mapping[str, Keys]] = {"": Keys(("pets", "label", "open"), missing={"pets": "pets: {name: ...}"})}


def test_what_fits_is_read_and_text_is_made_of_numbers():
    zoo = read(Zoo, {"pets": {"name": "cat"}, "label": 3}, where="zoo.yaml")
    assert zoo == Zoo(pets=[Pet(name="cat")], label="3") and zoo.open


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "zoo.yaml: 'pets' is missing (add pets: {name: ...})"),
        ({"pets": [], "opne": 1}, "zoo.yaml: unknown key 'opne' (did you mean 'open'?)"),
        ({"pets": []}, "zoo.yaml: pets is empty (name one)"),
        ({"pets": 3}, "zoo.yaml: pets needs a name (write pets: {name: cat})"),
        ({"pets": [{"name": "cat"}, {}]}, "zoo.yaml: pets.1 needs a name (write pets.1: {name: cat})"),
        ({"pets": {"name": "cat", "age": True}}, "zoo.yaml: pets cat: age=True (a whole number)"),
        ({"pets": [{"name": "cat", "age": "2"}]}, "zoo.yaml: pets.0 cat: age='2' (a whole number)"),
        ({"pets": {"name": "cat"}, "open": "yes"}, "zoo.yaml: open='yes' (true or false)"),
    ],
)
def test_what_does_not_fit_is_told_with_its_place(given, told):
    with pytest.raises(UserError) as caught:
        read(Zoo, given, where="zoo.yaml")
    assert str(caught.value) == told


RECIPE = {"dataset": {"name": "folder"}, "strategy": {"name": "linear"}}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"datset": 1}, "r: unknown key 'datset' (did you mean 'dataset'?)"),
        ({"dataset": []}, "r: dataset is an empty list (name at least one)"),
        ({"dataset": "pets"}, "r: dataset needs a name (write dataset: {name: ...})"),
        ({"strategy": ["ties"]}, "r: strategy.0 needs a name (write strategy.0: {name: ...})"),
        ({"strategy": []}, "r: strategy is an empty list (name at least one)"),
        ({"tuned": "coop"}, "r: tuned is a list of models (write tuned: [{tuner: {name: coop}}])"),
        ({"tuned": [{"tuner": None}]}, "r: tuned.0 needs either a tuner or a checkpoint"),
        ({"tuned": [{"tuner": {}}]}, "r: tuned.0.tuner needs a name (write tuned.0.tuner: {name: ...})"),
        ({"tuned": [{"tuner": {"name": "coop"}, "label": "x"}]}, "r: tuned.0 needs either a tuner or a checkpoint"),
        ({"seed": True}, "r: seed=True (a whole number from 0 to 4294967295, or a list of them)"),
        ({"seed": [1, -1]}, "r: seed=[1, -1] (a whole number from 0 to 4294967295, or a list of them)"),
        ({"strategy": {"name": "linear", "grid": {"t": []}}}, "r: strategy linear: grid is a mapping of lists"),
        ({"strategy": [{"name": "linear", "batch_norm": "x"}]}, "r: strategy.0 linear: batch_norm='x' (images or mean)"),
        ({"backbone": {"arch": "x"}}, "r: backbone needs a name (write backbone: {name: ...})"),
        ({"strategy": {"name": "linear", "input": "copo"}}, "r: strategy linear: input: unknown tuned model or earlier strat"),
    ],
)  # fmt: skip
def test_faults_of_recipes(more, told):
    with pytest.raises(UserError) as caught:
        parse({**RECIPE, **more}, name="r", where="r")
    assert str(caught.value).startswith(told)


def test_all_may_stand_among_strategies_or_alone():
    made = parse({**RECIPE, "strategy": ["all", {"name": "linear", "label": 3, "input": "coop"}]}, name="r", where="r")
    (spec,) = made.strategies
    assert made.every and (spec.label, spec.input, spec.where) == ("3", "coop", "r: strategy.0 linear")
    assert parse({**RECIPE, "strategy": "all"}, name="r", where="r").strategies == ()
