"""What stands for the pretraining loss near the model before fine-tuning: distances to it, plain or weighted by a diagonal Fisher.

Near w1, a minimum of a loss nobody has the data for, that loss is about 1/2 (w - w1)^T H (w - w1). An isotropic H makes it a squared
distance; a diagonal one weighs each coordinate by how much the model's answers depend on it. The empirical estimate here is the
diagonal of the Fisher information (Martens 2020, arXiv 1412.1193, section 9): the mean of squared gradients of log p(y | x) over the
few-shot images x, with labels y from the model's own predictions at w1. Where the logits are known in closed form the mean over
labels is taken exactly, else one label is drawn per image. Every estimate is divided by its mean, so that a coefficient in front of
it means the same as in front of the isotropic distance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mergekit_vl.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def of_head(w: Tensor, x: Tensor) -> Tensor:
    """Of a head w [K, D + 1] that reads x [N, D + 1]: mean_i p_ik (1 - p_ik) x_id^2, divided by its mean."""
    p = (x @ w.T).softmax(-1)
    return _mean_one((p * (1 - p)).T @ x.square() / len(x))


def of_text_features(text: Tensor, images: Tensor, scale: Tensor) -> Tensor:
    """Of raw text features [K, D], logits scale x . t / |t| of normalised images [N, D]; divided by its mean."""
    import torch.nn.functional as F

    unit = F.normalize(text, dim=-1)
    cosines = images @ unit.T  # [N, K]
    p = (scale * cosines).softmax(-1)
    q = p * (1 - p)
    # d logit_k / d t_k = scale (x - cos t_hat) / |t|, squared and summed with weights q
    squares = (
        q.T @ images.square()
        - 2 * (q * cosines).T @ images * unit
        + (q * cosines.square()).sum(0)[:, None] * unit.square()
    )
    return _mean_one(squares.clamp_min(0) * (scale / text.norm(dim=-1, keepdim=True)).square() / len(images))


def by_sampling(
    log_p: Callable[[Mapping[str, Tensor], int], Tensor], w1: Mapping[str, Tensor], n: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Of any weights: log_p(weights, i) gives the log-probabilities [K] of image i; one backward per image. Divided by its mean."""
    import torch

    leaves = {name: tensor.detach().clone().requires_grad_(True) for name, tensor in w1.items()}
    total = {name: torch.zeros_like(tensor) for name, tensor in w1.items()}
    for i in range(n):
        logs = log_p(leaves, i)
        label = int(torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator))
        gradients = torch.autograd.grad(logs[label], list(leaves.values()), allow_unused=True)
        for name, gradient in zip(total, gradients):
            if gradient is not None:
                total[name] += gradient.square()
    mean = sum(t.double().sum() for t in total.values()) / sum(t.numel() for t in total.values())
    _check(float(mean))
    return {name: tensor / float(mean) for name, tensor in total.items()}


def _mean_one(fisher: Tensor) -> Tensor:
    mean = fisher.mean()
    _check(float(mean))
    return fisher / mean


def _check(mean: float) -> None:
    if not mean > 0:
        raise UserError(
            "the Fisher information is zero: the model before fine-tuning is certain of every image",
            where="surrogate fisher",
            mend="use surrogate=l2 or cosine",
        )


def squared(w: Tensor, w1: Tensor, fisher: Tensor | None = None) -> Tensor:
    """(w - w1)^2 element by element, weighted by the Fisher where there is one."""
    difference = (w - w1).square()
    return difference if fisher is None else fisher * difference


def cosine(w: Tensor, w1: Tensor) -> Tensor:
    """Mean over rows of 1 - cos."""
    import torch.nn.functional as F

    return (1 - F.cosine_similarity(w, w1, dim=-1)).mean()
