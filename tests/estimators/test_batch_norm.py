"""BatchNorm's running statistics of merged towers: by hand, for every strategy, and where they stay what they were."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from noise import NAMES, Noise
from test_tower_training import norm  # noqa: F401
from torch import nn

from mergekit_vl.adapters.linear_head import LinearHead
from mergekit_vl.adapters.tower import Tower
from mergekit_vl.backbones.backbone import Backbone
from mergekit_vl.datasets.base import Split
from mergekit_vl.errors import Failed, UserError
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.models.inputs import MergeInputs, TaskData
from mergekit_vl.models.model import Classes, ImageEncoder, Single
from mergekit_vl.models.views import eval_view
from mergekit_vl.recipes import recipe
from mergekit_vl.strategies.fisher import Fisher
from mergekit_vl.strategies.regmean import RegMean
from mergekit_vl.strategies.task_arithmetic import TaskArithmetic
from mergekit_vl.strategies.ties import Ties
from mergekit_vl.strategies.uniform_soup import UniformSoup
from mergekit_vl.strategies.wise_ft import WiseFT

CLASSES = Classes(NAMES)
STATISTICS = ("running_mean", "running_var")


def task(n, seed=0, side=32):
    return TaskData(CLASSES, Split(Noise(n, side=side, seed=seed), np.arange(n), np.arange(n) % 3))


def tuned(backbone, seed):
    draw = torch.Generator().manual_seed(seed)
    own = backbone.image_weights()
    weights = {
        n: t + 0.02 * torch.rand(t.shape, generator=draw) if t.is_floating_point() else t for n, t in own.items()
    }
    zeros = LinearHead(torch.zeros(3, backbone.width), torch.zeros(3), NAMES, False)
    head = replace(zeros, weight=torch.randn(3, backbone.width, generator=draw), start=zeros)
    return Single(backbone, Tower(weights, head))


@pytest.fixture
def given(norm):  # noqa: F811
    models = tuple(tuned(norm, seed) for seed in (1, 2))
    return MergeInputs(models[0], models, (task(5), task(6, seed=1)), FeatureStore(None), seed=1)


def views(inputs, path):
    tasks = inputs.data
    return torch.stack([eval_view(t.train.source.load(int(row)), path) for t in tasks for row in t.train.rows])


@pytest.mark.parametrize(
    "strategy",
    [UniformSoup(), TaskArithmetic(), Ties(), Fisher(images=2), RegMean(images=2)],
    ids=lambda s: type(s).__name__,
)
def test_every_strategy_gives_the_statistics_of_its_own_activations(given, strategy):
    """One block: in training mode, with the whole block's own statistics, the tower answers as it does in evaluation mode."""
    model = strategy.merge(given)
    plain = strategy.merge(replace(given, batch_norm="mean"))
    for name, tensor in plain.adapter.tensors.items():
        assert torch.equal(tensor, model.adapter.tensors[name]) != name.endswith(STATISTICS), name
    images = views(given, model.encoders[0])
    image = (
        model.adapter.on(model.backbone).with_weights({n: t.clone() for n, t in model.adapter.weights.items()}).image
    )
    with torch.no_grad():
        evaluated, trained = image(images), image.train()(images)
    # the variance that is kept is the unbiased one, that of training is not: at 11 images nearly the same
    assert torch.corrcoef(torch.stack([evaluated.flatten(), trained.flatten()]))[0, 1] > 0.99


class Net(nn.Module):
    """Channel means, normalised."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, images):
        return self.bn(images.mean((2, 3)))


class Image(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images)


def test_the_statistics_by_hand_are_those_of_blocks_of_every_kind():
    """Five images, at most three at once: two blocks of every second image, so that both hold both tasks."""
    preprocess = {"image_size": 4, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    backbone = Backbone(Image(Net()), None, preprocess, "tiny", width=3, block=3)
    inputs = MergeInputs(None, (), (task(2, side=4), task(3, seed=1, side=4)), FeatureStore(None))
    from mergekit_vl.estimators.batch_norm import estimated

    weights = backbone.image_weights()
    found = estimated(Single(backbone, Tower(weights)), inputs).adapter.weights
    x = views(inputs, ImageEncoder(backbone)).mean((2, 3))  # [5, 3]
    blocks = x[0::2], x[1::2]  # two blocks: 0, 2, 4 and 1, 3
    torch.testing.assert_close(found["bn.running_mean"], sum(b.mean(0) for b in blocks) / 2)
    torch.testing.assert_close(found["bn.running_var"], sum(b.var(0) for b in blocks) / 2)
    assert found["bn.num_batches_tracked"].item() == 0  # integers are not merged
    assert weights["bn.running_mean"].tolist() == [0, 0, 0] and backbone.image.model.bn.running_var.tolist() == [
        1,
        1,
        1,
    ]


def test_it_repeats_reads_no_labels_and_changes_nothing_else(given):
    kept = [{n: t.clone() for n, t in m.adapter.tensors.items()} for m in given.tuned]
    own = given.base.backbone.image_weights()
    first = UniformSoup().merge(given).adapter.tensors
    shuffled = tuple(replace(t, train=replace(t.train, labels=t.train.labels[::-1].copy())) for t in given.data)
    again = UniformSoup().merge(replace(given, data=shuffled, seed=9)).adapter.tensors
    assert all(torch.equal(t, again[n]) for n, t in first.items())
    assert all(torch.equal(m.adapter.tensors[n], t) for m, k in zip(given.tuned, kept) for n, t in k.items())
    assert all(torch.equal(t, own[n]) for n, t in given.base.backbone.image_weights().items())


def test_the_models_that_are_merged_keep_their_own(given):
    """Both ends of WiSE-FT's line, and a merge of equal models."""
    one = replace(given, tuned=given.tuned[:1], data=given.data[:1])
    end = given.tuned[0].adapter
    for strategy, inputs, expected in (
        (WiseFT(1.0), one, end),
        (WiseFT(0.0), one, end.untuned(given.base.backbone)),
        (UniformSoup(), replace(given, tuned=given.tuned[:1] * 2), end),
    ):
        merged = strategy.merge(inputs).adapter.tensors
        assert all(torch.equal(t, merged[n]) for n, t in expected.tensors.items())
    plain = UniformSoup().merge(replace(given, data=()))  # no images: the mean
    name = next(n for n in plain.adapter.tensors if n.endswith("running_var"))
    mean = (given.tuned[0].adapter.tensors[name] + given.tuned[1].adapter.tensors[name]) / 2
    torch.testing.assert_close(plain.adapter.tensors[name], mean)


def test_activations_that_overflow_are_told(given):
    name = "model.bn1.weight" if "model.bn1.weight" in given.tuned[0].adapter.weights else "bn1.weight"
    huge = {n: torch.full_like(t, 3e38) if n == name else t for n, t in given.tuned[0].adapter.weights.items()}
    wild = replace(given.tuned[0].adapter, weights=huge)
    inputs = replace(given, tuned=(Single(given.base.backbone, wild), given.tuned[1]))
    with pytest.raises(Failed, match="the merged model's activations are not finite at .*running"):
        UniformSoup().merge(inputs)


def test_the_recipe_says_where_they_come_from():
    plain = {"dataset": {"name": "folder"}, "strategy": [{"name": "ties", "batch_norm": "mean"}, {"name": "linear"}]}
    strategies = recipe.parse(plain, name="r", where="r").strategies
    assert [s.batch_norm for s in strategies] == ["mean", "images"] and dict(strategies[0].options) == {}
    plain["strategy"][0]["batch_norm"] = "none"
    with pytest.raises(UserError, match="strategy.0 ties: batch_norm='none' .images or mean"):
        recipe.parse(plain, name="r", where="r")
