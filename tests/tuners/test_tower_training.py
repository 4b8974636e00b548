"""Towers as they are read, trained, killed and chosen: files of other architectures, whole checkpoints, the loop's contracts."""

from dataclasses import replace

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from noise import NAMES, inputs, split
from recording import Recording
from safetensors.torch import save_file

from mergekit_vl.adapters.linear_head import LinearHead, class_means, zero_shot
from mergekit_vl.adapters.tower import Tower
from mergekit_vl.adapters.tower_network import TowerNetwork
from mergekit_vl.backbones.clip import backbone_of, construct, load_tokenizer
from mergekit_vl.backbones.vision import Vision
from mergekit_vl.datasets.base import Augment
from mergekit_vl.errors import UserError
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.models.model import Classes, ImageEncoder, Single
from mergekit_vl.registry.plugins import load_plugins
from mergekit_vl.storage.tuned import load_tuned, with_start
from mergekit_vl.strategies.linear import Linear
from mergekit_vl.strategies.mergetune import MergeTune
from mergekit_vl.tuners import adamw
from mergekit_vl.tuners.full import Full

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"width": 32, "heads": 2, "layers": 1},
}
CLASSES = Classes(NAMES)
SLOW = {"lr": 1e-3, "warmup": 0, "choose": "last", "batch": 6}


def clip(**more):
    config = SMALL | more
    text = load_tokenizer(config["text_cfg"], None, "here")
    return backbone_of(construct(config, "here"), text, spec="small", preprocess={}, config=config)


@pytest.fixture(scope="module")
def small():
    """A CLIP of 16 x 16 images with random weights."""
    return clip()


@pytest.fixture(scope="module")
def norm():
    """An image classifier with BatchNorm, 32 x 32."""

    class Tiny(Vision):
        def _model(self, where):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = timm.create_model("resnet10t", num_classes=3)
            model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, 32, 32), "crop_pct": 1.0}
            return model, ()

    return Tiny("resnet10t").build("cpu")


def noise(n, **more):
    return split(n, side=16, **more)


def state(backbone):
    return {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}


def moved(weights, by=0.05, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return {
        n: t + by * torch.randn(t.shape, generator=draw) if t.is_floating_point() else t for n, t in weights.items()
    }


# other weights


def test_other_weights_are_shared_and_change_nothing_else(small):
    before, images = state(small), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    weights = moved(small.image_weights())
    assert set(weights) == {name for name in before if name.startswith("visual.")}
    made = small.with_weights(weights)
    assert made.key != small.key and made.preprocess == small.preprocess
    now = dict(made.model.named_parameters())
    assert all(now[name].data_ptr() == tensor.data_ptr() for name, tensor in weights.items())
    assert not any(p.requires_grad for p in made.model.parameters()) and not made.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.model.state_dict().items())
    assert torch.equal(made.encode_texts(["a dog"]), small.encode_texts(["a dog"]))
    expected = construct(SMALL, "here").eval()
    expected.load_state_dict(before | weights)
    with torch.no_grad():
        torch.testing.assert_close(made.encode_image(images), expected.encode_image(images), atol=1e-5, rtol=1e-4)
    kept = small.image_weights()
    kept["visual.proj"].zero_()  # copies
    assert small.model.visual.proj.abs().max() > 0


def test_the_anchor_is_the_backbone_with_the_first_head(small):
    start = zero_shot(small, CLASSES)
    head = LinearHead(torch.ones(3, 16), torch.ones(3), NAMES, True, start)
    untuned = Tower(moved(small.image_weights()), head).untuned(small)
    assert all(torch.equal(untuned.weights[name], tensor) for name, tensor in small.image_weights().items())
    assert torch.equal(untuned.head.weight, start.weight)
    tensors = untuned.tensors
    assert {"linear_head.weight", "linear_head.bias"} < tensors.keys() and len(tensors) == len(untuned.weights) + 2


def test_integers_are_not_merged(norm):
    weights = {"a": torch.tensor([1.0, 2.0]), "count": torch.tensor(7)}
    made = Tower(weights, chosen={"epoch": 2})
    assert set(made.tensors) == {"a"}
    other = made.with_tensors({"a": torch.tensor([3.0, 4.0])})
    assert other.weights["a"].tolist() == [3.0, 4.0] and other.weights["count"].item() == 7 and other.chosen == {}


def test_a_tower_without_a_head_takes_any_classes(small):
    model = Single(small, Tower(moved(small.image_weights())))
    features = {model.encoders[0].key: torch.randn(2, 16)}
    for names in (("dog", "car"), ("a lion", "tea", "sand", "rope")):
        assert model.bind(Classes(names))(features).shape == (2, len(names))
    with_head = Single(small, replace(model.adapter, head=zero_shot(small, CLASSES)))
    with pytest.raises(UserError, match="knows no class 'lion'"):
        with_head.bind(Classes(("lion",)))


def test_a_tower_of_another_architecture_is_told_when_it_is_read(small, tmp_path):
    other = clip(embed_dim=8)
    Tower(other.image_weights()).save(tmp_path / "t.safetensors", backbone="other")
    with pytest.raises(UserError, match=r"another architecture: visual.proj is \(32, 8\) in them, \(32, 16\) in the"):
        load_tuned(tmp_path / "t.safetensors", small, load_plugins())
    Tower({"none": torch.ones(1)}).save(tmp_path / "n.safetensors", backbone="other")
    with pytest.raises(UserError, match=r"none is \(1,\) in them, missing in the model"):
        load_tuned(tmp_path / "n.safetensors", small, load_plugins())
    narrow = LinearHead(torch.ones(3, 5), torch.ones(3), NAMES, True)
    Tower(small.image_weights(), narrow).save(tmp_path / "w.safetensors", backbone="other")
    with pytest.raises(UserError, match="features of width 5, small gives 16"):
        load_tuned(tmp_path / "w.safetensors", small, load_plugins())


# full tuning


def test_the_rate_warms_up_and_falls_as_a_cosine():
    schedule = adamw.AdamWSchedule(epochs=1, batch=1, lr=2.0, warmup=4)
    assert [schedule.lr_at(s, 40) for s in (0, 1, 3, 4, 22)] == pytest.approx([0.5, 1.0, 2.0, 2.0, 1.0])
    assert schedule.lr_at(0, 20) == 1.0  # two steps: a tenth of all
    assert schedule.lr_at(0, 5) == 2.0 and 0 < schedule.lr_at(39, 40) < 0.01


def same(one, other, **tolerance):
    for name, tensor in {**one.weights, **one.tensors}.items():
        theirs = {**other.weights, **other.tensors}[name]
        if tolerance and tensor.is_floating_point():
            torch.testing.assert_close(tensor, theirs, **tolerance)
        else:
            assert torch.equal(tensor, theirs), name
    return True


def test_the_last_step_of_an_epoch_averages_over_the_batches_it_has(small, monkeypatch):
    """Five batches of two, three to a step: both steps see the same gradient of 0.1, at rates 0.5 and 0.25."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, weight_decay: torch.optim.SGD(p, lr))

    start = Tower(small.image_weights(), zero_shot(small, CLASSES))
    schedule = adamw.AdamWSchedule(1, 2, 0.5, warmup=0, accumulate=3)
    training = adamw.AdamWTraining(small, TowerNetwork(small, start, CLASSES), schedule)
    for step in training.steps(inputs(small, noise(10)), Augment(), what="what"):
        assert len(step.x) == 2
        with step:
            step.minimise(0.1 * step.weights["linear_head.bias"].sum())
    found = training.chosen()
    torch.testing.assert_close(found.head.bias, torch.full((3,), -0.1 * (0.5 + 0.25)))


class Killed(Exception):
    pass


def killed_in_epoch(number, steps):
    def progress(done, n, what):
        if what in ("full", "mergetune") and done == number * steps + 1:
            raise Killed

    return progress


def resumed(tuner, given, tmp_path, steps):
    """A training that was killed in its second and third epoch."""
    given = replace(given, scratch=tmp_path / "scratch")
    for epoch in (1, 2):
        with pytest.raises(Killed):
            tuner(replace(given, reporter=Recording(then=killed_in_epoch(epoch, steps))))
        assert len(list((tmp_path / "scratch").iterdir())) == 1
    seen = []
    made = tuner(replace(given, reporter=Recording(progressed=seen))).adapter
    mine = [done for done, n, what in seen if what in ("full", "mergetune")]
    assert mine[0] == 2 * steps + 1 and not list((tmp_path / "scratch").iterdir())  # two epochs were not done again
    return made


@pytest.mark.parametrize("choose", ["last", "validation"])
def test_a_killed_training_goes_on_to_the_same_bits(norm, tmp_path, choose):
    head = {"base": Single(norm, class_mean(norm, split(6, side=32)))}
    given = inputs(norm, split(6, side=32), val=split(6, side=32, seed=1), **head)
    tuner = Full(**SLOW | {"epochs": 3, "batch": 3, "choose": choose})
    whole = tuner.tune(given).adapter
    again = resumed(tuner.tune, given, tmp_path, 2)
    assert same(whole, again) and whole.chosen == again.chosen


def class_mean(backbone, train):
    features = FeatureStore(None).features(ImageEncoder(backbone), train)
    return class_means(features, torch.from_numpy(train.labels), CLASSES, normalise=False)


def test_a_killed_mergetune_draws_the_same_points_again(small, tmp_path):
    tuned = Single(small, Tower(moved(small.image_weights())))
    given = inputs(small, noise(6), tuned=(tuned,))
    strategy = MergeTune(epochs=3, batch=3, lr=1e-3, alphas=(), n_alpha=2)
    assert same(strategy.merge(given).adapter, resumed(strategy.merge, given, tmp_path, 2))


def test_validation_takes_the_best_epoch(small, monkeypatch):
    seen, scores = [], iter((0.2, 0.9, 0.9, 0.1))

    class Scores:
        def __init__(self, acc1):
            self.acc1 = acc1

    def scored(model, classes, val, store):
        assert len(val) == 3 and store.folder is None
        seen.append(model.adapter)
        return Scores(next(scores)), 0.0, None

    monkeypatch.setattr(adamw, "evaluate", scored)
    given = inputs(small, noise(6), val=noise(3, seed=1))
    found = Full(**SLOW | {"epochs": 4, "choose": "validation"}).tune(given).adapter
    assert found.chosen == {"epoch": 2} and same(found, seen[1])
    assert not torch.equal(seen[1].weights["visual.proj"], seen[2].weights["visual.proj"])
    last = Full(**SLOW | {"epochs": 4}).tune(given).adapter
    assert same(last, seen[3]) and last.chosen == {}


def test_a_loss_that_is_not_finite_is_told(small):
    weights = {n: torch.full_like(t, torch.inf) if n == "visual.proj" else t for n, t in small.image_weights().items()}
    start, given = Tower(weights, zero_shot(small, CLASSES)), inputs(small, noise(6))

    network = TowerNetwork(small, start, CLASSES)
    training = adamw.AdamWTraining(small, network, adamw.AdamWSchedule(1, 6, 0.5))
    with pytest.raises(UserError, match=r"what: the loss of what is nan in epoch 1 \(lower lr \(now 0.5\)\)"):
        for step in training.steps(given, Augment(), what="what"):
            with step:
                step.minimise(F.cross_entropy(network(step.weights, step.x), step.labels))


def test_memory_that_ends_is_told_with_half_the_batch(small):
    start = Tower(small.image_weights(), zero_shot(small, CLASSES))
    schedule = adamw.AdamWSchedule(1, 8, 0.5, accumulate=2)
    training = adamw.AdamWTraining(small, TowerNetwork(small, start, CLASSES), schedule)
    with pytest.raises(UserError, match="out of memory with 6 images at once .set batch=3 accumulate=4"):
        for step in training.steps(inputs(small, noise(6)), Augment(), what="what"):
            with step:
                raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("option", [{"accumulate": 0}, {"weight_decay": -1.0}, {"warmup": -1}])
def test_options_that_make_no_sense(option):
    with pytest.raises(UserError, match=f"tuner full: {next(iter(option))}="):
        Full(**option)


# checkpoints of whole models


def loaded(path, backbone):
    return load_tuned(path, backbone, load_plugins())


@pytest.fixture(scope="module")
def tuned_state(small):
    return moved(state(small))


def logits_of(model, images):
    with torch.no_grad():
        x = F.normalize(model.encode_image(images), dim=-1)
        t = F.normalize(model.encode_text(open_clip.tokenize([f"a photo of a {n}." for n in NAMES])), dim=-1)
        return model.logit_scale.exp() * x @ t.T


def test_a_complete_clip_and_its_image_tower_alone(small, tuned_state, tmp_path):
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    visual = {n: t for n, t in tuned_state.items() if n.startswith("visual.")}
    for name, given in (("all", tuned_state), ("visual", visual)):
        save_file(given, tmp_path / f"{name}.safetensors")
        found = loaded(tmp_path / f"{name}.safetensors", small)
        assert set(found.weights) == set(given) and found.head is None
        model = Single(small, found)
        reference = construct(SMALL, "here").eval()
        reference.load_state_dict(state(small) | given)
        ours = model.bind(CLASSES)({model.encoders[0].key: model.encoders[0].encode(images)})
        torch.testing.assert_close(ours, logits_of(reference, images), rtol=1e-4, atol=1e-3)
    merged = Linear().merge(inputs(small, None, tuned=(Single(small, loaded(tmp_path / "all.safetensors", small)),)))
    half = (state(small)["text_projection"] + tuned_state["text_projection"]) / 2
    torch.testing.assert_close(merged.adapter.weights["text_projection"], half)


def test_training_uses_the_scale_and_texts_of_a_tuned_text_tower(small, tuned_state):
    """A tower that brings a scale of its own is trained under it, as it is scored under it."""
    given = tuned_state | {"logit_scale": tuned_state["logit_scale"] + 1}
    start = Tower(given)
    forward = TowerNetwork(small, start, CLASSES)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reference = construct(SMALL, "here").eval()
    reference.load_state_dict(given)
    torch.testing.assert_close(forward(forward.weights, images), logits_of(reference, images), rtol=1e-4, atol=1e-3)


def test_a_timm_checkpoint_brings_its_classifier(norm, tmp_path):
    model = timm.create_model("resnet10t", num_classes=3)
    given = {n: t.contiguous() for n, t in model.state_dict().items()}
    save_file(given, tmp_path / "t.safetensors")
    found = loaded(tmp_path / "t.safetensors", norm)
    assert torch.equal(found.head.weight, given["fc.weight"]) and found.head.names == ()
    assert "fc.weight" not in found.weights
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    single = Single(norm, found)
    with torch.no_grad():
        expected = model.eval()(images)
    ours = single.bind(CLASSES)({single.encoders[0].key: single.encoders[0].encode(images)})
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    start = class_mean(norm, split(3, side=32))
    given = inputs(norm, split(3, side=32), base=Single(norm, start))
    told = with_start(single, given).adapter
    assert told.head.names == NAMES and torch.equal(told.untuned(norm).head.weight, start.weight)
    save_file(
        {n: t for n, t in model.state_dict().items() if not n.startswith("fc")}, tmp_path / "headless.safetensors"
    )
    with pytest.raises(UserError, match="no classifier is in it .give a timm checkpoint with its classifier"):
        loaded(tmp_path / "headless.safetensors", norm)


def test_checkpoints_that_do_not_fit(small, norm, tuned_state, tmp_path):
    def refused(given, backbone, message):
        save_file({n: t.contiguous() for n, t in given.items()}, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=message):
            loaded(tmp_path / "bad.safetensors", backbone)

    wide = timm.create_model("resnet14t", num_classes=3).state_dict()
    refused(
        wide, norm, r"bad.safetensors: a checkpoint of another architecture than vision:resnet10t, \d+ tensors differ: "
    )
    narrow = clip(embed_dim=8).model.state_dict()
    refused(narrow, small, r"visual.proj is \(32, 8\) in the checkpoint, \(32, 16\) in the model")
    missing = {n: t for n, t in tuned_state.items() if n != "ln_final.weight"}
    refused(missing, small, "1 tensors? differs?: ln_final.weight is missing in the checkpoint")
    nan = {n: t * torch.nan if n == "visual.proj" else t for n, t in tuned_state.items()}
    refused(nan, small, "visual.proj has values that are not finite")
    classifier = timm.create_model("resnet10t", num_classes=3).state_dict()
    refused(classifier | {"fc.bias": torch.full((3,), torch.nan)}, norm, "fc.bias has values that are not finite")
    refused(classifier | {"fc.weight": torch.ones(3, 7)}, norm, "features of width 7, vision:resnet10t gives 512")
