"""Models that are another one for every task."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_merge import Words, call, elsewhere, three  # noqa: F401

from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.datasets.base import Split
from mergekit_vl.errors import UserError
from mergekit_vl.experiments import experiment
from mergekit_vl.models.by_task import ByTask
from mergekit_vl.models.evaluate import evaluate
from mergekit_vl.models.inputs import MergeInputs, TaskData
from mergekit_vl.models.model import Classes, Single, image_encoders
from mergekit_vl.recipes.recipe import parse
from mergekit_vl.registry.plugins import load_plugins
from mergekit_vl.strategies.emr import Emr
from mergekit_vl.strategies.tall_mask import TallMask

PETS, DIGITS = Classes(("cat", "dog", "hare")), Classes(("one", "two"), ("the digit {}",))
HOUSE_NUMBERS = Classes(DIGITS.names, ("the house number {}",))


@dataclasses.dataclass(frozen=True)
class Path_:
    key: str
    backbone = dataclasses.make_dataclass("Backbone", [("device", str, "cpu")])()


@dataclasses.dataclass(frozen=True)
class Member:
    """Says its own name; right where the label is 0."""

    name: str
    parameters = 3

    @property
    def encoders(self):
        return (Path_(self.name),)

    def bind(self, classes):
        return lambda features: torch.nn.functional.one_hot(0 * features[self.name].long(), len(classes.names))


MODEL = ByTask((Member("pets"), Member("digits"), Member("houses")), (PETS, DIGITS, HOUSE_NUMBERS))


@pytest.mark.parametrize(
    ("classes", "name"),
    [
        (PETS, "pets"),
        (
            Classes(("dog", "cat", "hare"), ("a sketch of a {}",)),
            "pets",
        ),  # the names in any order, whatever the template
        (Classes(("hare", "cat")), "pets"),  # some of one task's
        (DIGITS, "digits"),
        (HOUSE_NUMBERS, "houses"),  # the same names: by the templates
    ],
)
def test_class_names_choose_the_member(classes, name):
    assert MODEL.member(classes).name == name
    assert [path.key for path in image_encoders(MODEL, classes)] == [name]
    assert MODEL.encoders == tuple(map(Path_, ("pets", "digits", "houses")))
    assert (MODEL.parameters, MODEL.forwards) == (9, 1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("cat", "cow"),
            r"cat, cow are the classes of no task that was merged \(name those of one: cat, dog, hare; one, two; one, two\)",
        ),
        ((*PETS.names, *DIGITS.names), "cat, dog, hare and 2 more are the classes of no task that was merged"),
        (DIGITS.names, r"one, two are classes of 2 tasks \(name all classes of one task\)"),
    ],
)
def test_other_classes_are_refused(names, message):
    with pytest.raises(UserError, match=message):
        MODEL.bind(Classes(names))


def test_a_test_reads_the_features_of_its_member_alone():
    read = []

    class Store:
        def features(self, path, split):
            read.append(path.key)
            return torch.ones(len(split))

    split = Split(None, np.arange(4), np.array([0, 0, 0, 1]))
    scores = evaluate(MODEL, PETS, split, Store()).scores
    assert scores.acc1 == 0.75 and read == ["pets"]
    evaluate(MODEL, HOUSE_NUMBERS, split, Store())
    assert read == ["pets", "houses"]


@pytest.mark.parametrize("method", [Emr(), TallMask(lambda_=0.6)], ids=str)
def test_a_merge_of_all_tasks_is_that_of_each(method):
    base, *tuned = (torch.randn(4, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    models = [Single(Words(base), Prompt(ctx)) for ctx in (base, *tuned)]
    data = tuple(TaskData(classes, None) for classes in (PETS, DIGITS))
    inputs = MergeInputs(models[0], tuple(models[1:]), data, None)
    merged = method.merge(inputs)
    assert merged.tasks == (PETS, DIGITS)
    for i, (classes, label) in enumerate(((PETS, "tuned.0"), (DIGITS, "1"))):
        alone = [dataclasses.replace(method, task=task).merge(inputs) for task in (i, label)]
        assert all(torch.equal(merged.member(classes).adapter.ctx, one.adapter.ctx) for one in alone)
    assert not torch.equal(merged.members[0].adapter.ctx, merged.members[1].adapter.ctx)
    same = dataclasses.replace(inputs, data=(data[0], data[0]))
    with pytest.raises(UserError, match="the tasks 0 and 1 have the same classes and templates"):
        method.merge(same)


@pytest.mark.parametrize("strategy", ["emr", "tall_mask"])
def test_files_are_merged_for_a_task_or_with_a_warning(strategy, monkeypatch, capsys):
    three()
    words = ("merge", "A.safetensors", "B.safetensors", "--base", "ZS.safetensors", "--strategy", strategy, "-o")
    code, _, err = call(monkeypatch, capsys, *words, "all")
    assert code == 0 and f"warning: no task=LABEL: {strategy} writes" in err
    for task in ("B", "1"):
        code, _, err = call(monkeypatch, capsys, *words, task, f"task={task}")
        assert (code, err) == (0, "")
    each = [load_file(f"{folder}/model.safetensors")["visual.blocks.1.w"] for folder in ("all", "B", "1")]
    assert np.array_equal(each[1], each[2]) and not np.array_equal(each[0], each[1])
    assert call(monkeypatch, capsys, "verify", "B")[0] == 0
    code, _, err = call(monkeypatch, capsys, *words, "no", "task=2")
    assert code == 2 and f"strategy {strategy}: unknown task 2 (known: 0, 1, A, B)" in err and not Path("no").exists()


def build(**given):
    world = [{"name": "microworld", "task": task} for task in ("fantasy_mosaic", "sea_and_sky_blinds")]
    tuner = {"tuner": {"name": "full", "head": "text"}}
    plain = {"dataset": world, "protocol": {"name": "multi_task"}, "tuned": [tuner], "strategy": [{"name": "emr"}]}
    return experiment.build(parse(plain | given, name="small", where="small"), load_plugins())


def test_what_has_no_tasks_is_refused_before_anything_is_tuned():
    assert build().joint
    twice = [{"tuner": {"name": "full", "head": "text", "lr": lr, "label": f"lr {lr}"}} for lr in (1e-4, 1e-5)]
    for given in ({"protocol": {"name": "few_shot"}}, {"tuned": twice}):
        with pytest.raises(UserError, match="small: emr: makes a model for each task, of one tuned model each"):
            build(**given)
        assert build(**given, strategy=[{"name": "emr", "task": 0}]).strategies[0][1].task == 0
