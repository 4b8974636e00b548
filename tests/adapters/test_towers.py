"""Whole image towers: other weights on a backbone, full fine-tuning, and MergeTune's terms on them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from recording import Recording

from mergekit_vl.adapters.linear_head import zero_shot
from mergekit_vl.adapters.tower import HEAD, Tower
from mergekit_vl.adapters.tower_network import TowerNetwork
from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.backbones import clip
from mergekit_vl.backbones.vision import Vision
from mergekit_vl.datasets.base import Augment, Split
from mergekit_vl.errors import UserError
from mergekit_vl.estimators import fisher_information
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.models.inputs import MergeInputs, TaskData
from mergekit_vl.models.model import Classes, ImageEncoder, Single
from mergekit_vl.models.views import eval_view, train_view
from mergekit_vl.strategies.mergetune import MergeTune
from mergekit_vl.strategies.wise_ft import WiseFT
from mergekit_vl.tuners.full import Full

CLASSES = Classes(("dog", "car", "apple"))
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


class Noise:
    key = "noise"
    pictures = np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3), dtype=np.uint8)

    def load(self, index):
        return Image.fromarray(self.pictures[index])


def data(n=9):
    source = Noise()
    val = Split(source, np.arange(9, 12), np.arange(3))
    return TaskData(CLASSES, Split(source, np.arange(n), np.arange(n) % 3), val)


@pytest.fixture(scope="module")
def backbone():
    return clip.backbone_of(
        clip.construct(CONFIG, "small"), clip.load_tokenizer(CONFIG["text_cfg"], None, ""), spec="small",
        config=CONFIG, preprocess={},
    )  # fmt: skip


@pytest.fixture
def task(backbone, tmp_path):
    return MergeInputs(Single(backbone, ZeroShot()), (), (data(),), FeatureStore(tmp_path / "cache"), seed=1)


def distance(a, b):
    return sum((a.tensors[name] - b.tensors[name]).square().sum() for name in a.tensors)


def test_a_tower_with_the_backbones_own_weights_is_zero_shot(backbone):
    """The same key, so the same features are looked up; and nothing of the backbone changes when other weights come in."""
    own = Single(backbone, Tower(backbone.image_weights()))
    assert own.encoders[0].key == backbone.key and all(name.startswith("visual.") for name in own.adapter.weights)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features = {backbone.key: backbone.encode_image(images, block=2)}
    torch.testing.assert_close(own.bind(CLASSES)(features), Single(backbone, ZeroShot()).bind(CLASSES)(features))
    other = backbone.with_weights({name: tensor + 1 for name, tensor in backbone.image_weights().items()})
    assert other.key != backbone.key and other.text.model is not backbone.model
    assert torch.equal(backbone.encode_image(images, block=2), features[backbone.key])


def test_weights_that_do_not_fit(backbone):
    with pytest.raises(UserError, match=r"visual.proj is \(2, 2\) in them, \(32, 16\) in the model"):
        Tower({"visual.proj": torch.zeros(2, 2)}).on(backbone)


def test_both_towers_can_be_others(backbone):
    state = {name: tensor + 0.1 for name, tensor in backbone.model.state_dict().items() if tensor.is_floating_point()}
    model = Single(backbone, Tower(state))
    torch.testing.assert_close(model.adapter.on(backbone).scale, (backbone.logit_scale + 0.1).exp())
    untuned = model.adapter.untuned(backbone)
    assert all(torch.equal(tensor, backbone.model.state_dict()[name]) for name, tensor in untuned.tensors.items())


def literal_step(backbone, task, lr):
    """One step of AdamW on all nine images, written out with open_clip's own module and a head beside it."""
    import copy

    model = copy.deepcopy(backbone.model.visual).train()
    start = zero_shot(backbone, CLASSES)
    weight, bias = (torch.nn.Parameter(t.clone()) for t in (start.weight, start.bias))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    parameters = [*model.parameters(), weight, bias]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)
    augment = Augment(0.5, True)
    path, train = ImageEncoder(backbone), task.data[0].train
    images = torch.stack([train_view(train.source.load(i), path, augment, seed=(1, i, 0)) for i in range(9)])
    loss = F.cross_entropy(F.normalize(model(images), dim=-1) @ weight.T + bias, torch.from_numpy(train.labels))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    named = {f"visual.{name}": p for name, p in model.named_parameters()} | {HEAD + "weight": weight}
    return {name: (p.detach(), p.grad) for name, p in named.items()}


@pytest.mark.parametrize("batch, accumulate", [(9, 1), (3, 3)])
def test_a_step_is_adamw_on_every_weight_and_batches_add_up(backbone, task, batch, accumulate):
    options = {"epochs": 1, "batch": batch, "accumulate": accumulate, "lr": 0.01, "crop": 0.5, "choose": "last"}
    tuned = Full(**options).tune(task).adapter
    expected = literal_step(backbone, task, 0.01)
    for name, (tensor, gradient) in expected.items():
        counts = (
            gradient.abs() > 1e-6
        )  # AdamW's first step is a sign: that of a gradient of zero, as of a key's bias, is noise
        assert counts.any() and (tuned.tensors[name] - tensor)[counts].abs().max() < 1e-4, name
    assert tuned.head.names == CLASSES.names and tuned.head.start.weight.equal(zero_shot(backbone, CLASSES).weight)


def test_a_killed_training_goes_on_with_the_same_bits(task, tmp_path):
    options = Full(epochs=4, batch=3, lr=0.01, crop=0.5, choose="validation")
    whole = options.tune(replace(task, scratch=tmp_path / "a"))

    def stop(done, total, what):
        if done == 8:  # in the third epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        options.tune(replace(task, scratch=tmp_path / "b", reporter=Recording(then=stop)))
    assert (tmp_path / "b" / "full.safetensors").exists()
    steps = []
    again = options.tune(
        replace(task, scratch=tmp_path / "b", reporter=Recording(then=lambda done, total, what: steps.append(done)))
    )
    assert steps[0] == 7 and not (tmp_path / "b" / "full.safetensors").exists()
    assert all(torch.equal(t, again.adapter.tensors[name]) for name, t in whole.adapter.tensors.items())
    assert whole.adapter.chosen == again.adapter.chosen and set(whole.adapter.chosen) == {"epoch"}


def test_a_text_classifier_stays_and_takes_other_classes(backbone, task):
    tuned = Full(head="text", epochs=1, batch=9, lr=0.01).tune(task)
    assert tuned.adapter.head is None and not any(name.startswith(HEAD) for name in tuned.adapter.tensors)
    features = {tuned.encoders[0].key: torch.randn(2, 16)}
    assert tuned.bind(Classes(("swan", "boat")))(features).shape == (2, 2)


def test_lp_ft_starts_from_the_probe(task):
    from mergekit_vl.tuners.linear_probe import LinearProbe

    probe = LinearProbe().tune(task).adapter
    tuned = Full(head="linear_probe", epochs=1, batch=9, lr=1e-9, choose="last").tune(task).adapter
    torch.testing.assert_close(tuned.head.weight, probe.weight, atol=1e-6, rtol=0)
    assert tuned.head.start.weight.equal(probe.start.weight)


def test_running_statistics_follow_the_model_and_not_the_points_of_a_path():
    vision = Vision("test_resnet").build("cpu")
    head = replace(zero_shot_like(vision), names=CLASSES.names)
    forward = TowerNetwork(vision, Tower(vision.image_weights(), head), CLASSES)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    name = next(name for name in forward.statistics if name.endswith("running_mean"))
    before = forward.statistics[name].clone()
    forward({n: 1.0 * w for n, w in forward.weights.items()}, images)
    assert forward.statistics[name].equal(before)
    forward(forward.weights, images)
    assert not forward.statistics[name].equal(before) and forward.adapter(forward.statistics).weights[name].equal(
        forward.statistics[name]
    )


def zero_shot_like(vision):
    from mergekit_vl.adapters.linear_head import LinearHead

    return LinearHead(torch.zeros(3, vision.width), torch.zeros(3), (), normalise=False)


def tuned_task(task):
    backbone = task.base.backbone
    head = zero_shot(backbone, CLASSES)
    start = Tower(backbone.image_weights(), replace(head, start=head))
    draw = torch.Generator().manual_seed(5)
    tensors = {n: t + 0.05 * torch.randn(t.shape, generator=draw) for n, t in start.tensors.items()}
    return replace(task, tuned=(Single(backbone, start.with_tensors(tensors)),))


def test_the_terms_of_a_tower_by_hand(backbone, task):
    """lambda |w - w1|^2 / |w2 - w1|^2, CE of w, beta / A of CE at each w2 + alpha (w - w2)."""
    given = tuned_task(task)
    second = given.tuned[0].adapter
    first = second.untuned(backbone)
    w = {n: (0.3 * second.tensors[n] + 0.7 * t) for n, t in first.tensors.items()}
    forward = TowerNetwork(backbone, first, CLASSES)
    images, labels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    strategy = MergeTune(lambda_=2.0, beta=0.5, alphas=(0.2, 0.6))
    objective = strategy.objective(forward, None, Single(backbone, first), given.tuned[0], given)
    terms = list(objective.terms(w, images, labels, None))

    def ce(weights):
        tower = Single(backbone, first.with_tensors(weights))
        features = tower.adapter.on(backbone).image(images)
        return F.cross_entropy(tower.bind(CLASSES)({tower.encoders[0].key: features}), labels).item()

    path = [{n: second.tensors[n] + alpha * (t - second.tensors[n]) for n, t in w.items()} for alpha in (0.2, 0.6)]
    # w lies at 0.3 of the way from w1 to w2
    assert [t.item() for t in terms] == pytest.approx([2 * 0.09, ce(w), *(0.25 * ce(p) for p in path)], rel=1e-4)


def test_a_strong_pull_holds_a_tower_at_zero_shot(backbone, task):
    given = tuned_task(task)
    options = {"beta": 0.0, "tau": 1.0, "epochs": 15, "batch": 9, "lr": 3e-3}
    first = given.tuned[0].adapter.untuned(backbone)
    pulled, free = (MergeTune(lambda_=v, **options).merge(given).adapter for v in (50.0, 0.0))
    assert distance(pulled, first) < 0.7 * distance(free, first)
    with pytest.raises(UserError, match="surrogate=cosine is not there for towers"):
        MergeTune(surrogate="cosine").merge(given)


def test_a_fisher_of_a_tower_is_the_mean_of_squared_gradients(backbone, task):
    """Of the two images that are drawn, with the two labels that are drawn, written out."""
    given = tuned_task(task)
    first = given.tuned[0].adapter.untuned(backbone)
    fisher = fisher_information.of_model(Single(backbone, first), given.data[0], given, 2)
    assert set(fisher) == set(first.tensors)
    forward, train = TowerNetwork(backbone, first, CLASSES, training=False), given.data[0].train
    draw, expected = torch.Generator().manual_seed(given.seed + 2), 0
    for row in fisher_information.some(given, 9, 2).tolist():
        image = eval_view(train.source.load(row), ImageEncoder(backbone))
        logs = forward(forward.weights, image[None])[0].log_softmax(-1)
        label = int(torch.multinomial(logs.exp(), 1, generator=draw))
        expected += torch.autograd.grad(logs[label], forward.weights["visual.proj"])[0].square() / 2
    torch.testing.assert_close(fisher["visual.proj"], expected)


def test_towers_average_as_tensors(backbone, task):
    given = tuned_task(task)
    merged, second = WiseFT(0.25).merge(given).adapter, given.tuned[0].adapter
    first = second.untuned(backbone)
    for name, tensor in merged.tensors.items():
        torch.testing.assert_close(tensor, 0.75 * first.tensors[name] + 0.25 * second.tensors[name])


def test_the_head_objective_is_the_formula(task):
    """Of a linear head, term by term, and its path point by point."""
    from mergekit_vl.adapters.head_network import HeadNetwork, matrix

    backbone = task.base.backbone
    start = zero_shot(backbone, CLASSES)
    draw = torch.Generator().manual_seed(2)
    tuned = replace(start, weight=start.weight + torch.randn(start.weight.shape, generator=draw), start=start)
    given = replace(task, tuned=(Single(backbone, tuned),))
    x = F.normalize(torch.randn(4, 16, generator=draw), dim=-1)
    x = torch.cat([x, torch.ones(4, 1)], 1)
    y = torch.tensor([0, 1, 2, 0])
    w1, w2 = matrix(start.tensors), matrix(tuned.tensors)
    w = w2 + 0.5 * torch.randn(w2.shape, generator=draw)
    for surrogate, pull in (
        ("cosine", 1 - F.cosine_similarity(w, w1, dim=-1).mean()),
        ("l2", (w - w1).square().sum() / (w1.square().sum() + w2.square().sum())),
    ):
        strategy = MergeTune(lambda_=3.0, beta=0.7, alphas=(0.1, 0.4), surrogate=surrogate)
        network = HeadNetwork(tuned, CLASSES)
        objective = strategy.objective(network, x[None], Single(backbone, start), given.tuned[0], given)
        ours = sum(objective.terms({"w": w}, x, y, None))
        path = sum(F.cross_entropy(x @ (w2 + alpha * (w - w2)).T, y) for alpha in (0.1, 0.4)) / 2
        torch.testing.assert_close(ours, F.cross_entropy(x @ w.T, y) + 0.7 * path + 3 * pull)
