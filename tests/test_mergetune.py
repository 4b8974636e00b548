"""MergeTune's objective against a literal float64 transcription that shares no code with the product."""

import math
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.backbones import micro
from mergekit_vl.backbones.micro import Micro
from mergekit_vl.data import Split
from mergekit_vl.features import FeatureStore
from mergekit_vl.model import Classes, Single
from mergekit_vl.strategies import mergetune
from mergekit_vl.strategies.mergetune import MergeTune
from mergekit_vl.strategy import MergeInputs, TaskData

ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def literal_ce(scale, text, images, labels):
    """Mean over images of -log softmax(scale * cos)[label], in plain Python floats."""
    total = 0.0
    for x, y in zip(images, labels):
        logits = [scale * dot(x, t) / math.sqrt(dot(x, x) * dot(t, t)) for t in text]
        top = max(logits)
        total += math.log(sum(math.exp(v - top) for v in logits)) + top - logits[y]
    return total / len(images)


def literal_objective(scale, w, w1, w2, images, labels, lam, beta, surrogate):
    path = 0.0
    for a in ALPHAS:
        point = [[u2 + a * (u - u2) for u, u2 in zip(r, r2)] for r, r2 in zip(w, w2)]
        path += literal_ce(scale, point, images, labels) / len(ALPHAS)
    if surrogate == "cosine":
        s = sum(1 - dot(r, r1) / math.sqrt(dot(r, r) * dot(r1, r1)) for r, r1 in zip(w, w1)) / len(w)
    else:
        s = sum(sum((u - v) ** 2 for u, v in zip(r, r1)) for r, r1 in zip(w, w1)) / len(w)
    return literal_ce(scale, w, images, labels) + beta * path + lam * s


@pytest.fixture
def points():
    draw = random.Random(5)
    matrix = lambda rows, cols: [[draw.gauss(0, 1) for _ in range(cols)] for _ in range(rows)]  # noqa: E731
    images = matrix(6, 5)
    images = [[v / math.sqrt(dot(x, x)) for v in x] for x in images]
    return {"w": matrix(3, 5), "w1": matrix(3, 5), "w2": matrix(3, 5), "images": images, "labels": [0, 2, 1, 1, 0, 2]}


def product_objective(points, w, lam, beta, surrogate):
    """The product's three terms, put together as `MergeTune.merge` does (which `test_the_loss_of_a_step` checks as a whole)."""
    t = {k: torch.tensor(v, dtype=torch.float64) for k, v in points.items() if k != "labels"}
    labels = torch.tensor(points["labels"])
    scale = torch.tensor(7.0, dtype=torch.float64)
    path = mergetune.interpolate(w, t["w2"], torch.tensor(ALPHAS, dtype=torch.float64))
    return (
        mergetune.cross_entropy(scale, w, t["images"], labels)
        + beta * mergetune.cross_entropy(scale, path, t["images"], labels)
        + lam * mergetune.distance(w, t["w1"], surrogate, mean_rows=True)
    )


@pytest.mark.parametrize("surrogate", ["cosine", "l2"])
def test_objective_and_gradient_match_the_formula(points, surrogate):
    w = torch.tensor(points["w"], dtype=torch.float64, requires_grad=True)
    ours = product_objective(points, w, 8.0, 0.5, surrogate)
    ours.backward()

    def literal(matrix):
        return literal_objective(
            7.0, matrix, points["w1"], points["w2"], points["images"], points["labels"], 8.0, 0.5, surrogate
        )

    assert ours.item() == pytest.approx(literal(points["w"]), abs=1e-9)
    step = 1e-6
    for i in range(3):
        for j in range(5):
            up, down = ([list(r) for r in points["w"]] for _ in range(2))
            up[i][j] += step
            down[i][j] -= step
            assert w.grad[i, j].item() == pytest.approx((literal(up) - literal(down)) / (2 * step), abs=1e-6)


@dataclass
class Recorded:
    values: list = field(default_factory=list)
    arguments: list = field(default_factory=list)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A three-class task on the micro CLIP whose images are drawn at random."""

    class Noise:
        key = "noise"
        pictures = np.random.default_rng(0).integers(0, 255, (9, 48, 48, 3), dtype=np.uint8)

        def __len__(self):
            return 9

        def load(self, index):
            from PIL import Image

            return Image.fromarray(self.pictures[index])

    backbone = Micro().build("cpu")
    split = Split(Noise(), np.arange(9), np.arange(9) % 3)
    classes = Classes(("dog", "car", "apple"))
    base = Single(backbone, ZeroShot())
    tuned = Single(backbone, Prompt(backbone.embed("a sketch of a"), "a photo of a"))
    store = FeatureStore(tmp_path_factory.mktemp("cache"))
    return MergeInputs(base, (tuned,), (TaskData(classes, split),), store, seed=3)


@pytest.mark.parametrize("surrogate", ["cosine", "l2"])
@pytest.mark.parametrize("path", ["features", "weights"])
def test_the_loss_of_a_step(task, monkeypatch, surrogate, path):
    """The very loss that training sees in its first step, for each cell of the table: every term, weight and anchor counts."""
    seen = Recorded()

    def spy(backbone, start, inputs, schedule, augment, loss, *, what):
        text = start.text_features(backbone, inputs.data[0].classes)
        images = torch.nn.functional.normalize(torch.arange(1.0, 4 * 128 + 1).view(4, 128).sin(), dim=-1)
        seen.arguments.append((start.ctx, text, images))
        seen.values.append(loss(text, start.ctx, images, torch.tensor([0, 1, 2, 1])))
        return start

    monkeypatch.setattr(mergetune, "fit_context", spy)
    MergeTune(lambda_=3.0, beta=0.7, tau=0.25, surrogate=surrogate, path=path).merge(task)
    (ctx, text, images), ours = seen.arguments[0], seen.values[0].item()

    model = task.base.backbone.model
    words = {
        phrase: model.token_embedding(micro.tokenizer()([phrase]))[0, 1:5]
        for phrase in ("a photo of a", "a sketch of a")
    }
    ctx1, ctx2 = words["a photo of a"], words["a sketch of a"]
    torch.testing.assert_close(ctx, 0.75 * ctx1 + 0.25 * ctx2)

    names = [f"{name}." for name in task.data[0].classes.names]
    encode = lambda phrase: model.encode_text(micro.tokenizer()([f"{phrase} {name}" for name in names])).tolist()  # noqa: E731
    text1, text2 = encode("a photo of a"), encode("a sketch of a")
    scale, rows, labels = model.logit_scale.exp().item(), images.tolist(), [0, 1, 2, 1]
    w = text.tolist()
    if path == "features":
        expected = literal_objective(scale, w, text1, text2, rows, labels, 3.0, 0.7, surrogate)
    else:
        expected = literal_ce(scale, w, rows, labels)
        for a in ALPHAS:
            with torch.no_grad():
                point = Prompt(ctx2 + a * (ctx - ctx2)).text_features(task.base.backbone, task.data[0].classes).tolist()
            expected += 0.7 * literal_ce(scale, point, rows, labels) / len(ALPHAS)
        c, c1 = ctx.tolist(), ctx1.tolist()
        if surrogate == "cosine":
            expected += 3.0 * sum(1 - dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) for a, b in zip(c, c1)) / 4
        else:
            expected += 3.0 * sum((x - y) ** 2 for a, b in zip(c, c1) for x, y in zip(a, b))
    assert ours == pytest.approx(expected, rel=2e-5)


def test_a_step_has_one_text_forward_and_no_image_forward(task, monkeypatch):
    """Three epochs of three steps: nine text forwards beside the anchors' two; the nine images' views are encoded once, then never."""
    strategy = MergeTune(epochs=3, batch=3)
    strategy.merge(task)
    backbone = task.base.backbone
    calls = {"text": 0, "image": 0}

    def counted(kind, inner):
        def call(*args, **kwargs):
            calls[kind] += 1
            return inner(*args, **kwargs)

        return call

    monkeypatch.setattr(backbone.model.transformer, "forward", counted("text", backbone.model.transformer.forward))
    monkeypatch.setattr(backbone.model.visual, "forward", counted("image", backbone.model.visual.forward))
    strategy.merge(task)
    assert calls == {"text": 9 + 2, "image": 0}


def test_endpoints_of_tau(task, monkeypatch):
    monkeypatch.setattr(mergetune, "fit_context", lambda backbone, start, *args, **kwargs: start)
    backbone = task.base.backbone
    assert torch.equal(MergeTune(tau=0.0).merge(task).adapter.ctx, backbone.embed("a photo of a"))
    assert torch.equal(MergeTune(tau=1.0).merge(task).adapter.ctx, task.tuned[0].adapter.ctx)


def test_inputs_are_unchanged_and_the_seed_decides(task):
    before = task.tuned[0].adapter.ctx.clone()
    first, second = (MergeTune(epochs=2, batch=4, alphas=(), n_alpha=2).merge(task).adapter.ctx for _ in range(2))
    assert torch.equal(task.tuned[0].adapter.ctx, before)
    assert torch.equal(first, second)
    assert not torch.equal(first, before)


def test_a_strong_pull_ends_at_zero_shot(task):
    pulled = MergeTune(lambda_=2000.0, beta=0.0, tau=1.0, epochs=40, batch=9, lr=2e-5).merge(task)
    free = MergeTune(lambda_=0.0, beta=0.0, tau=1.0, epochs=40, batch=9, lr=2e-5).merge(task)
    classes = task.data[0].classes
    zero = task.base.text_features(classes)
    cosine = [
        torch.nn.functional.cosine_similarity(m.text_features(classes), zero).mean().item() for m in (pulled, free)
    ]
    assert cosine[0] > cosine[1] + 0.01
