"""Ensembles of outputs, of all images alike and image by image, with numbers worked by hand."""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.errors import UserError
from mergekit_vl.models.by_distance import ByDistance, kth_distance
from mergekit_vl.models.calibration import temperature
from mergekit_vl.models.choices import Choice
from mergekit_vl.models.inputs import MergeInputs, TaskData
from mergekit_vl.models.model import Classes, Ensemble, Single
from mergekit_vl.registry.plugins import load_plugins
from mergekit_vl.storage import model_files
from mergekit_vl.strategies.ensemble import OutputEnsemble, simplex
from mergekit_vl.strategies.vrf import Vrf

CLASSES = Classes(("a", "b"))


class Split:
    """Images whose features are the rows of a table."""

    def __init__(self, features, labels):
        self.table, self.labels = torch.tensor(features), np.array(labels)

    def __len__(self):
        return len(self.labels)


STORE = SimpleNamespace(features=lambda path, split: split.table)


@dataclass
class Reads:
    """A model whose logits for two classes are (x, 0), x a column of the features."""

    column: int
    parameters, forwards = 0, 1
    encoders = (SimpleNamespace(key="x", backbone=SimpleNamespace(device="cpu")),)

    def bind(self, classes):
        def head(features):
            x = features["x"][:, self.column]
            return torch.stack([x, torch.zeros_like(x)], 1)

        return head


def given(features, labels, **more):
    task = TaskData(CLASSES, None, Split(features, labels))
    return MergeInputs(Reads(0), (Reads(1),), (task,), STORE, **more)


def test_the_temperature_makes_the_confidence_the_accuracy():
    # logits +-x for two classes, three of four right: the likelihood is largest where sigmoid(x / T) = 3/4, T = x / log 3
    logits, labels = torch.tensor([[2.0, 0.0]]).repeat(4, 1), torch.tensor([0, 0, 0, 1])
    assert temperature(logits, labels) == pytest.approx(2 / math.log(3), rel=1e-6)
    assert temperature(logits, torch.zeros(4, dtype=torch.long)) == pytest.approx(0.1)  # all right: the bound


def test_logits_or_probabilities():
    inputs = given([[math.log(4.0), 0.0]], [0])
    log_p = OutputEnsemble(weights=(3.0, 1.0)).merge(inputs).bind(CLASSES)({"x": torch.tensor([[math.log(4.0), 0.0]])})
    torch.testing.assert_close(log_p.exp(), torch.tensor([[0.725, 0.275]]))  # .75 * .8 + .25 * .5
    logits = OutputEnsemble(weights=(3.0, 1.0), average="logits").merge(inputs)
    torch.testing.assert_close(
        logits.bind(CLASSES)({"x": torch.tensor([[math.log(4.0), 4.0]])}), torch.tensor([[0.75 * math.log(4.0) + 1, 0]])
    )


def test_calibrated_members_agree_whatever_their_scale():
    x = [[2.0, 20.0]] * 3 + [[2.0, 20.0]]
    out = OutputEnsemble(calibrated=True).merge(given(x, [0, 0, 0, 1]))
    assert out.temperatures == pytest.approx((2 / math.log(3), 20 / math.log(3)), rel=1e-6)
    assert out.weights == (0.5, 0.5) and set(out.choice.values) == {"temperatures"}  # equal weights are the recipe's
    torch.testing.assert_close(out.bind(CLASSES)({"x": torch.tensor(x[:1])}).exp(), torch.tensor([[0.75, 0.25]]))


def test_weights_chosen_on_validation_images():
    # zero-shot: +1 on both images, the second is wrong; tuned: -9 and +3, both wrong on the first. logits w + (1 - w) * tuned
    x, labels = [[1.0, 0.2], [1.0, -1.0]], [0, 1]
    out = OutputEnsemble(weights="validation", average="logits").merge(given(x, labels))

    # right on both images from w0 < .5; of those the likelihood decides between the grid's 0, .05, ... .45
    def nll(w):
        return math.log1p(math.exp(-(w + (1 - w) * 0.2))) + math.log1p(math.exp(w - (1 - w)))

    best = min((i / 20 for i in range(10)), key=nll)
    assert out.weights == pytest.approx((best, 1 - best))
    assert out.choice == Choice({"weights": list(out.weights)}) and out.choice.split == "val"


def test_the_grid_of_weights():
    assert list(simplex(2, 2)) == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    grid = list(simplex(3, 10))
    assert len(grid) == len(set(grid)) == 66 and all(sum(w) == pytest.approx(1) for w in grid)


def test_a_bench_tries_shares_of_zero_shot():
    """The tuned models share the rest."""
    tried = OutputEnsemble.grid(2)["weights"]
    assert tried[0] == pytest.approx((0.3, 0.35, 0.35)) and tried[3] == pytest.approx((0.9, 0.05, 0.05))


@pytest.mark.parametrize("weights", [(-1.0, 3.0), (0.0, 0.0), (-2.0, 1.0)])
def test_weights_that_are_no_mixture(weights):
    with pytest.raises(UserError, match="are not a mixture"):
        OutputEnsemble(weights=weights).merge(given([[1.0, 1.0]], [0]))


def test_what_cannot_be_chosen_is_refused():
    inputs = given([[1.0, 1.0]], [0])
    none = replace(inputs, data=(TaskData(CLASSES, None),))
    for strategy in (OutputEnsemble(calibrated=True), OutputEnsemble(weights="validation")):
        with pytest.raises(UserError, match="strategy ensemble: there are no validation images"):
            strategy.merge(none)
    two = replace(inputs, tuned=inputs.tuned * 2, data=(inputs.data[0], replace(inputs.data[0])))
    with pytest.raises(UserError, match="validation images of 2 tasks at once"):
        OutputEnsemble(calibrated=True).merge(two)
    with pytest.raises(UserError, match="weights of 5 models are not searched for"):
        OutputEnsemble(weights="validation").merge(replace(inputs, tuned=inputs.tuned * 4))
    with pytest.raises(UserError, match="nothing to ensemble zero-shot with"):
        OutputEnsemble().merge(replace(inputs, tuned=()))


def test_an_ensemble_comes_back_from_its_files(tmp_path):
    backbone = SimpleNamespace(device="cpu", spec="words")
    tuned = Single(backbone, Prompt(torch.tensor([[1.0, 2.0]]), "a"))
    ensemble = Ensemble((Single(backbone, ZeroShot()), tuned), (0.25, 0.75), "logits", (0.5, 2.0))
    model_files.save(ensemble, tmp_path, "e")
    back = model_files.load(tmp_path, "e", backbone, load_plugins().adapter)
    assert (back.weights, back.average_of, back.temperatures) == ((0.25, 0.75), "logits", (0.5, 2.0))
    assert torch.equal(back.members[1].adapter.ctx, tuned.adapter.ctx)


def test_the_distance_to_the_kth_nearest_of_a_set():
    near = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    x = torch.tensor([[5.0, 0.0], [0.0, -2.0]])  # features are normalised first
    torch.testing.assert_close(kth_distance(x, near, 1), torch.tensor([0.0, 2**0.5]))
    torch.testing.assert_close(kth_distance(x, near, 2), torch.tensor([2**0.5, 2**0.5]))
    torch.testing.assert_close(kth_distance(x, near, 3), torch.tensor([2.0, 2.0]))


def vrf_inputs(**more):
    # zero-shot reads the first column, tuned the second. Training images, all of class 0: both right, zero-shot alone, tuned alone
    train = Split([[1.0, 1.0], [2.0, -1.0], [-3.0, 4.0]], [0, 0, 0])
    val = Split([[-1.0, 2.0], [1.0, -1.0]], [0, 0])
    return MergeInputs(Reads(0), (Reads(1),), (TaskData(CLASSES, train, val),), STORE, **more)


def test_vrf_weighs_by_the_distance_to_the_failures_of_zero_shot():
    model = Vrf(a=0.5, b=0.25, calibrated=False).merge(vrf_inputs())
    torch.testing.assert_close(model.near, torch.tensor([[-0.6, 0.8]]))  # of (-3, 4): tuned is right, zero-shot is not
    assert model.k == 1 and model.forwards == 2
    # (-0.6, 0.8) itself: d = 0, w = sigmoid(2); (0.6, 0.8): d = 1.2, w = sigmoid(-2.8)
    x = torch.tensor([[-0.6, 0.8], [0.6, 0.8]])
    w = torch.sigmoid(torch.tensor([2.0, -2.8]))
    p = w * torch.sigmoid(x[:, 1]) + (1 - w) * torch.sigmoid(x[:, 0])
    torch.testing.assert_close(model.bind(CLASSES)({"x": x}).exp(), torch.stack([p, 1 - p], 1))
    hot = replace(model, temperatures=(2.0, 0.5))
    p = w * torch.sigmoid(x[:, 1] / 0.5) + (1 - w) * torch.sigmoid(x[:, 0] / 2)
    torch.testing.assert_close(hot.bind(CLASSES)({"x": x}).exp(), torch.stack([p, 1 - p], 1))


def test_vrf_chooses_on_validation_images():
    """Tuned is right on the image near the failures, zero-shot on the other: only a threshold between both gets both."""
    model = Vrf(calibrated=False).merge(vrf_inputs())
    x, labels = torch.tensor([[-1.0, 2.0], [1.0, -1.0]]), torch.tensor([0, 0])
    assert bool((model.bind(CLASSES)({"x": x}).argmax(-1) == labels).all())
    near, far = kth_distance(x, model.near, 1).tolist()
    tenths, widths = (
        (model.a - near) / (far - near) * 10,
        model.b / ((far - near) / 2),
    )  # the standard deviation of two values
    assert tenths == pytest.approx(round(tenths), abs=1e-5) and 0 < tenths < 10
    assert min(abs(widths - width) for width in (0.03, 0.1, 0.3, 1.0, 3.0)) < 1e-5
    assert Vrf().merge(vrf_inputs()).temperatures != (1.0, 1.0)


def test_vrf_where_zero_shot_never_fails_is_zero_shot():
    inputs = vrf_inputs()
    inputs = replace(inputs, tuned=(Reads(0),))
    assert Vrf().merge(inputs) is inputs.base


def test_what_vrf_refuses():
    inputs = vrf_inputs()
    with pytest.raises(UserError, match="one tuned model, not 2"):
        Vrf().merge(replace(inputs, tuned=inputs.tuned * 2))
    with pytest.raises(UserError, match="k=3, and zero-shot fails on 1 training images only"):
        Vrf(k=3).merge(inputs)
    with pytest.raises(UserError, match="there are no validation images"):
        Vrf().merge(replace(inputs, data=(replace(inputs.data[0], val=None),)))
    for options in ({"k": 0}, {"b": 0.0}):
        with pytest.raises(UserError, match="strategy vrf"):
            Vrf(**options)


def test_a_mixture_by_distance_comes_back_from_its_files(tmp_path):
    backbone = SimpleNamespace(device="cpu", spec="words")
    tuned = Single(backbone, Prompt(torch.tensor([[1.0, 2.0]]), "a"))
    model = ByDistance((Single(backbone, ZeroShot()), tuned), torch.tensor([[0.6, 0.8]]), 1, 0.5, 0.25, (1.0, 3.0))
    assert model_files.can_save(model)
    model_files.save(model, tmp_path, "v")
    back = model_files.load(tmp_path, "v", backbone, load_plugins().adapter)
    assert isinstance(back, ByDistance) and torch.equal(back.near, model.near)
    assert (back.k, back.a, back.b, back.temperatures) == (1, 0.5, 0.25, (1.0, 3.0))
