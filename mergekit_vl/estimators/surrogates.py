"""Surrogates of the pretraining loss near the model before fine-tuning: squared distances to it, plain or weighted by a diagonal Fisher.

Near its minimum w1, the pretraining loss is about 1/2 (w - w1)^T H (w - w1); its data are not available. An isotropic H makes it a squared
distance; a diagonal one weighs each coordinate by how much the model's answers depend on it (`fisher_information.py`). It is divided by its
mean, so that a coefficient in front of it means the same as in front of the isotropic distance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergekit_vl.errors import Unsuitable

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def mean_one(fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divided by its mean over all elements; raises UserError where that is zero."""
    mean = float(sum(t.double().sum() for t in fisher.values()) / sum(t.numel() for t in fisher.values()))
    if not mean > 0:
        raise Unsuitable(
            "the Fisher information is zero: the model before fine-tuning is certain of every image",
            where="surrogate fisher",
            hint="use surrogate=l2 or cosine",
        )
    return {name: tensor / mean for name, tensor in fisher.items()}


def squared(
    w: Float[Tensor, "*shape"], w1: Float[Tensor, "*shape"], fisher: Float[Tensor, "*shape"] | None = None
) -> Float[Tensor, "*shape"]:
    """(w - w1)^2 element by element, weighted by the Fisher where there is one."""
    difference = (w - w1).square()
    return difference if fisher is None else fisher * difference


def cosine(w: Float[Tensor, "*rows D"], w1: Float[Tensor, "*rows D"]) -> Float[Tensor, ""]:
    """Mean over rows of 1 - cos."""
    import torch.nn.functional as F

    return (1 - F.cosine_similarity(w, w1, dim=-1)).mean()
