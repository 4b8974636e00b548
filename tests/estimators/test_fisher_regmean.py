"""Averages weighted by what images tell: Fisher's by hand, RegMean's against least squares."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mergekit_vl.adapters import exact_fisher
from mergekit_vl.adapters.linear_head import LinearHead
from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.adapters.tower import Tower
from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.backbones.backbone import Backbone
from mergekit_vl.backbones.micro import Micro
from mergekit_vl.datasets.base import Split
from mergekit_vl.errors import UserError
from mergekit_vl.estimators import fisher_information, gram, surrogates
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.models.inputs import MergeInputs, TaskData
from mergekit_vl.models.model import Classes, Single
from mergekit_vl.reporter import SILENT
from mergekit_vl.strategies.fisher import Fisher
from mergekit_vl.strategies.regmean import RegMean

CLASSES = Classes(("a", "b"))
WORDS = SimpleNamespace(key="words", device="cpu", spec="words", width=None, text=None)


def head(weight, bias=(0.0, 0.0)):
    start = LinearHead(torch.zeros(2, len(weight[0])), torch.zeros(2), CLASSES.names, False)
    return Single(WORDS, replace(start, weight=torch.tensor(weight), bias=torch.tensor(bias), start=start))


def heads(models, features, **more):
    """Heads, each with the features of its own training images."""
    store = SimpleNamespace(features=lambda path, split: torch.tensor(split))
    data = tuple(TaskData(CLASSES, rows) for rows in features)
    return MergeInputs(models[0], tuple(models), data, store, **more)


def test_the_information_is_the_mean_of_squared_gradients():
    # two classes, logits (w x, 0): at w = 0 the gradient of log p is +-x / 2, whichever label is drawn
    x = torch.tensor([1.0, 2.0, 3.0])

    def log_p(weights, i):
        return torch.stack([weights["w"] * x[i], torch.zeros(())]).log_softmax(-1)

    fisher = fisher_information.by_sampling(log_p, {"w": torch.zeros(())}, 3, torch.Generator().manual_seed(0))
    assert fisher["w"].item() == pytest.approx((1 + 4 + 9) / 4 / 3)
    # of a head, with the mean over labels: p (1 - p) x^2, here 3/16 for both rows
    w = torch.tensor([[np.log(3.0)], [0.0]]).float()
    torch.testing.assert_close(exact_fisher.of_head(w, torch.ones(4, 1)), torch.full((2, 1), 3 / 16))
    assert surrogates.mean_one({"a": torch.tensor([1.0, 3.0])})["a"].tolist() == [0.5, 1.5]


def test_a_fisher_average_by_hand():
    thetas = [{"w": torch.tensor([1.0, 1.0]), "mean": torch.tensor([0.0])}]
    thetas.append({"w": torch.tensor([3.0, 5.0]), "mean": torch.tensor([4.0])})
    fishers = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 0.0])}]
    merged = Fisher().average(thetas, fishers, (1.0, 1.0))
    torch.testing.assert_close(merged["w"], torch.tensor([2.5, 3.0]))  # (1 + 9) / 4; nobody knows anything: the mean
    assert merged["mean"].item() == 2.0  # no information of it at all
    merged = Fisher().average(thetas, fishers, (3.0, 1.0))
    torch.testing.assert_close(merged["w"], torch.tensor([2.0, 2.0]))  # (3 + 9) / 6; (3 + 5) / 4
    merged = Fisher(normalise=True).average(thetas, fishers, (1.0, 1.0))
    torch.testing.assert_close(merged["w"], torch.tensor([2.0, 3.0]))
    # their mean is 2 and a quarter of it the least: 0.5 and 8 of the first element, 0.5 twice of the second
    given = [{"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([8.0, 0.0])}]
    merged = Fisher(floor=0.25).average(thetas, given, (1.0, 1.0))
    torch.testing.assert_close(merged["w"], torch.tensor([24.5 / 8.5, 3.0]))
    with pytest.raises(UserError, match="the Fisher information is zero or not finite"):
        Fisher().average(thetas, [{"w": torch.zeros(2)}] * 2, (1.0, 1.0))


def test_fisher_of_two_heads_by_hand():
    """Equal rows: p = 1/2 and F = x^2 / 4. Images of length 1 and 2: the second model's weights count four times as much."""
    models = [head([[1.0], [1.0]]), head([[3.0], [3.0]], (2.0, 2.0))]
    inputs = heads(models, [[[1.0]] * 2, [[2.0]] * 2])
    merged = Fisher().merge(inputs).adapter
    torch.testing.assert_close(merged.weight, torch.full((2, 1), (1 + 4 * 3) / 5))
    torch.testing.assert_close(merged.bias, torch.ones(2))
    # zero-shot, all zeros, has the mean of its information on both tasks: 2.5 / 4
    merged = Fisher(with_base=True).merge(inputs).adapter
    torch.testing.assert_close(merged.weight, torch.full((2, 1), (1 + 4 * 3) / 7.5))
    assert models[0].adapter.weight.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda i: Fisher().merge(replace(i, tuned=i.tuned[:1], data=i.data[:1])), "set with_base=true"),
        (lambda i: RegMean().merge(replace(i, tuned=i.tuned[:1], data=i.data[:1])), "one model alone"),
        (lambda i: Fisher(weights=(1.0,)).merge(i), "1 weights for 2 models"),
        (lambda i: Fisher(weights=(1.0, -1.0)).merge(i), "use weights >= 0"),
        (lambda i: Fisher(floor=0.0), "floor=0.0"),
        (lambda i: Fisher(images=0), "images=0"),
        (lambda i: RegMean(alpha=1.5), "alpha=1.5"),
        (lambda i: RegMean(images=0), "images=0"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make(heads([head([[1.0], [1.0]]), head([[3.0], [3.0]])], [[[1.0]], [[2.0]]]))


def test_regmean_refuses_prompts():
    words = SimpleNamespace(embed=lambda text: torch.zeros(1, 2))
    tuned = Single(words, Prompt(torch.ones(1, 2), "a"))
    with pytest.raises(UserError, match="strategy regmean: a prompt has no linear map"):
        RegMean().merge(MergeInputs(tuned, (tuned, tuned), (None, None), None))


def test_regmean_of_two_heads_is_the_least_squares_solution():
    draw = torch.Generator().manual_seed(0)
    xs = [torch.randn(20, 3, generator=draw) for _ in range(2)]
    models = [head(torch.randn(2, 3, generator=draw).tolist(), (float(i), 0.0)) for i in range(2)]
    inputs = heads(models, [x.tolist() for x in xs])
    merged = RegMean(alpha=1.0).merge(inputs).adapter
    targets = torch.cat([x @ m.adapter.weight.T for x, m in zip(xs, models)])
    expected = torch.linalg.lstsq(torch.cat(xs), targets).solution.T
    torch.testing.assert_close(merged.weight, expected, rtol=1e-4, atol=1e-5)
    assert merged.bias.tolist() == [0.5, 0.0]
    # alpha = 0: each input's weights by its mean square
    merged = RegMean(alpha=0.0).merge(inputs).adapter
    squares = [x.square().mean(0) for x in xs]
    expected = sum(s * m.adapter.weight for s, m in zip(squares, models)) / sum(squares)
    torch.testing.assert_close(merged.weight, expected, rtol=1e-4, atol=1e-5)


def test_regmean_keeps_the_mean_where_no_image_reaches():
    inputs = heads([head([[1.0, 1.0]] * 2), head([[3.0, 5.0]] * 2)], [[[1.0, 0.0]], [[2.0, 0.0]]])
    merged = RegMean().merge(inputs).adapter
    torch.testing.assert_close(merged.weight, torch.tensor([[(1 + 4 * 3) / 5, 3.0]] * 2), rtol=1e-4, atol=1e-5)


def test_regmean_counts_a_task_once_however_many_images_it_has():
    one = heads([head([[1.0]] * 2), head([[3.0]] * 2)], [[[1.0]], [[1.0]]])
    many = heads([head([[1.0]] * 2), head([[3.0]] * 2)], [[[1.0]], [[1.0]] * 9])
    assert torch.allclose(RegMean().merge(one).adapter.weight, RegMean().merge(many).adapter.weight)


class Net(nn.Module):
    """4 x 4 images: a patch embedding, attention over four tokens, a layer, a depthwise and a 1 x 1 convolution, a bare projection."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.Linear(8, 8, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = nn.Conv2d(8, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 6, 1)
        self.proj = nn.Parameter(torch.randn(6, 5))

    def forward(self, images):
        x = self.patches(images).flatten(2).mT  # [B, 4, 8]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.layer(x)
        x = self.point(self.wide(self.depthwise(x.mT.unflatten(2, (2, 2)))))
        return x.mean((2, 3)) @ self.proj


class Image(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images)


class Noise:
    def __init__(self, size, n, seed=0):
        self.key = f"noise {seed}"
        self.pictures = np.random.default_rng(seed).integers(0, 255, (n, size, size, 3), dtype=np.uint8)

    def __len__(self):
        return len(self.pictures)

    def load(self, index):
        from PIL import Image

        return Image.fromarray(self.pictures[index])


def task(size, n, seed, classes=CLASSES):
    return TaskData(classes, Split(Noise(size, n, seed), np.arange(n), np.arange(n) % len(classes.names)))


@pytest.fixture(scope="module")
def towers():
    """A tiny tower and two tuned versions of it, each with the images of another task and a linear head."""
    torch.manual_seed(0)
    preprocess = {"image_size": 4, "mean": (0.5,) * 3, "std": (0.3,) * 3}
    backbone = Backbone(Image(Net()), None, preprocess, "tiny", width=5)
    own = backbone.image_weights()
    zeros = LinearHead(torch.zeros(2, 5), torch.zeros(2), CLASSES.names, False)
    tuned = []
    for _ in range(2):
        weights = {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in own.items()}
        of = replace(zeros, weight=torch.randn(2, 5), bias=torch.randn(2), start=zeros)
        tuned.append(Single(backbone, Tower(weights, of)))
    return MergeInputs(tuned[0], tuple(tuned), (task(4, 40, 1), task(4, 50, 2)), FeatureStore(None), seed=1)


COVERED = (
    "patches.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "layer.weight",
    "point.weight",
    "proj",
)


def test_every_linear_map_of_a_tower_is_seen(towers):
    model = towers.tuned[0]
    found, features = gram.of_tower(model, towers.data[0].train, [3, 1, 2], SILENT)
    assert set(found) == set(COVERED)
    assert {name for name, gram in found.items() if gram.transposed} == {"proj"}
    net = model.adapter.on(model.backbone).image.model
    seen = {}
    for name in ("layer", "attention", "point"):
        net.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0]}))
    from mergekit_vl.models.views import eval_view

    source = towers.data[0].train.source
    images = torch.stack([eval_view(source.load(i), model.encoders[0]) for i in (3, 1, 2)])
    torch.testing.assert_close(features, net(images))
    layer = seen["layer"].reshape(-1, 8)
    torch.testing.assert_close(found["layer.weight"].sum, layer.T @ layer)
    assert found["layer.weight"].rows == 12 and found["proj"].rows == 3
    tokens = seen["attention"].reshape(-1, 8)
    torch.testing.assert_close(found["attention.in_proj_weight"].sum, tokens.T @ tokens)
    points = seen["point"].movedim(1, -1).reshape(-1, 8)
    torch.testing.assert_close(found["point.weight"].sum, points.T @ points)
    # a patch by hand: channel by channel, row by row, as the kernel is stored
    patch = torch.stack([image[:, r : r + 2, c : c + 2].flatten() for image in images for r in (0, 2) for c in (0, 2)])
    torch.testing.assert_close(found["patches.weight"].sum, patch.T @ patch)


def test_regmean_of_towers_solves_each_linear_map(towers):
    merged = RegMean(alpha=1.0).merge(towers).adapter
    first, second = (m.adapter for m in towers.tuned)
    measured = [
        gram.of_tower(m, d.train, list(range(len(d.train))), SILENT)[0] for m, d in zip(towers.tuned, towers.data)
    ]
    for name in COVERED:
        gs = [g[name].mean.double() for g in measured]
        ws = [w if name == "proj" else w.flatten(1).T for w in (first.weights[name], second.weights[name])]
        expected = torch.linalg.lstsq(sum(gs), sum(g @ w.double() for g, w in zip(gs, ws))).solution.float()
        ours = merged.weights[name] if name == "proj" else merged.weights[name].flatten(1).T
        # what the models' outputs on their images lose is the same: directions without images are free
        loss = [sum((((w - o).T.double() @ g) * (w - o).T).sum() for g, w in zip(gs, ws)) for o in (ours, expected)]
        assert loss[0] <= loss[1] * (1 + 1e-3) + 1e-6
        mean = sum(ws) / 2
        assert loss[0] < sum((((w - mean).T.double() @ g) * (w - mean).T).sum() for g, w in zip(gs, ws))
    for name in ("depthwise.weight", "wide.weight", "patches.bias", "attention.in_proj_bias"):
        torch.testing.assert_close(merged.weights[name], (first.weights[name] + second.weights[name]) / 2)
    assert not torch.allclose(merged.head.weight, (first.head.weight + second.head.weight) / 2)


def test_equal_towers_merge_into_themselves(towers):
    equal = replace(towers, tuned=(towers.tuned[0],) * 2)
    for strategy in (RegMean(), Fisher(images=4)):
        merged = strategy.merge(equal).adapter
        for name, tensor in towers.tuned[0].adapter.tensors.items():
            torch.testing.assert_close(merged.tensors[name], tensor)


def test_fisher_of_towers_lies_between_them_and_repeats(towers):
    first, second = (m.adapter.tensors for m in towers.tuned)
    merged, again = (Fisher(images=6).merge(towers).adapter.tensors for _ in range(2))
    moved = 0
    for name in first:
        assert torch.equal(merged[name], again[name])
        low, high = torch.minimum(first[name], second[name]), torch.maximum(first[name], second[name])
        assert bool(((low - 1e-6 <= merged[name]) & (merged[name] <= high + 1e-6)).all())
        moved += int(not torch.allclose(merged[name], (first[name] + second[name]) / 2))
    assert moved > len(first) // 2


def test_fisher_of_contexts(tmp_path):
    backbone = Micro().build("cpu")
    base, classes = Single(backbone, ZeroShot()), Classes(("dog", "car", "apple"))
    words = [backbone.embed(text) for text in ("a sketch of a", "a drawing of a")]
    tuned = tuple(Single(backbone, Prompt(ctx, "a photo of a")) for ctx in words)
    data = (task(48, 6, 3, classes), task(48, 6, 4, classes))
    inputs = MergeInputs(base, tuned, data, FeatureStore(tmp_path), seed=1)
    f = [fisher_information.of_model(m, d, inputs, 256)["ctx"] for m, d in zip(tuned, data)]
    merged = Fisher(floor=1e-12).merge(inputs).adapter.ctx
    torch.testing.assert_close(merged, (f[0] * words[0] + f[1] * words[1]) / (f[0] + f[1]), rtol=1e-3, atol=1e-4)


def test_the_micro_towers_linear_maps():
    """Its ConvNeXt has 1 x 1 convolutions for layers, and kernels as wide as their stride between stages."""
    backbone = Micro().build("cpu")
    tower = Single(backbone, Tower(backbone.image_weights()))
    found, _ = gram.of_tower(tower, task(48, 4, 1).train, [0, 1], SILENT)
    shapes = {name: t.shape for name, t in backbone.image_weights().items() if t.ndim in (2, 4)}
    depthwise = {name for name in shapes if "conv_dw" in name}
    assert set(found) == set(shapes) - depthwise and depthwise
