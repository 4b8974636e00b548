"""The diagonal Fisher information of heads and of text features in closed form, with the exact mean over labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def of_head(w: Float[Tensor, "K D1"], x: Float[Tensor, "N D1"]) -> Float[Tensor, "K D1"]:
    """Of a head w [K, D + 1] that reads x [N, D + 1]: mean_i p_ik (1 - p_ik) x_id^2."""
    p = (x @ w.T).softmax(-1)
    return (p * (1 - p)).T @ x.square() / len(x)


def of_text_features(
    text: Float[Tensor, "K D"], images: Float[Tensor, "N D"], scale: Float[Tensor, ""]
) -> Float[Tensor, "K D"]:
    """Of raw text features [K, D], logits scale x . t / |t| of normalised images [N, D]."""
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
    lengths: Tensor = text.norm(dim=-1, keepdim=True)
    return squares.clamp_min(0) * (scale / lengths).square() / len(images)
