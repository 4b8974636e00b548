"""Coefficients learnt by least entropy: gradients by hand, toys whose best coefficients are known, what is read and what is not."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from noise import Noise
from recording import Recording
from test_fisher_regmean import heads, towers  # noqa: F401
from test_tower_training import norm  # noqa: F401

from mergekit_vl.adapters.linear_head import LinearHead
from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.adapters.tower import Tower
from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.backbones.micro import Micro
from mergekit_vl.datasets.base import Split
from mergekit_vl.errors import Failed, UserError
from mergekit_vl.estimators import fisher_information
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.models.inputs import MergeInputs, TaskData
from mergekit_vl.models.model import Classes, Single
from mergekit_vl.strategies import adamerging
from mergekit_vl.strategies.adamerging import AdaMerging, combine, entropy
from mergekit_vl.strategies.task_arithmetic import TaskArithmetic
from mergekit_vl.strategies.ties import Ties

CLASSES = Classes(("a", "b"))
WORDS = SimpleNamespace(key="words", device="cpu", spec="words", width=None, text=None)


def head(weight, start):
    zero = LinearHead(torch.tensor(start), torch.zeros(2), CLASSES.names, False)
    return Single(WORDS, replace(zero, weight=torch.tensor(weight), start=zero))


def told(model):
    return list(model.adapter.chosen.values())


def same(one, other):
    assert one.adapter.tensors.keys() == other.adapter.tensors.keys()
    assert all(torch.equal(tensor, other.adapter.tensors[name]) for name, tensor in one.adapter.tensors.items())
    return True


def test_the_entropy_and_its_gradient():
    # of two classes, logits (z, 0): dH/dz = -z p (1 - p); at z = ln 3, p = 3/4
    z = torch.tensor([0.0, np.log(3.0)], dtype=torch.float64, requires_grad=True)
    found = entropy(torch.stack([z, torch.zeros_like(z)], 1))
    assert found.tolist() == pytest.approx([np.log(2), 2 * np.log(2) - 0.75 * np.log(3)])
    found.sum().backward()
    assert z.grad.tolist() == pytest.approx([0.0, -3 / 16 * np.log(3)])
    assert entropy(torch.tensor([[1e4, 0.0]])).item() == 0  # certain, and no NaN


def test_tensors_have_coefficients_of_their_own():
    base = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
    vectors = [
        {"a": torch.tensor([1.0]), "b": torch.tensor([10.0])},
        {"a": torch.tensor([2.0]), "b": torch.tensor([20.0])},
    ]
    merged = combine(base, vectors, torch.tensor([[0.5, 0.25], [1.0, 0.0]]))
    assert merged["a"].item() == 1 + 0.5 + 2 and merged["b"].item() == 2 + 2.5


def one_sided():
    """Zero-shot tells a from b by the first feature; the first model is surer of the same, the second ("damaged") takes it back."""
    start = [[1.0, 0.0], [-1.0, 0.0]]
    models = [head([[2.0, 0.0], [-2.0, 0.0]], start), head([[-1.0, 0.0], [1.0, 0.0]], start)]
    x = [[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0], [-2.0, 0.0]]
    return heads(models, [x, x])


def test_a_step_by_hand_and_the_damaged_model_goes():
    """Adam's first step is lr times a sign: up where the task vector widens the logits' distance, down where it narrows it."""
    inputs = one_sided()
    assert told(AdaMerging(by="task", steps=1, lr=0.01).merge(inputs)) == pytest.approx([0.31, 0.29])
    # by layer the bias has no task vector, so no gradient: it stays at 0.3
    assert told(AdaMerging(steps=1, lr=0.01).merge(inputs)) == pytest.approx([0.305, 0.295])
    merged = AdaMerging(by="task", steps=200, lr=0.01).merge(inputs)
    assert told(merged) == [1.0, 0.0]  # the edges
    torch.testing.assert_close(merged.adapter.weight, inputs.tuned[0].adapter.weight)


def test_plus_plus_has_the_task_vectors_of_ties():
    inputs = one_sided()
    start, vectors = AdaMerging(trim=0.5, start=1.0)._task_vectors(inputs)
    assert same(start, Ties(density=0.5, mean=False).merge(inputs))
    # raw signs: 1 - 2 < 0, so the second model is elected for all, and the first has nothing left
    assert vectors[0]["weight"].abs().max() == 0 and vectors[1]["weight"].tolist() == [[-2.0, 0.0], [2.0, 0.0]]


OPTIONS = {"steps": 3, "batch": 6, "lr": 0.02}


def test_towers_seeds_repeat_and_labels_are_not_read(towers):  # noqa: F811
    first = AdaMerging(**OPTIONS).merge(towers)
    assert same(first, AdaMerging(**OPTIONS).merge(towers))
    shuffled = tuple(replace(t, train=replace(t.train, labels=t.train.labels[::-1].copy())) for t in towers.data)
    assert same(first, AdaMerging(**OPTIONS).merge(replace(towers, data=shuffled)))
    other = AdaMerging(**OPTIONS).merge(replace(towers, seed=2))
    assert not torch.equal(first.adapter.tensors["layer.weight"], other.adapter.tensors["layer.weight"])
    assert all(0.2 < value < 0.4 and value != 0.3 for value in told(first))
    plus = AdaMerging(trim=0.2, **OPTIONS).merge(towers)
    assert not torch.equal(first.adapter.tensors["layer.weight"], plus.adapter.tensors["layer.weight"])
    seen = []
    AdaMerging(**OPTIONS).merge(replace(towers, reporter=Recording(progressed=seen)))
    assert [told for told in seen if told[2] == "adamerging"] == [(i, 3, "adamerging") for i in (1, 2, 3)]


def test_a_killed_run_goes_on_to_the_same_bits(towers, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(adamerging, "KEPT_EVERY", 2)
    whole = AdaMerging(**OPTIONS | {"steps": 5}).merge(towers)

    def killed(done, n, what):
        if (done, what) == (3, "adamerging"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        AdaMerging(**OPTIONS | {"steps": 5}).merge(replace(towers, scratch=tmp_path, reporter=Recording(then=killed)))
    assert [file.name for file in tmp_path.iterdir()] == ["adamerging.safetensors"]
    seen = []
    given = replace(towers, scratch=tmp_path, reporter=Recording(progressed=seen))
    again = AdaMerging(**OPTIONS | {"steps": 5}).merge(given)
    assert [done for done, _, what in seen if what == "adamerging"] == [3, 4, 5]
    assert same(whole, again) and told(whole) == told(again) and not list(tmp_path.iterdir())


def test_the_gradient_of_a_towers_coefficients(towers):  # noqa: F811
    """By task, on all images: the sign of the first step is that of a finite difference of the entropy of merged models."""

    def loss(scales):
        merged = TaskArithmetic(scales=scales).merge(towers)
        total = 0.0
        for task in towers.data:
            features = {merged.encoders[0].key: towers.features.features(merged.encoders[0], task.train)}
            total += entropy(merged.bind(task.classes)(features).double()).mean().item()
        return total

    slopes = [loss((0.301, 0.3)) - loss((0.299, 0.3)), loss((0.3, 0.301)) - loss((0.3, 0.299))]
    found = told(AdaMerging(by="task", steps=1, batch=999, lr=0.01).merge(towers))
    assert found == pytest.approx([0.3 - 0.01 * np.sign(slope) for slope in slopes])


def test_what_no_image_moves_and_running_statistics(norm):  # noqa: F811
    """Buffers stay those of the merge, whatever the images; nothing of the models or the backbone changes."""
    zeros = LinearHead(torch.zeros(3, norm.width), torch.zeros(3), ("dog", "car", "apple"), False)
    draw = torch.Generator().manual_seed(0)
    own, tuned = norm.image_weights(), []
    for _ in range(2):
        weights = {n: t + 0.01 * torch.randn(t.shape, generator=draw).abs() if t.is_floating_point() else t for n, t in own.items()}  # fmt: skip
        tuned.append(Single(norm, Tower(weights, replace(zeros, weight=torch.randn(3, norm.width, generator=draw), start=zeros))))  # fmt: skip
    task = TaskData(Classes(zeros.names), Split(Noise(8, side=32), np.arange(8), np.arange(8) % 3))
    inputs = MergeInputs(tuned[0], tuple(tuned), (task, task), FeatureStore(None), seed=1)
    kept = {n: t.clone() for n, t in tuned[0].adapter.tensors.items()}
    merged = AdaMerging(**OPTIONS).merge(inputs)
    assert all(torch.equal(t, kept[n]) for n, t in tuned[0].adapter.tensors.items())
    assert all(torch.equal(t, own[n]) for n, t in norm.image_weights().items())
    assert not torch.equal(merged.adapter.head.weight, TaskArithmetic(0.3).merge(inputs).adapter.head.weight)


def test_contexts(tmp_path):
    backbone = Micro().build("cpu")
    base, classes = Single(backbone, ZeroShot()), Classes(("dog", "car", "apple"))
    tuned = tuple(Single(backbone, Prompt(backbone.embed(t), "a photo of a")) for t in ("a sketch of a", "a map of a"))
    task = TaskData(classes, Split(Noise(6), np.arange(6), np.arange(6) % 3))
    inputs = MergeInputs(base, tuned, (task, task), FeatureStore(tmp_path), seed=1)
    merged = AdaMerging(**OPTIONS).merge(inputs)
    assert same(merged, AdaMerging(**OPTIONS).merge(inputs))
    assert not torch.equal(merged.adapter.ctx, TaskArithmetic(0.3).merge(inputs).adapter.ctx)


@pytest.mark.parametrize(
    "option", [{"start": 1.5}, {"trim": 0.0}, {"steps": 0}, {"batch": 0}, {"lr": 0.0}, {"lr": float("nan")}]
)
def test_options_that_make_no_sense(option):
    with pytest.raises(UserError, match=f"strategy adamerging: {next(iter(option))}="):
        AdaMerging(**option)


def test_what_is_refused():
    inputs = one_sided()
    with pytest.raises(UserError, match="no validation images .set images=train"):
        AdaMerging(images="validation").merge(inputs)
    with pytest.raises(UserError, match="there are no train images"):
        AdaMerging().merge(replace(inputs, data=()))
    with pytest.raises(UserError, match=r"the loss of adamerging is nan in step 1 \(lower lr \(now 0.001\)\)"):
        AdaMerging().merge(heads(inputs.tuned, [[[float("nan"), 0.0]]] * 2))
    zero = replace(inputs, tuned=(Single(WORDS, ZeroShot()),))
    with pytest.raises(UserError, match="answers of the space none do not depend on weights"):
        AdaMerging().merge(zero)


def test_memory_that_ends_is_told_with_half_the_batch(monkeypatch):
    def predict(weights, rows):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(
        fisher_information, "predictors", lambda model, tasks, inputs: (model.adapter.tensors, [predict] * 2)
    )
    with pytest.raises(Failed, match="strategy adamerging: out of memory with 4 images at once .set batch=2"):
        AdaMerging().merge(one_sided())
