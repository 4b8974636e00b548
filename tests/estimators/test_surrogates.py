"""The diagonal Fisher information against its definition, gradient by gradient; the distances that it weighs."""

import pytest
import torch
import torch.nn.functional as F

from mergekit_vl.adapters import exact_fisher
from mergekit_vl.errors import UserError
from mergekit_vl.estimators import fisher_information, surrogates

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(7, 4, generator=DRAW)
W = torch.randn(3, 4, generator=DRAW)


def definition(log_p, w):
    """mean_i sum_y p(y | x_i) (d log p(y | x_i) / dw)^2."""
    total = torch.zeros_like(w)
    for i in range(len(X)):
        for y in range(3):
            leaf = w.clone().requires_grad_(True)
            logs = log_p(leaf, i)
            (gradient,) = torch.autograd.grad(logs[y], leaf)
            total += logs[y].exp().detach() * gradient.square() / len(X)
    return total


def test_of_a_head():
    torch.testing.assert_close(exact_fisher.of_head(W, X), definition(lambda w, i: (X[i] @ w.T).log_softmax(-1), W))


def test_of_text_features():
    images = F.normalize(X, dim=-1)
    expected = definition(lambda w, i: (5 * images[i] @ F.normalize(w, dim=-1).T).log_softmax(-1), W)
    torch.testing.assert_close(
        exact_fisher.of_text_features(W, images, torch.tensor(5.0)), expected, rtol=1e-4, atol=1e-5
    )


def test_sampling_comes_to_the_same():
    """600 passes over the images with one drawn label each."""
    log_p = lambda w, i: (X[i % 7] @ w["w"].T).log_softmax(-1)  # noqa: E731
    found = fisher_information.by_sampling(log_p, {"w": W}, 7 * 600, torch.Generator().manual_seed(1))["w"]
    exact = exact_fisher.of_head(W, X)
    assert (found - exact).abs().max() < 0.15 * exact.mean()


def test_distances_by_hand():
    w, w1 = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert surrogates.squared(w, w1).tolist() == [[1.0, 1.0]]
    assert surrogates.squared(w, w1, torch.tensor([[0.5, 1.5]])).tolist() == [[0.5, 1.5]]
    assert surrogates.cosine(w, w1) == pytest.approx(1 - 24 / 25)


def test_a_model_that_is_certain_has_no_information():
    assert surrogates.mean_one({"a": torch.tensor([1.0]), "b": torch.tensor([2.0, 6.0])})[
        "b"
    ].tolist() == pytest.approx([2 / 3, 2.0])
    with pytest.raises(UserError, match="the Fisher information is zero"):
        surrogates.mean_one({"w": exact_fisher.of_head(torch.zeros(1, 4), X)})
