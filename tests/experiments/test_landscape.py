"""Lines, barriers and the plane: their points are the models that merging makes, their heights are worked by hand."""

import math

import numpy as np
import pytest
import torch
from noise import Noise

from mergekit_vl.adapters.linear_head import LinearHead
from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.backbones.micro import Micro
from mergekit_vl.datasets.base import Split
from mergekit_vl.experiments import landscape
from mergekit_vl.models.evaluate import evaluate
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.models.model import Classes, Mixture, Single
from mergekit_vl.reports.landscape_results import Barrier
from mergekit_vl.reports.results import LinePoint

NAMES = ("dog", "cat", "apple")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Zero-shot, a "tuned" and a "merged" prompt that are noise around it, and a test of 12 noise images."""
    backbone = Micro().build("cpu")
    store = FeatureStore(tmp_path_factory.mktemp("cache"))
    start = Prompt.start(backbone, init="a photo of a", n_context=4, seed=0)
    noise = torch.Generator().manual_seed(0)
    moved = lambda scale: start.with_tensors(  # noqa: E731
        {"ctx": start.ctx + scale * torch.randn(start.ctx.shape, generator=noise)}
    )
    models = {
        "zero-shot": Single(backbone, ZeroShot()),
        "tuned": Single(backbone, moved(0.05)),
        "merged": Single(backbone, moved(0.03)),
    }
    labels = np.arange(12) % 3
    tests = [("test", Classes(NAMES), Split(Noise(12, side=48, seed=3), np.arange(12), labels))]
    return models, tests, store


def at(points, space, segment, alpha):
    (point,) = [p for p in points if (p.space, p.segment, p.alpha) == (space, segment, alpha)]
    return point.tests["test"]


def measured(model, tests, store):
    _, classes, split = tests[0]
    scores = evaluate(model, classes, split, store).scores
    return {"acc1": pytest.approx(scores.acc1), "nll": pytest.approx(scores.nll, abs=1e-5)}


def test_points_are_the_models_that_merging_makes(world):
    models, tests, store = world
    found = landscape.landscapes(models["zero-shot"], models["tuned"], models["merged"], store)
    assert [each.space for each in found] == ["classifiers", "contexts"]
    points = [p for each in found for p in landscape.lines(each, tests, 5, landscape.SEGMENTS)]
    assert len(points) == 2 * 3 * 5
    for segment, start, end in (("zero-shot -> tuned", "zero-shot", "tuned"), ("merged -> tuned", "merged", "tuned")):
        mix = Mixture((models[start], models[end]), (0.75, 0.25))
        assert at(points, "classifiers", segment, 0.25) == measured(mix, tests, store)
    assert at(points, "classifiers", "zero-shot -> merged", 1.0) == measured(models["merged"], tests, store)
    tuned = models["tuned"]
    start = tuned.adapter.untuned(tuned.backbone)
    halfway = start.with_tensors({"ctx": (start.ctx + tuned.adapter.ctx) / 2})
    assert at(points, "contexts", "zero-shot -> tuned", 0.5) == measured(Single(tuned.backbone, halfway), tests, store)


def test_one_batch_or_many(world, monkeypatch):
    models, tests, store = world
    (between, _) = landscape.landscapes(models["zero-shot"], models["tuned"], None, store)
    whole = landscape.lines(between, tests, 5, landscape.SEGMENTS)
    monkeypatch.setattr(landscape, "CHUNK_SIZE", 2 * 12 * 3)  # two points at once
    apart = landscape.lines(between, tests, 5, landscape.SEGMENTS)
    assert [p.segment for p in whole] == ["zero-shot -> tuned"] * 5
    for one, other in zip(whole, apart, strict=True):
        assert one.tests["test"]["nll"] == pytest.approx(other.tests["test"]["nll"], abs=1e-6)


def test_logits_of_heads_are_combined(world):
    models, tests, store = world
    backbone = models["tuned"].backbone
    draw = torch.Generator().manual_seed(1)
    head = lambda start=None: LinearHead(  # noqa: E731
        torch.randn(3, backbone.width or 128, generator=draw), torch.randn(3, generator=draw), NAMES, True, start
    )
    start = head()
    tuned = Single(backbone, head(start))
    (between,) = landscape.landscapes(Single(backbone, ZeroShot()), tuned, None, store)
    assert between.space == "heads"
    points = landscape.lines(between, tests, 3, landscape.SEGMENTS)
    half = tuned.adapter.with_tensors({n: (t + start.tensors[n]) / 2 for n, t in tuned.adapter.tensors.items()})
    assert at(points, "heads", "zero-shot -> tuned", 0.5) == measured(Single(backbone, half), tests, store)


def test_the_plane_is_true_to_the_distances(world):
    models, tests, store = world
    (_, between) = landscape.landscapes(models["zero-shot"], models["tuned"], models["merged"], store)
    plane = landscape.plane(between, tests, 4)
    start = models["tuned"].adapter.untuned(models["tuned"].backbone).ctx.flatten()
    u, v = ((models[name].adapter.ctx.flatten() - start).double() for name in ("tuned", "merged"))
    x, y = plane.corners["merged"]
    assert math.hypot(x, y) == pytest.approx(float(v.norm() / u.norm()), rel=1e-5)
    assert x == pytest.approx(float(u @ v / u.norm() ** 2), rel=1e-4)
    assert plane.xs[0] < 0 and plane.xs[-1] > 1 and plane.ys[-1] > y
    # a point of the grid is the context at that place
    b = plane.ys[2] / y
    a = plane.xs[1] - x * b
    ctx = start + a * u + b * v
    point = models["tuned"].adapter.with_tensors({"ctx": ctx.float().reshape(4, -1)})
    found = plane.tests["test"]["nll"][1][2]
    assert found == measured(Single(models["tuned"].backbone, point), tests, store)["nll"]


def test_three_models_on_a_line_span_no_plane(world):
    models, tests, store = world
    tuned = models["tuned"]
    start = tuned.adapter.untuned(tuned.backbone)
    halfway = Single(tuned.backbone, start.with_tensors({"ctx": (start.ctx + tuned.adapter.ctx) / 2}))
    (_, between) = landscape.landscapes(models["zero-shot"], tuned, halfway, store)
    assert landscape.plane(between, tests, 4) is None
    (_, without) = landscape.landscapes(models["zero-shot"], tuned, None, store)
    assert landscape.plane(without, tests, 4) is None


def line(segment, *scores):
    n = len(scores) - 1
    return [
        LinePoint(segment, "towers", i / n, {"x": {"nll": nll, "acc1": acc1}}) for i, (nll, acc1) in enumerate(scores)
    ]


def test_barriers_by_hand():
    # straight line between the ends: 1, 1.25, 1.5, 1.75, 2; the loss is 0.75 above it in the middle, accuracy 0.3 below 0.7
    hill = line("a", (1, 0.8), (1.0, 0.75), (2.25, 0.4), (1.8, 0.6), (2, 0.6))
    valley = line("b", (1, 0.5), (0.2, 0.9), (1, 0.5))
    first, second = landscape.barriers(hill + valley)
    assert first == Barrier("towers", "a", {"x": {"nll": 0.75, "acc1": pytest.approx(0.3)}})
    assert second.tests["x"] == {"nll": 0.0, "acc1": 0.0}


def test_a_prompt_that_started_at_random_has_classifiers_only(world):
    models, _, store = world
    random = Prompt.start(models["tuned"].backbone, init=None, n_context=4, seed=0)
    found = landscape.landscapes(models["zero-shot"], Single(models["tuned"].backbone, random), None, store)
    assert [each.space for each in found] == ["classifiers"]
