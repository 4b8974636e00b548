"""MergeTune's objective against a literal float64 transcription that shares no code with the product."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from mergekit_vl.adapters.linear_head import LinearHead
from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.backbones import micro
from mergekit_vl.backbones.micro import Micro
from mergekit_vl.datasets.base import Split
from mergekit_vl.errors import UserError
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.models.inputs import MergeInputs, TaskData
from mergekit_vl.models.model import Classes, Single
from mergekit_vl.strategies import mergetune
from mergekit_vl.strategies.mergetune import MergeTune
from mergekit_vl.tuners import sgd

ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)


def literal_text(model, context, names):
    """The classes' text features by open_clip's own forward of all 24 tokens, the context written over the slots."""
    ids = micro.tokenizer()([f"x x x x {name}." for name in names])
    rows = context.expand(len(names), *context.shape[-2:])
    hook = model.token_embedding.register_forward_hook(lambda m, a, out: torch.cat([out[:, :1], rows, out[:, 5:]], 1))
    try:
        return model.encode_text(ids)
    finally:
        hook.remove()


def literal_ce(scale, text, images, labels):
    """Mean over images of -log softmax(scale * cos)[label], pair by pair."""
    total = 0.0
    for x, y in zip(images, labels):
        logits = torch.stack([scale * (x @ t) / (x.norm() * t.norm()) for t in text])
        total = total + logits.exp().sum().log() - logits[y]
    return total / len(images)


def literal_loss(model, ctx, w1, w2, names, images, labels, *, alphas, lam, beta, space, surrogate):
    """L(w) of the paper term by term; w1 and w2 are (context, text features)."""
    scale = model.logit_scale.exp()
    text = literal_text(model, ctx, names)
    total = literal_ce(scale, text, images, labels)
    for a in alphas:
        if space == "classifiers":
            point = a * text + (1 - a) * w2[1]
        else:
            point = literal_text(model, a * ctx + (1 - a) * w2[0], names)
        total = total + beta / len(alphas) * literal_ce(scale, point, images, labels)
    w, zero = (text, w1[1]) if space == "classifiers" else (ctx, w1[0])
    terms = []
    for r, r1 in zip(w.reshape(-1, w.shape[-1]), zero.reshape(-1, w.shape[-1])):
        terms.append(1 - (r @ r1) / (r.norm() * r1.norm()) if surrogate == "cosine" else ((r - r1) ** 2).sum())
    pull = sum(terms) if (surrogate, space) == ("l2", "weights") else sum(terms) / len(terms)
    return total + lam * pull


@dataclass
class Step:
    """One training step in float64: the product's objective and the literal one, at a context away from both ends."""

    inputs: MergeInputs
    names: tuple
    ctx: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor

    def product(self, **options):
        strategy = MergeTune(**options)
        zero_shot, tuned = strategy.ends(self.inputs)
        classes = self.inputs.data[0].classes
        (network,) = tuned.adapter.networks(tuned.backbone, [classes], training=True)
        objective = strategy.objective(network, self.images[None], zero_shot, tuned, self.inputs)
        ctx = self.ctx.clone().requires_grad_(True)
        draw = torch.Generator().manual_seed(self.inputs.seed + 1)  # as the training loop's
        value = sum(objective.terms({"ctx": ctx}, self.images, self.labels, draw))
        value.backward()
        return value.item(), ctx.grad

    def literal(self, *, alphas=ALPHAS, template=True, **options):
        model = self.inputs.base.backbone.model
        word = {p: model.token_embedding(micro.tokenizer()([p]))[0, 1:5] for p in ("a photo of a", "a sketch of a")}
        w1, w2 = ((c, literal_text(model, c, self.names)) for c in word.values())
        if template:
            w1 = (w1[0], model.encode_text(micro.tokenizer()([f"an image of the {name}." for name in self.names])))
        ctx = self.ctx.clone().requires_grad_(True)
        value = literal_loss(model, ctx, w1, w2, self.names, self.images, self.labels, alphas=alphas, **options)
        value.backward()
        return value.item(), ctx.grad


@pytest.fixture(scope="module")
def step():
    backbone = Micro().build("cpu")
    backbone.model.double()
    classes = Classes(("dog", "car", "apple"), ("an image of the {}.",))
    draw = torch.Generator().manual_seed(5)
    start = backbone.embed("a photo of a")
    ctx = start + start.std() * torch.randn(start.shape, generator=draw, dtype=torch.float64)
    images = torch.nn.functional.normalize(torch.randn(6, 128, generator=draw, dtype=torch.float64), dim=-1)
    tuned = Single(backbone, Prompt(backbone.embed("a sketch of a"), "a photo of a"))
    inputs = MergeInputs(Single(backbone, ZeroShot()), (tuned,), (TaskData(classes, None),), None, seed=3)
    return Step(inputs, classes.names, ctx, images, torch.tensor([0, 2, 1, 1, 0, 2]))


def agrees(ours, literal):
    return abs(ours[0] - literal[0]) < 1e-6 and (ours[1] - literal[1]).abs().max() < 1e-6


CELLS = [{"space": p, "surrogate": s} for p in ("classifiers", "weights") for s in ("cosine", "l2")]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell['space']}-{cell['surrogate']}")
def test_loss_and_gradient_are_those_of_the_formula(step, cell):
    """Every cell of the docstring's table, loss and gradient with respect to the context, to 1e-6 in float64."""
    ours = step.product(lambda_=3.0, beta=0.7, **cell)
    assert agrees(ours, step.literal(lam=3.0, beta=0.7, **cell))
    assert ours[1].norm() > 1e-3


def test_the_other_anchor_and_drawn_alphas(step):
    cell = {"space": "classifiers", "surrogate": "cosine"}
    ours = step.product(lambda_=3.0, beta=0.7, zero_shot="context", **cell)
    assert agrees(ours, step.literal(lam=3.0, beta=0.7, template=False, **cell))
    drawn = torch.rand(2, generator=torch.Generator().manual_seed(4)).tolist()
    ours = step.product(lambda_=3.0, beta=0.7, alphas=(), n_alpha=2, **cell)
    assert agrees(ours, step.literal(lam=3.0, beta=0.7, alphas=drawn, **cell))


MUTATIONS = {
    "adapters.lines.interpolate": lambda w, w2, alphas: w + alphas.view(-1, 1, 1) * (w2 - w),
    "strategies.mergetune.surrogates.cosine": lambda w, w1: 2 * (1 - torch.cosine_similarity(w, w1, dim=-1)).mean(),
    "strategies.mergetune.cross_entropy": lambda logits, labels: sgd.cross_entropy(logits, labels) / 2,
}


@pytest.mark.parametrize("term", MUTATIONS)
def test_a_mutated_term_is_noticed(step, monkeypatch, term):
    """Endpoints exchanged (the grid is symmetric, so an unsymmetric one is used), a doubled distance, a halved cross-entropy."""
    options = {"beta": 0.7, "space": "classifiers", "surrogate": "cosine"}
    literal = step.literal(lam=3.0, alphas=(0.1, 0.4), **options)
    assert agrees(step.product(lambda_=3.0, alphas=(0.1, 0.4), **options), literal)
    monkeypatch.setattr(f"mergekit_vl.{term}", MUTATIONS[term])
    assert not agrees(step.product(lambda_=3.0, alphas=(0.1, 0.4), **options), literal)


def test_each_weight_counts(step):
    options = {"space": "classifiers", "surrogate": "cosine"}
    literal = step.literal(lam=3.0, beta=0.7, **options)
    assert not agrees(step.product(lambda_=3.0, beta=0.8, **options), literal)
    assert not agrees(step.product(lambda_=3.1, beta=0.7, **options), literal)


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


@pytest.mark.parametrize("space", ["classifiers", "weights"])
def test_a_step_has_one_text_forward_and_no_image_forward(task, monkeypatch, space):
    """Three epochs of three steps: nine text forwards, beside the ends' two where classifiers are interpolated; the nine images' views are
    encoded once, then never."""
    strategy = MergeTune(epochs=3, batch=3, space=space)
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
    assert calls == {"text": 9 + 2 * (space == "classifiers"), "image": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 1.5}, r"tau=1.5 \(between 0, zero-shot, and 1, fine-tuned\)"),
        ({"lambda_": -1.0}, "lambda=-1.0"),
        ({"alphas": (0.5, 2.0)}, "alphas="),
        ({"alphas": (), "n_alpha": 0}, "n_alpha=0"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        MergeTune(**options)


def test_a_context_per_class_merges_too(task):
    ctx = task.tuned[0].adapter.ctx.expand(3, -1, -1).clone()
    tuned = Single(task.base.backbone, Prompt(ctx, "a photo of a", task.data[0].classes.names))
    for space in ("classifiers", "weights"):
        merged = MergeTune(epochs=1, space=space).merge(replace(task, tuned=(tuned,)))
        assert merged.adapter.ctx.shape == (3, 4, 128)


def no_steps(monkeypatch):
    """A training ends where it starts."""
    real = mergetune.train
    monkeypatch.setattr(mergetune, "train", lambda *args, **more: replace(real(*args, **more), steps=iter(())))


def test_endpoints_of_tau(task, monkeypatch):
    no_steps(monkeypatch)
    backbone = task.base.backbone
    assert torch.equal(MergeTune(tau=0.0).merge(task).adapter.ctx, backbone.embed("a photo of a"))
    assert torch.equal(MergeTune(tau=1.0).merge(task).adapter.ctx, task.tuned[0].adapter.ctx)


def test_the_middle_is_the_point_of_the_path_at_one_half(task, monkeypatch):
    no_steps(monkeypatch)  # so w is where it starts: at tau=0 the context of the initial words
    classes, w2 = task.data[0].classes, task.tuned[0]
    w = MergeTune(tau=0.0).merge(task)
    of_classifiers = MergeTune(tau=0.0, middle=True).merge(task).text_features(classes)
    torch.testing.assert_close(of_classifiers, (w.text_features(classes) + w2.text_features(classes)) / 2)
    of_weights = MergeTune(tau=0.0, middle=True, space="weights").merge(task)
    torch.testing.assert_close(of_weights.adapter.ctx, (w.adapter.ctx + w2.adapter.ctx) / 2)


def test_robust_settings_pull_prompts_with_a_quarter_of_the_papers_lambda():
    assert MergeTune().used.lambda_ == 2 and MergeTune(settings="paper").used.lambda_ == 8
    assert MergeTune().used.others == 8, "of heads and towers"
    given = MergeTune(lambda_=5.0).used
    assert given.lambda_ == given.others == 5


@pytest.mark.parametrize(
    ("settings", "batch", "images", "at_once"),
    [
        ("robust", 128, 250, 32),  # an eighth, rounded up
        ("robust", 16, 250, 16),
        ("robust", 128, 2000, 128),
        ("robust", 128, 20, 8),  # not below 8
        ("paper", 128, 250, 128),
    ],
)
def test_a_pass_over_few_shots_has_eight_steps(task, settings, batch, images, at_once):
    assert MergeTune(settings=settings, batch=batch).at_once(task.tuned[0], images) == at_once


def test_a_head_has_the_batch_that_is_given():
    head = LinearHead(torch.zeros(2, 3), torch.zeros(2), ("a", "b"), False)
    assert MergeTune(batch=128).at_once(Single(None, head), 20) == 128


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
