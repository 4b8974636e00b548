"""Linear heads: where they start, what they answer, and what tuning makes of them; numbers worked by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mergekit_vl.adapters.linear_head import LinearHead, class_means, zero_shot
from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.backbones.micro import Micro
from mergekit_vl.datasets.base import Split
from mergekit_vl.errors import UserError
from mergekit_vl.models.inputs import MergeInputs, TaskData
from mergekit_vl.models.model import Classes, Single
from mergekit_vl.tuners.linear_probe import GRID, LinearProbe, lbfgs

AB = Classes(("a", "b"))


class Fixed:
    """An image source and a feature store in one: a row's features are looked up, nothing is encoded."""

    key = "fixed"

    def __init__(self, table):
        self.table, self.asked = table, []

    def features(self, path, split):
        self.asked.append(split)
        return self.table[torch.from_numpy(split.rows)]

    def views(self, path, split, *, epochs, seed, augment):
        return self.features(path, split).expand(epochs, -1, -1)


def split(source, rows, labels):
    return Split(source, np.array(rows), np.array(labels))


@pytest.fixture(scope="module")
def micro():
    return Micro().build("cpu")


@pytest.fixture
def task(micro):
    """Two classes of the micro CLIP whose features scatter about two points; six images to tune on, four to validate, and a test split nobody may ask for."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(2, 128, generator=draw)
    labels = np.array([0, 1] * 6)
    store = Fixed(centres[labels] + 2 * torch.randn(12, 128, generator=draw))
    data = TaskData(
        Classes(("dog", "car")), split(store, range(6), labels[:6]), split(store, range(6, 10), labels[6:10])
    )
    return MergeInputs(Single(micro, ZeroShot()), (), (data,), store, seed=1)


def test_class_means_by_hand():
    """Means (1, 0) and (0, 2): logits t (x . mu - |mu|^2 / 2); of one image a class, t puts mean classes 5 nats apart: 10 / |mu_a - mu_b|^2 = 2."""
    head = class_means(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]), AB, normalise=False)
    assert head.weight.tolist() == [[2.0, 0.0], [0.0, 4.0]] and head.bias.tolist() == [-1.0, -4.0]
    with pytest.raises(UserError, match="no image of class 'b'"):
        class_means(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), AB, normalise=False)


def test_the_temperature_of_class_means_leaves_each_image_out():
    x = torch.tensor([[1.0, 0.2], [0.4, -0.3], [2.0, 0.5], [-1.0, 0.1], [0.6, 0.0], [-0.5, 0.4]])
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    head = class_means(x, y, AB, normalise=False)
    means = [x[y == k].mean(0) for k in (0, 1)]
    t = (head.weight[0] / means[0]).mean().item()

    def left_out(t):
        total = 0.0
        for i in range(6):
            others = [torch.stack([x[j] for j in range(6) if j != i and y[j] == k]).mean(0) for k in (0, 1)]
            logits = torch.stack([-t / 2 * (x[i] - mean).square().sum() for mean in others])
            total += F.cross_entropy(logits[None], y[i : i + 1]).item() / 6
        return total

    grid = torch.logspace(-2, 2, 400).tolist()
    assert t == pytest.approx(min(grid, key=left_out), rel=0.02)


def test_a_zero_shot_head_answers_as_zero_shot(micro):
    classes = Classes(("dog", "car", "apple"))
    features = {micro.key: torch.randn(5, 128, generator=torch.Generator().manual_seed(0))}
    ours = zero_shot(micro, classes).bind(micro, classes)(features)
    torch.testing.assert_close(ours, Single(micro, ZeroShot()).bind(classes)(features))


def test_rows_go_by_class_name(micro):
    head = zero_shot(micro, Classes(("dog", "car", "apple")))
    assert head.bind(micro, Classes(("apple", "dog"))).weight.equal(head.weight[[2, 0]])
    with pytest.raises(UserError, match="knows no class 'swan'"):
        head.bind(micro, Classes(("dog", "swan")))
    open_ = replace(head, weight=2 * head.weight, unseen="zero_shot").bind(micro, Classes(("dog", "swan")))
    swan = zero_shot(micro, Classes(("swan",)))
    torch.testing.assert_close(open_.weight, torch.cat([2 * head.weight[:1], swan.weight]))


def test_heads_that_do_not_fit(micro):
    positional = LinearHead(torch.zeros(2, 128), torch.zeros(2), (), True)
    assert positional.bind(micro, Classes(("x", "y"))).weight.shape == (2, 128)
    with pytest.raises(UserError, match="a head of 2 classes for a data set of 3"):
        positional.bind(micro, Classes(("x", "y", "z")))
    with pytest.raises(UserError, match="features of width 64, micro gives 128"):
        LinearHead(torch.zeros(2, 64), torch.zeros(2), ("x", "y"), True).bind(micro, Classes(("x", "y")))


def test_a_head_as_a_file(micro, tmp_path):
    start = zero_shot(micro, Classes(("dog", "car")))
    head = replace(start, weight=start.weight + 1, start=start, unseen="zero_shot", chosen={"l2": 0.1})
    head.save(tmp_path / "head.safetensors", backbone="micro")
    again = LinearHead.load(tmp_path / "head.safetensors")
    assert again.weight.equal(head.weight) and again.start.weight.equal(start.weight)
    assert (again.names, again.unseen, again.normalise, again.chosen) == (
        ("dog", "car"),
        "zero_shot",
        True,
        {"l2": 0.1},
    )
    assert again.untuned(micro).weight.equal(start.weight)


def test_lbfgs_reaches_the_optimum():
    """The gradient of the penalised cross-entropy, written out, is zero there."""
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 4, generator=draw).double(), torch.randint(0, 3, (30,), generator=draw)
    w0 = torch.randn(3, 4, generator=draw).double()
    w = lbfgs(w0, w0, x, y, 0.1)
    p = (x @ w.T).softmax(-1)
    gradient = (p - F.one_hot(y, 3)).T @ x / 30 + 0.1 * x.square().sum(1).mean() * (w - w0)
    assert gradient.abs().max() < 1e-6


def test_sgd_comes_near_lbfgs(task):
    exact, near = (LinearProbe(solver=s, l2=0.1, epochs=300, batch=6).tune(task).adapter for s in ("lbfgs", "sgd"))
    assert (near.weight - exact.weight).norm() < 0.02 * (exact.weight - exact.start.weight).norm()


def test_validation_chooses_the_penalty_and_test_is_never_read(task):
    head = LinearProbe().tune(task).adapter
    data, accuracies = task.data[0], {}
    for l2 in GRID:
        one = LinearProbe(l2=l2).tune(task).adapter
        logits = F.normalize(task.features.table[6:10], dim=-1) @ one.weight.T + one.bias
        accuracies[l2] = (logits.argmax(-1) == torch.from_numpy(data.val.labels)).double().mean().item()
    assert head.chosen["l2"] == max(GRID, key=lambda l2: (accuracies[l2], l2))
    assert {id(s) for s in task.features.asked} == {id(data.train), id(data.val)}


def test_starts(task, micro):
    random = LinearProbe(init="random", l2=1e9).tune(task).adapter  # held at its start
    assert 0.005 < random.weight.std() < 0.02 and random.bias.abs().max() < 1e-3
    with pytest.raises(UserError, match="init=own: micro came with no classifier"):
        LinearProbe(init="own").tune(task)
