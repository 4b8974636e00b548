"""Temperature scaling (Guo et al. 2017, "On calibration of modern neural networks", arXiv 1706.04599, section 4.2), and the golden-section search that fits it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

COLDEST, HOTTEST = 0.1, 100.0
"""Bounds of a temperature: where every image is right, the likelihood grows without end as it falls."""


def temperature(logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"]) -> float:
    """The T with the least mean of -log softmax(logits / T)[label], which is convex in 1 / T; logits [B, K], labels [B]."""
    import torch
    import torch.nn.functional as F

    logits = logits.double()
    low, high = torch.tensor([COLDEST, HOTTEST], dtype=torch.float64).log()
    return float(golden_section(lambda t: F.cross_entropy(logits / t.exp(), labels), low, high).exp())


def golden_section(loss: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The point between `low` and `high` with the least loss, of a loss that falls and then rises."""
    ratio = (5**0.5 - 1) / 2
    for _ in range(60):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return (low + high) / 2
