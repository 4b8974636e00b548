"""Linear probing against an independent solution, its choices and starts; heads without names, of other widths, of one class."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from noise import NAMES, inputs, split

from mergekit_vl.adapters.linear_head import LinearHead, class_means, zero_shot
from mergekit_vl.backbones.backbone import Classifier
from mergekit_vl.backbones.micro import Micro
from mergekit_vl.errors import UserError
from mergekit_vl.models.model import Classes, Single
from mergekit_vl.registry.plugins import load_plugins
from mergekit_vl.storage.tuned import load_tuned, with_start
from mergekit_vl.tuners import linear_probe
from mergekit_vl.tuners.head import start_head
from mergekit_vl.tuners.linear_probe import LinearProbe


@pytest.fixture(scope="module")
def micro():
    return Micro().build("cpu")


def test_features_are_normalised_before_they_are_averaged():
    head = class_means(
        torch.tensor([[5.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]), Classes(("a", "b")), normalise=True
    )
    # (1, 0) and (0, 1) at squared distance 2: t = 5
    assert head.weight.tolist() == [[5.0, 0.0], [0.0, 5.0]] and head.bias.tolist() == [-2.5, -2.5]


def test_a_class_without_images_is_named_and_one_class_alone_has_a_head():
    with pytest.raises(UserError, match="no image of class 'b'"):
        class_means(torch.ones(2, 3), torch.tensor([0, 0]), Classes(("a", "b")), normalise=False)
    head = class_means(torch.eye(3), torch.zeros(3, dtype=torch.long), Classes(("a",)), normalise=False)
    assert head.weight.isfinite().all() and head.bias.isfinite().all()


HEAD = LinearHead(torch.arange(384.0).reshape(3, 128), torch.tensor([1.0, 2.0, 3.0]), NAMES, True)


def test_a_head_without_names_takes_the_classes_in_their_order(micro):
    nameless = replace(HEAD, names=())
    assert torch.equal(nameless.bind(micro, Classes(("x", "y", "z"))).weight, HEAD.weight)
    with pytest.raises(UserError, match="a head of 3 classes for a data set of 2"):
        nameless.bind(micro, Classes(("x", "y")))
    given = inputs(micro, split(3))
    told = with_start(Single(micro, nameless), given).adapter
    assert told.names == NAMES and torch.equal(told.start.weight, zero_shot(micro, Classes(NAMES)).weight)
    with pytest.raises(UserError, match="head has 3 classes of width 128, the data set needs 2 of width 128"):
        with_start(Single(micro, nameless), inputs(micro, split(3), names=("x", "y")))


def test_another_width_and_an_unknown_start_are_told(micro, tmp_path):
    narrow = replace(HEAD, weight=torch.ones(3, 7))
    with pytest.raises(UserError, match="features of width 7, micro gives 128"):
        narrow.bind(micro, Classes(NAMES))
    narrow.save(tmp_path / "narrow.safetensors", backbone="micro")
    with pytest.raises(UserError, match="features of width 7, micro gives 128"):
        load_tuned(tmp_path / "narrow.safetensors", micro, load_plugins())
    with pytest.raises(UserError, match="nothing tells the head that this one was tuned from"):
        HEAD.untuned(micro)


def newton(x, y, w0, l2):
    """argmin of mean CE + l2 / 2 * mean |x|^2 * |w - w0|^2 by Newton's method with the whole Hessian, in numpy."""
    n, d = x.shape
    k = len(w0)
    penalty = l2 * (x**2).sum(1).mean()
    w = w0.copy()
    for _ in range(50):
        z = x @ w.T
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = (p - np.eye(k)[y]).T @ x / n + penalty * (w - w0)
        hessian = penalty * np.eye(k * d)
        for i in range(n):
            hessian += np.kron(np.diag(p[i]) - np.outer(p[i], p[i]), np.outer(x[i], x[i])) / n
        w = w - np.linalg.solve(hessian, gradient.ravel()).reshape(k, d)
    return w


class Four:
    """A backbone whose features are given: width 4, no text tower."""

    text, device, key, spec, width = None, "cpu", "four", "four", 4

    def __init__(self, classifier=None):
        self.classifier = classifier
        self.require_text = Micro.build  # never to be called here


def four(n=12, *, scale=1.0, val=None, classifier=None):
    """Inputs whose feature store knows everything by the length of the split, and a record of the splits it gave."""
    draw = torch.Generator().manual_seed(1)
    labels = np.arange(n) % 3
    features = {n: scale * (torch.randn(n, 4, generator=draw) + torch.eye(3, 4)[labels])}
    backbone = Four(classifier)
    train = SimpleNamespace(labels=labels, __len__=lambda: n)
    store = SimpleNamespace(features=lambda path, split: features[len(split.labels)])
    given = inputs(backbone, train, base=SimpleNamespace(backbone=backbone))
    return replace(given, features=store), features[n].double().numpy(), labels


def whole(head):
    return torch.cat([head.weight, head.bias[:, None]], 1).double().numpy()


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_lbfgs_finds_the_optimum(scale):
    given, x, y = four(scale=scale)
    head = LinearProbe(init="class_mean", l2=0.03).tune(given).adapter
    x = np.concatenate([x, np.ones((12, 1))], 1)
    expected = newton(x, y, whole(head.start), 0.03)
    np.testing.assert_allclose(whole(head), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert np.abs(whole(head) - whole(head.start)).max() > 1e-3 * np.abs(expected).max()  # it has moved
    p = np.exp(x @ whole(head).T)
    p /= p.sum(1, keepdims=True)
    unit = (x**2).sum(1).mean()
    gradient = (p - np.eye(3)[y]).T @ x / 12 + 0.03 * unit * (whole(head) - whole(head.start))
    assert np.abs(gradient).max() < 2e-6 * unit


def test_a_strong_pull_stays_at_the_start_and_none_leaves_it():
    given, _, _ = four()
    strong, weak = (LinearProbe(init="class_mean", l2=l2).tune(given).adapter for l2 in (1e6, 1e-3))
    np.testing.assert_allclose(whole(strong), whole(strong.start), atol=1e-5)
    assert np.abs(whole(weak) - whole(weak.start)).max() > 0.1


def test_without_validation_images_the_pull_is_a_hundredth():
    given, _, _ = four()
    default, told = (LinearProbe(init="random", l2=l2).tune(given).adapter for l2 in (None, 0.01))
    assert np.array_equal(whole(default), whole(told)) and default.chosen == {}


@pytest.mark.parametrize(
    ("accuracies", "chosen"),
    [((0.5, 0.6, 0.9, 0.9, 0.7, 0.6, 0.6), 1e-2), ((0.4,) * 7, 1.0), ((0.0,) * 6 + (0.1,), 1e-6)],
)
def test_validation_chooses_the_pull_and_the_stronger_one_of_two_alike(monkeypatch, accuracies, chosen):
    given, _, _ = four()
    val = split(3)
    given = replace(given, data=(replace(given.data[0], val=val),))
    scores, seen = iter(accuracies), []

    def evaluate(model, classes, split, store):
        assert split is val
        seen.append(whole(model.adapter))
        return SimpleNamespace(acc1=next(scores)), 0.0, None

    monkeypatch.setattr(linear_probe, "evaluate", evaluate)
    head = LinearProbe(init="random").tune(given).adapter
    assert head.chosen == {"l2": chosen}
    assert np.array_equal(whole(head), seen[linear_probe.GRID.index(chosen)])


def test_where_heads_start(micro):
    classifier = Classifier(torch.arange(12.0).reshape(3, 4), torch.tensor([0.0, 1.0, 2.0]))
    given, _, _ = four(classifier=classifier)
    own = start_head(given.base.backbone, given, "own")
    assert torch.equal(own.weight, classifier.weight) and torch.equal(own.bias, classifier.bias) and not own.normalise
    assert own.names == NAMES and own.start is not None
    random = start_head(given.base.backbone, given, "random")
    assert 0.003 < random.weight.std() < 0.03 and random.bias.tolist() == [0.0, 0.0, 0.0]
    other = start_head(given.base.backbone, replace(given, seed=4), "random")
    assert not torch.equal(random.weight, other.weight)
    with pytest.raises(UserError, match="init=own: four came with no classifier, the data set has 3"):
        start_head(Four(), given, "own")
    with pytest.raises(UserError, match="init=own: four came with one of 2 classes, the data set has 3"):
        start_head(Four(Classifier(torch.ones(2, 4), torch.ones(2))), given, "own")
    images = inputs(micro, split(3))
    assert torch.equal(start_head(micro, images, None).weight, zero_shot(micro, Classes(NAMES)).weight)
    with pytest.raises(UserError, match="has no text tower"):
        start_head(replace(micro, text=None), images, "zero_shot")
    with pytest.raises(UserError, match="has no text tower"):
        start_head(replace(micro, text=None), images, "random", "zero_shot")


def test_augmented_views_are_trained_on(micro):
    given = inputs(micro, split(6))
    plain, augmented = (LinearProbe(l2=0.01, views=views).tune(given).adapter for views in (0, 2))
    assert given.data[0].train.source.read == 2 * 6 + 6
    assert not torch.equal(plain.weight, augmented.weight)


@pytest.mark.parametrize("option", [{"l2": -1.0}, {"views": -1}])
def test_options_that_make_no_sense(option):
    with pytest.raises(UserError, match=r"-1.*\(0 or more\)"):
        LinearProbe(**option)
