"""MergeTune's objective on heads and towers against literal transcriptions that share no code with the product."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from noise import NAMES, inputs, split
from test_mergetune import no_steps

from mergekit_vl.adapters.head_network import HeadNetwork
from mergekit_vl.adapters.linear_head import LinearHead
from mergekit_vl.adapters.tower import Tower
from mergekit_vl.adapters.tower_network import TowerNetwork
from mergekit_vl.backbones.clip import backbone_of, construct, load_tokenizer
from mergekit_vl.backbones.vision import Vision
from mergekit_vl.errors import UserError
from mergekit_vl.estimators import fisher_information
from mergekit_vl.models.model import Classes, Single
from mergekit_vl.strategies.mergetune import MergeTune

ALPHAS = (0.1, 0.4)
SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def small():
    text = load_tokenizer(SMALL["text_cfg"], None, "here")
    return backbone_of(construct(SMALL, "here"), text, spec="small", preprocess={}, config=SMALL)


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# heads

W1, W2, W = drawn(3, 6, seed=1), drawn(3, 6, seed=2), drawn(3, 6, seed=3)
X = torch.cat([drawn(5, 5, seed=4), torch.ones(5, 1)], 1)
VIEWS = drawn(2, 4, 5, seed=5)
LABELS = torch.tensor([0, 2, 1, 1, 0])


def head(w, **more):
    return LinearHead(w[:, :-1], w[:, -1], NAMES, False, **more)


def head_inputs(backbone):
    return inputs(backbone, split(3, side=16), tuned=(Single(backbone, head(W2, start=head(W1))),))


def product(backbone, w=W, **options):
    w = w.clone().requires_grad_(True)
    strategy, given = MergeTune(**{"alphas": ALPHAS} | options), head_inputs(backbone)
    zero_shot, tuned = strategy.ends(given)
    network = HeadNetwork(tuned.adapter, given.data[0].classes)
    objective = strategy.objective(network, network.prepare(VIEWS), zero_shot, tuned, given)
    draw = torch.Generator().manual_seed(given.seed + 1)  # as the training loop's
    value = sum(objective.terms({"w": w}, X, LABELS, draw))
    value.backward()
    return value.item(), w.grad


def ce(w):
    """Pair by pair: -log of the softmax of weights times features plus bias."""
    total = 0.0
    for x, y in zip(X, LABELS):
        logits = torch.stack([row[:-1] @ x[:-1] + row[-1] for row in w])
        total = total + logits.exp().sum().log() - logits[y]
    return total / len(X)


def literal(surrogate, *, lam, beta, alphas=ALPHAS):
    w = W.clone().requires_grad_(True)
    total = ce(w) + beta * sum(ce(a * w + (1 - a) * W2) for a in alphas) / len(alphas)
    if surrogate == "cosine":
        pull = sum(1 - (r @ s) / (r.norm() * s.norm()) for r, s in zip(w, W1)) / 3
    else:
        weight = torch.ones(3, 6, dtype=torch.float64)
        if surrogate == "fisher":
            weight = torch.zeros(3, 6, dtype=torch.float64)
            for x in VIEWS.reshape(-1, 5):
                x = torch.cat([x, torch.ones(1, dtype=torch.float64)])
                p = (W1 @ x).softmax(0)
                weight += (p * (1 - p))[:, None] * x.square()
            weight /= weight.mean()
        pull = (weight * (w - W1) ** 2).sum() / ((W1**2).sum() + (W2**2).sum())
    total = total + lam * pull
    total.backward()
    return total.item(), w.grad


def agrees(ours, theirs):
    return abs(ours[0] - theirs[0]) < 1e-6 and (ours[1] - theirs[1]).abs().max() < 1e-6


@pytest.mark.parametrize("surrogate", ["cosine", "l2", "fisher"])
def test_the_loss_of_a_head_and_its_gradient_are_those_of_the_formula(small, surrogate):
    ours = product(small, lambda_=3.0, beta=0.7, surrogate=surrogate)
    assert agrees(ours, literal(surrogate, lam=3.0, beta=0.7)) and ours[1].norm() > 1e-3
    if surrogate == "cosine":
        assert agrees(product(small, lambda_=3.0, beta=0.7), ours)  # the default


def test_drawn_points_of_a_heads_path(small):
    alphas = torch.rand(2, generator=torch.Generator().manual_seed(4)).tolist()
    ours = product(small, lambda_=3.0, beta=0.7, alphas=(), n_alpha=2)
    assert agrees(ours, literal("cosine", lam=3.0, beta=0.7, alphas=alphas))


MUTATIONS = {
    "adapters.lines.interpolate": lambda w, w2, alphas: w + alphas.view(-1, 1, 1) * (w2 - w),
    "strategies.mergetune.surrogates.squared": lambda w, w1, fisher=None: 2 * (w - w1).square(),
    "adapters.head_network.inputs_of": lambda head, x: torch.cat([x, 0 * x[..., :1]], -1),
}


@pytest.mark.parametrize("term", MUTATIONS)
def test_a_mutated_term_of_a_head_is_noticed(small, monkeypatch, term):
    surrogate = "fisher" if term.endswith("inputs_of") else "l2"
    expected = literal(surrogate, lam=3.0, beta=0.7)
    monkeypatch.setattr(f"mergekit_vl.{term}", MUTATIONS[term])
    assert not agrees(product(small, lambda_=3.0, beta=0.7, surrogate=surrogate), expected)


def test_each_weight_of_a_head_counts(small):
    expected = literal("l2", lam=3.0, beta=0.7)
    assert not agrees(product(small, lambda_=3.1, beta=0.7, surrogate="l2"), expected)
    assert not agrees(product(small, lambda_=3.0, beta=0.8, surrogate="l2"), expected)


def whole_head(small, **more):
    w1, w2 = (drawn(3, 17, seed=s).float() for s in (1, 2))
    tuned = Single(small, head(w2, start=head(w1)))
    return inputs(small, split(6, side=16), tuned=(tuned,), **more), w1, w2


def test_endpoints_of_tau_of_a_head(small, monkeypatch):
    no_steps(monkeypatch)
    given, w1, w2 = whole_head(small)
    for tau, expected in ((0.0, w1), (1.0, w2), (0.25, 0.75 * w1 + 0.25 * w2)):
        found = MergeTune(tau=tau).merge(given).adapter
        torch.testing.assert_close(torch.cat([found.weight, found.bias[:, None]], 1), expected)


def test_a_strong_pull_ends_at_the_start_of_the_head(small):
    given, w1, w2 = whole_head(small)
    away = {}
    for lam in (0.0, 1000.0):
        strategy = MergeTune(lambda_=lam, beta=0.0, tau=1.0, surrogate="l2", epochs=150, batch=6, lr=0.02)
        found = strategy.merge(given).adapter
        away[lam] = (torch.cat([found.weight, found.bias[:, None]], 1) - w1).norm() / (w2 - w1).norm()
    assert away[1000.0] < 0.05 and away[0.0] > 0.5
    assert torch.equal(given.tuned[0].adapter.weight, w2[:, :-1])


# towers


def moved(weights, by, seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        n: t + by * torch.randn(t.shape, generator=draw) if t.is_floating_point() else t for n, t in weights.items()
    }


def tower_inputs(small, with_head=True):
    own = small.image_weights()
    w1, w2 = (drawn(3, 17, seed=s).float() for s in (1, 2))
    top = replace(head(w2, start=head(w1)), normalise=True, start=replace(head(w1), normalise=True))
    return inputs(
        small, split(6, side=16), tuned=(Single(small, Tower(moved(own, 0.1, 1), top if with_head else None)),)
    )


def terms(given, at, **options):
    """The product's terms at the weights `at`, by the value of each and the gradient of their sum."""
    strategy = MergeTune(**{"alphas": ALPHAS, "lambda_": 3.0, "beta": 0.7} | options)
    network = TowerNetwork(given.tuned[0].backbone, at, Classes(NAMES))
    zero_shot, tuned = strategy.ends(given)
    objective = strategy.objective(network, None, zero_shot, tuned, given)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    values = []
    for term in objective.terms(network.weights, images, torch.tensor([0, 2, 1, 1]), None):
        term.backward()
        values.append(term.item())
    return values, {name: w.grad for name, w in network.weights.items()}, images


@pytest.mark.parametrize("with_head", [True, False])
def test_the_terms_of_a_tower_are_those_of_the_formula(small, with_head):
    given = tower_inputs(small, with_head)
    tuned = given.tuned[0].adapter
    first = {n: t.clone() for n, t in tuned.untuned(small).tensors.items()}
    second = dict(tuned.tensors)
    at = {n: t.clone().requires_grad_(True) for n, t in moved(first, 0.1, 7).items()}
    values, gradients, images = terms(given, tuned.with_tensors({n: t.detach() for n, t in at.items()}))
    labels = torch.tensor([0, 2, 1, 1])
    model = construct(SMALL, "here")
    texts = F.normalize(small.encode_texts([f"a photo of a {n}." for n in NAMES]), dim=-1)

    def literal_ce(weights):
        inside = {n.removeprefix("visual."): t for n, t in weights.items() if n.startswith("visual.")}
        x = torch.func.functional_call(model.visual, inside, (images,))
        x = x / x.norm(dim=-1, keepdim=True)
        if with_head:
            logits = x @ weights["linear_head.weight"].T + weights["linear_head.bias"]
        else:
            logits = model.logit_scale.exp().detach() * x @ texts.T
        return (logits.exp().sum(1).log() - logits[range(4), labels]).mean()

    squares = [sum(((w[n] - first[n]) ** 2).sum() for n in first) for w in (at, second)]
    expected = [3.0 * squares[0] / squares[1], literal_ce(at)]
    expected += [0.7 / 2 * literal_ce({n: a * at[n] + (1 - a) * second[n] for n in at}) for a in ALPHAS]
    assert values == pytest.approx([e.item() for e in expected], rel=1e-4)
    literal_gradients = torch.autograd.grad(sum(expected), list(at.values()))
    for name, gradient in zip(at, literal_gradients):
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)


def test_terms_without_weight_are_not_computed(small):
    given = tower_inputs(small)
    at = given.tuned[0].adapter
    assert [len(terms(given, at, **o)[0]) for o in ({}, {"lambda_": 0.0}, {"beta": 0.0})] == [4, 3, 2]
    assert len(terms(given, at, lambda_=0.0, beta=0.0)[0]) == 1


def test_the_pull_at_the_tuned_tower_is_lambda(small):
    """Whatever else is in its file: a text tower that was tuned too, running statistics far from the first ones."""
    given = tower_inputs(small, with_head=False)
    assert terms(given, given.tuned[0].adapter)[0][0] == pytest.approx(3.0, rel=1e-4)
    whole = Tower(moved(small.model.state_dict(), 0.1, 1))
    given = replace(given, tuned=(Single(small, whole),))
    assert terms(given, whole)[0][0] == pytest.approx(3.0, rel=1e-4)


def test_the_pull_of_a_model_with_running_statistics_is_over_its_parameters():
    class Tiny(Vision):
        def _model(self, where):
            model = timm.create_model("resnet10t", num_classes=3)
            model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, 32, 32), "crop_pct": 1.0}
            return model, ()

    norm = Tiny("resnet10t").build("cpu")
    top = head(drawn(3, 513, seed=1).float(), start=head(drawn(3, 513, seed=2).float()))
    weights = moved(norm.image_weights(), 0.01, 1)
    weights = {n: t + 100 if n.endswith("running_mean") else t for n, t in weights.items()}
    tuned = Single(norm, Tower(weights, top))
    given = inputs(norm, split(6, side=16), tuned=(tuned,))
    assert terms(given, tuned.adapter)[0][0] == pytest.approx(3.0, rel=1e-4)


def test_the_fisher_of_a_tower_has_mean_one_in_its_pull(small, monkeypatch):
    """One that is 7 everywhere changes nothing; the true one weighs every weight that is trained."""
    given = tower_inputs(small)
    at = given.tuned[0].adapter
    asked = []

    def flat(log_p, w1, n, generator):
        asked.append((set(w1), n))
        return {name: torch.full_like(tensor, 7.0) for name, tensor in w1.items()}

    true = terms(given, at, surrogate="fisher", fisher_images=5)[0][0]
    monkeypatch.setattr(fisher_information, "by_sampling", flat)
    assert terms(given, at, surrogate="fisher", fisher_images=5)[0][0] == pytest.approx(3.0, rel=1e-4)
    assert asked == [(set(at.tensors), 5)] and abs(true - 3.0) > 1e-3
    with pytest.raises(UserError, match="surrogate=cosine is not there for towers .l2 or fisher"):
        MergeTune(surrogate="cosine").merge(given)


def test_endpoints_of_tau_of_a_tower(small, monkeypatch):
    no_steps(monkeypatch)
    given = tower_inputs(small)
    tuned = given.tuned[0].adapter
    for tau, expected in ((0.0, tuned.untuned(small)), (1.0, tuned)):
        found = MergeTune(tau=tau).merge(given).adapter
        assert all(torch.equal(found.tensors[n], t) for n, t in expected.tensors.items())


def test_a_strong_pull_ends_near_the_first_tower(small):
    given = tower_inputs(small, with_head=False)
    tuned = given.tuned[0].adapter
    first = tuned.untuned(small).tensors
    before = {n: t.clone() for n, t in tuned.tensors.items()}

    def away(w):
        return sum((w[n] - first[n]).square().sum() for n in first).sqrt()

    found = {}
    for lam in (0.0, 1e4):
        strategy = MergeTune(lambda_=lam, beta=0.0, tau=1.0, epochs=60, batch=6, lr=1e-2)
        found[lam] = float(away(strategy.merge(given).adapter.tensors) / away(before))
    assert found[1e4] < 0.1 < 0.5 < found[0.0]
    assert all(torch.equal(tuned.tensors[n], t) for n, t in before.items())


def test_one_tuned_model_of_a_known_space(small):
    given = tower_inputs(small)
    with pytest.raises(UserError, match="strategy mergetune: one tuned model, not 2"):
        MergeTune().merge(replace(given, tuned=given.tuned * 2))
    with pytest.raises(UserError, match=r"views=-1 \(0 or more\)"):
        MergeTune(views=-1)
