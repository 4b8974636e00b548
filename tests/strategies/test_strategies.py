"""Closed-form strategies and the evaluator, with numbers worked by hand."""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.datasets.base import Split, few_shot
from mergekit_vl.errors import UserError
from mergekit_vl.models.choices import Choice
from mergekit_vl.models.evaluate import score, wilson
from mergekit_vl.models.inputs import MergeInputs, TaskData
from mergekit_vl.models.model import Classes, Ensemble, Mixture, Single
from mergekit_vl.protocols.base_to_novel import METRIC
from mergekit_vl.reports.intervals import clustered, over_images
from mergekit_vl.strategies import greedy_soup
from mergekit_vl.strategies.ensemble import OutputEnsemble
from mergekit_vl.strategies.linear import Linear
from mergekit_vl.strategies.task_arithmetic import TaskArithmetic
from mergekit_vl.strategies.wise_ft import WiseFT


class Words:
    """A backbone whose only word has the embedding (1, 0)."""

    spec, device, token_width, key, scale, bias = "words", "cpu", 2, "words", torch.tensor(1.0), 0.0

    def embed(self, text):
        return torch.tensor([[1.0, 0.0]])


def inputs(*contexts):
    backbone = Words()
    base = Single(backbone, Prompt(torch.tensor([[1.0, 0.0]]), "a"))
    tuned = tuple(Single(backbone, Prompt(torch.tensor([c]), "a")) for c in contexts)
    return MergeInputs(base, tuned, (), None)


@pytest.mark.parametrize(
    ("strategy", "contexts", "expected"),
    [
        (Linear(), [(0.0, 1.0)], (0.5, 0.5)),
        (Linear(), [(0.0, 1.0), (2.0, 5.0)], (1.0, 2.0)),
        (Linear(weights=(1.0, 3.0)), [(0.0, 1.0)], (0.25, 0.75)),
        (Linear(weights=(1.0, 3.0), normalise=False), [(0.0, 1.0)], (1.0, 3.0)),
        (WiseFT(alpha=0.0), [(0.0, 1.0)], (1.0, 0.0)),
        (WiseFT(alpha=1.0), [(0.0, 1.0)], (0.0, 1.0)),
        (WiseFT(alpha=0.25), [(5.0, 4.0)], (2.0, 1.0)),
        (TaskArithmetic(scale=0.5), [(0.0, 1.0), (3.0, 2.0)], (1.5, 1.5)),
        (TaskArithmetic(scales=(1.0, -1.0)), [(0.0, 1.0), (3.0, 2.0)], (-2.0, -1.0)),
    ],
)
def test_closed_forms(strategy, contexts, expected):
    given = inputs(*contexts)
    merged = strategy.merge(given)
    torch.testing.assert_close(merged.adapter.ctx, torch.tensor([expected]))
    assert [tuple(m.adapter.ctx[0].tolist()) for m in given.tuned] == contexts  # the inputs are unchanged


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Linear(weights=(1.0, -1.0)), "the weights sum to zero"),
        (Linear(weights=(1.0,)), "1 weights for 2 models"),
        (OutputEnsemble(weights=(-1.0, 2.0)), "are not a mixture"),
        (TaskArithmetic(scales=(1.0, 1.0)), "2 scales for 1 tuned models"),
    ],
)
def test_weights_that_make_no_sense(strategy, message):
    with pytest.raises(UserError, match=message):
        strategy.merge(inputs((0.0, 1.0)))


def test_anchors_of_different_shape_are_named_with_both_shapes():
    given = inputs((0.0, 1.0))
    other = Single(given.base.backbone, Prompt(torch.zeros(1, 3), "a"))
    with pytest.raises(UserError, match=r"ctx: \(1, 2\) against \(1, 3\)"):
        Linear().merge(MergeInputs(given.base, (given.tuned[0], other), (), None))


def test_greedy_soup_takes_what_helps_on_validation_images(monkeypatch):
    # accuracies by the context's second number: 4 alone has .8; with 2 the mean 3 is no worse; with 0 the mean 2 is worse
    accuracy = {4.0: 0.8, 2.0: 0.7, 0.0: 0.6, 3.0: 0.8}
    read = []

    def evaluate(model, classes, split, features):
        read.append(split)
        acc1 = accuracy.get(model.adapter.ctx[0, 1].item(), 0.1)
        return SimpleNamespace(scores=SimpleNamespace(acc1=acc1, nll=0.0))

    monkeypatch.setattr("mergekit_vl.models.evaluate.evaluate", evaluate)
    task = TaskData(Classes(("a",)), "train", [1])
    given = replace(inputs((0.0, 0.0), (0.0, 4.0), (0.0, 2.0)), data=(task,) * 3)
    merged = greedy_soup.GreedySoup().merge(given)
    assert merged.adapter.ctx.tolist() == [[0.0, 3.0]] and set(map(tuple, read)) == {(1,)}
    assert merged.choice == Choice({"ingredients": ["tuned.1", "tuned.2"]})
    named = greedy_soup.GreedySoup().merge(replace(given, labels=("low", "best", "middle")))
    assert named.choice.values == {"ingredients": ["best", "middle"]} and named.choice.split == "val"
    with pytest.raises(UserError, match="there are no validation images"):
        greedy_soup.GreedySoup().merge(replace(given, data=(TaskData(Classes(("a",)), "train"),)))


@pytest.mark.parametrize(("everywhere", "best"), [("", 0.2), ("ab", 0.5), ("b", 0.8)])
def test_wise_ft_chooses_alpha_on_all_data_sets_that_its_model_is_tested_on(monkeypatch, everywhere, best):
    # accuracies 1 - (alpha - 0.2)^2 on a and 1 - (alpha - 0.8)^2 on b: their mean is highest halfway
    peak = {"a": 0.2, "b": 0.8}

    def evaluate(model, classes, split, features):
        alpha = model.adapter.ctx[0, 1].item()
        return SimpleNamespace(scores=SimpleNamespace(acc1=1 - (alpha - peak[split]) ** 2, nll=0.0))

    monkeypatch.setattr("mergekit_vl.models.evaluate.evaluate", evaluate)
    tasks = {name: TaskData(Classes(("x",)), "train", name) for name in "ab"}
    given = replace(inputs((0.0, 1.0)), data=(tasks["a"],), everywhere=tuple(tasks[name] for name in everywhere))
    merged = WiseFT(alpha="validation").merge(given)
    assert merged.choice == Choice({"alpha": best}) and merged.adapter.ctx[0, 1].item() == pytest.approx(best)
    with pytest.raises(UserError, match="there are no validation images"):
        WiseFT(alpha="validation").merge(replace(given, data=(), everywhere=()))


@dataclass
class Constant:
    """A model that gives the same probabilities to every image."""

    probabilities: tuple
    encoders, parameters, forwards = (), 0, 1

    def bind(self, classes):
        return lambda features: torch.tensor([self.probabilities]).log() + 3.0  # logits are free up to a constant


def test_ensemble_is_the_mean_of_probabilities():
    given = MergeInputs(Constant((0.8, 0.2)), (Constant((0.2, 0.8)),), (), None)
    out = OutputEnsemble(weights=(3.0, 1.0)).merge(given)
    assert isinstance(out, Ensemble) and out.forwards == 2
    torch.testing.assert_close(out.bind(Classes(("a", "b")))({}).exp(), torch.tensor([[0.65, 0.35]]))


def test_mixture_mixes_raw_text_features():
    @dataclass
    class Text:
        rows: tuple
        backbone, parameters = Words(), 0

        def text_features(self, classes):
            return torch.tensor(self.rows)

    mix = Mixture((Text(((4.0, 0.0),)), Text(((0.0, 3.0),))), (0.5, 1.0))
    head = mix.bind(Classes(("a",)))
    # the mixture is (2, 3); its cosine with (1, 0) is 2 / sqrt(13), the average of the two unit vectors would give 0.447
    assert head({"words": torch.tensor([[5.0, 0.0]])}).item() == pytest.approx(2 / math.sqrt(13))


def test_scores_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)], [math.log(3.0), 0.0], [0.0, 0.0]])
    scores = score(logits, torch.tensor([1, 0, 0, 1]))
    assert scores.n == 4 and scores.acc1 == 0.5 and scores.acc5 == 1.0
    assert scores.mean_per_class_recall == 0.5
    assert scores.nll == pytest.approx((2 * math.log(4 / 3) + math.log(4) + math.log(2)) / 4)
    # confidence .75 three times with 2 of 3 right, .5 once and wrong
    assert scores.ece == pytest.approx(0.75 * (0.75 - 2 / 3) + 0.25 * 0.5)
    assert (scores.low, scores.high) == pytest.approx((0.15003, 0.84996), abs=1e-4)
    assert wilson(0, 10)[0] == 0.0
    assert METRIC.score([0.6, 0.4]) == pytest.approx(0.48) and METRIC.score([0.0, 0.0]) == 0.0


def test_few_shots_are_the_fields_own():
    """`random.seed(1)` and `random.sample` class by class, as CoOp's code draws them."""
    split = Split(None, np.arange(20), np.repeat([0, 1], 10))
    import random

    random.seed(1)
    expected = random.sample(list(range(10)), 3) + random.sample(list(range(10, 20)), 3)
    assert few_shot(split, 3, 1, name="x").rows.tolist() == expected
    with pytest.raises(UserError, match="class 0 has 10 images, 11 shots"):
        few_shot(split, 11, 1, name="x")


def test_intervals_resample_tasks_not_seeds():
    # four tasks at 1 and one at 6: the mean of a draw is 1 + k, k of Binomial(5, 1/5), whose quantiles are 0 and 3
    tasks = [task for task in "abcde" for _ in range(2)]
    d = clustered([1.0] * 8 + [6.0] * 2, tasks)
    assert d.mean == 2.0 and (d.low, d.high) == (1.0, 4.0) and d.verdict == "above"
    assert clustered([-1.0] * 8 + [4.0] * 2, tasks).verdict == "not significant"


@pytest.mark.parametrize("tasks", [2, 4])
def test_across_fewer_than_five_tasks_there_is_no_interval(tasks):
    d = clustered([1.0] * tasks, list("abcd")[:tasks])
    assert (d.mean, d.low, d.high, d.verdict) == (1.0, None, None, "no interval")


def test_intervals_over_images_stay():
    right, wrong = np.ones(50, dtype=int), np.zeros(50, dtype=int)
    right[0] = 0
    d = over_images([[[right, right]], [[right, right]]], METRIC.score)
    assert d.mean == d.low == d.high == 0.0
    one = over_images([[[right, right]], [[wrong, right]]], METRIC.score)
    assert one.verdict == "above"
    two = over_images(
        [[[right, right]] * 2, [[wrong, right]] * 2], METRIC.score
    )  # a second seed of the same task narrows nothing
    assert two.high - two.low == pytest.approx(one.high - one.low, rel=0.2)


def test_templates_of_all_three_forms_and_their_average():
    class Lengths:
        """Texts as (number of letters, 1)."""

        def encode_texts(self, texts):
            return torch.tensor([[float(len(text)), 1.0] for text in texts])

    classes = Classes(("ox", "bird"), ("a {}", "the {c}.", lambda name: name.upper()))
    assert classes.texts() == [["a ox", "a bird"], ["the ox.", "the bird."], ["OX", "BIRD"]]
    unit = lambda n: torch.nn.functional.normalize(torch.tensor([float(n), 1.0]), dim=0)  # noqa: E731
    expected = torch.stack([(unit(4) + unit(7) + unit(2)) / 3, (unit(6) + unit(9) + unit(4)) / 3])
    torch.testing.assert_close(ZeroShot().text_features(Lengths(), classes), expected)
    with pytest.raises(UserError, match="template 'a photo' has no place for the class name"):
        Classes(("ox",), ("a photo",)).texts()
