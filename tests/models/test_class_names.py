"""Linear heads are merged by class name: by hand, in every order, with classes that only some models have."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_fisher_regmean import towers  # noqa: F401

from mergekit_vl.adapters.linear_head import LinearHead, by_class_name
from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.adapters.tower import HEAD, Tower
from mergekit_vl.errors import UserError
from mergekit_vl.models.inputs import MergeInputs, TaskData
from mergekit_vl.models.model import Classes, Single
from mergekit_vl.strategies.adamerging import AdaMerging
from mergekit_vl.strategies.fisher import Fisher
from mergekit_vl.strategies.regmean import RegMean
from mergekit_vl.strategies.task_arithmetic import TaskArithmetic
from mergekit_vl.strategies.ties import Ties
from mergekit_vl.strategies.uniform_soup import UniformSoup
from mergekit_vl.strategies.wise_ft import WiseFT

WORDS = SimpleNamespace(key="words", device="cpu", spec="words", width=None, text=None)


def head(rows, start=0.0):
    """Rows {class: (weight, bias)} of one feature."""
    names, weights, biases = tuple(rows), [[w] for w, _ in rows.values()], [b for _, b in rows.values()]
    begin = LinearHead(torch.full((len(rows), 1), start), torch.zeros(len(rows)), names, False)
    return Single(WORDS, replace(begin, weight=torch.tensor(weights), bias=torch.tensor(biases), start=begin))


def inputs(*models):
    return MergeInputs(models[0], models, (), None)


def rows(model):
    adapter = model.adapter
    return {n: (w, b) for n, (w,), b in zip(adapter.names, adapter.weight.tolist(), adapter.bias.tolist())}


def test_the_same_classes_in_another_order():
    one = head({"a": (1.0, 0.0), "b": (2.0, 1.0), "c": (3.0, 2.0)})
    other = head({"c": (5.0, 4.0), "a": (3.0, 2.0), "b": (0.0, 1.0)})
    assert rows(UniformSoup().merge(inputs(one, other))) == {"a": (2.0, 1.0), "b": (1.0, 1.0), "c": (4.0, 3.0)}
    assert rows(UniformSoup().merge(inputs(other, one))) == {"c": (4.0, 3.0), "a": (2.0, 1.0), "b": (1.0, 1.0)}
    assert one.adapter.names == ("a", "b", "c") and other.adapter.names == ("c", "a", "b")
    # the merged one answers by name
    logits = UniformSoup().merge(inputs(one, other)).bind(Classes(("c", "a")))({"words": torch.ones(1, 1)})
    assert logits.tolist() == [[7.0, 3.0]]


def test_classes_that_only_some_models_have_are_theirs_alone():
    one = head({"a": (1.0, 0.0), "b": (2.0, 1.0)})
    other = head({"c": (5.0, 4.0), "b": (4.0, 3.0)}, start=1.0)
    third = head({"c": (7.0, 6.0)}, start=2.0)
    expected = {"a": (1.0, 0.0), "b": (3.0, 2.0), "c": (5.0, 4.0)}
    assert rows(UniformSoup().merge(inputs(one, other))) == expected
    # c is 5, 7 and, where it lacks, 6; a is 1 throughout; b is 2, 4 and 3
    assert rows(UniformSoup().merge(inputs(one, other, third))) == {"a": (1.0, 0.0), "b": (3.0, 2.0), "c": (6.0, 5.0)}
    # starts alike: a from 0, b from 0 (the first one's own), c from 1
    assert rows(TaskArithmetic(1.0).merge(inputs(one, other)))["c"] == (1 + 2 * (5 - 1.0), 8.0)
    assert rows(WiseFT(0.0).merge(inputs(other)))["c"] == (1.0, 0.0)


def test_equal_orders_are_not_touched():
    one, other = head({"a": (1.0, 0.0)}), head({"a": (3.0, 0.0)})
    heads = [one.adapter, other.adapter]
    assert all(new is old for new, old in zip(by_class_name(heads), heads))
    unnamed = [replace(h, names=()) for h in heads]
    assert by_class_name([heads[0], unnamed[1]])[1] is unnamed[1]


@pytest.mark.parametrize("strategy", [Fisher(images=5), RegMean(images=5), AdaMerging(steps=2), Ties()])
def test_towers_with_heads_in_another_order_merge_as_those_in_one(towers, strategy):  # noqa: F811
    """The second model's rows, swapped with their names, change nothing; and the merge has the first one's order."""
    second = towers.tuned[1].adapter
    other = second.head

    def turn(head):
        return replace(head, weight=head.weight.flip(0), bias=head.bias.flip(0), names=head.names[::-1])

    turned = Tower(second.weights, replace(turn(other), start=turn(other.start)))
    swapped = replace(towers, tuned=(towers.tuned[0], Single(towers.tuned[1].backbone, turned)))
    expected, found = strategy.merge(towers).adapter, strategy.merge(swapped).adapter
    assert found.head.names == ("a", "b")
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor)


def test_towers_of_different_classes(towers):  # noqa: F811
    """Each task is asked for its own classes: an image's entropy is over two of the three rows."""
    second = towers.tuned[1].adapter
    names = ("b", "c")
    renamed = replace(second.head, names=names, start=replace(second.head.start, names=names))
    first, data = towers.tuned[0], towers.data
    of_others = replace(
        towers,
        tuned=(first, Single(first.backbone, replace(second, head=renamed))),
        data=(data[0], TaskData(Classes(names), data[1].train)),
    )
    for strategy in (UniformSoup(), Ties(), Fisher(images=5), RegMean(images=5), AdaMerging(steps=2)):
        merged = strategy.merge(of_others)
        assert merged.adapter.head.names == ("a", "b", "c") and merged.adapter.head.start.names == ("a", "b", "c")
        assert merged.adapter.tensors[HEAD + "weight"].shape == (3, 5)
    soup = UniformSoup().merge(of_others).adapter.head
    ours, theirs = first.adapter.head, second.head
    torch.testing.assert_close(soup.weight, torch.stack([ours.weight[0], (ours.weight[1] + theirs.weight[0]) / 2, theirs.weight[1]]))  # fmt: skip


def test_what_is_refused():
    one, other = head({"a": (1.0, 0.0), "b": (2.0, 0.0)}), head({"b": (1.0, 0.0), "a": (2.0, 0.0)})
    normalised = Single(WORDS, replace(other.adapter, normalise=True))
    with pytest.raises(UserError, match="one linear head reads normalised features, another one raw ones"):
        UniformSoup().merge(inputs(one, normalised))
    twice = Single(WORDS, replace(other.adapter, names=("b", "b")))
    with pytest.raises(UserError, match="a linear head has two classes 'b'"):
        UniformSoup().merge(inputs(one, twice))
    startless = Single(WORDS, replace(other.adapter, start=None))
    with pytest.raises(UserError, match="nothing tells the head that this one was tuned from"):
        UniformSoup().merge(inputs(one, startless))
    unnamed = Single(WORDS, replace(head({"a": (1.0, 0.0)}).adapter, names=()))
    with pytest.raises(UserError, match=r"bias: \(2,\) against \(1,\)"):
        UniformSoup().merge(inputs(one, unnamed))
    words = SimpleNamespace(embed=lambda text: torch.zeros(1, 2))
    prompts = [Single(words, Prompt(torch.ones(2, 1, 2), "a", names)) for names in (("x", "y"), ("y", "x"))]
    with pytest.raises(UserError, match="class-specific prompts of different classes, or of another order"):
        UniformSoup().merge(MergeInputs(prompts[0], tuple(prompts), (), None))
