"""Segments between two models (`models.adapter.Line`), in each space of the table in `strategies/mergetune.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_vl.adapters import exact_fisher

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    Tensors = Mapping[str, Tensor]
    Encode = Callable[[Tensors], Tensor]
    """Tensors by name, perhaps with a leading [S] -> raw text features [K, D] or [S, K, D]."""


def interpolate(
    w: Float[Tensor, "*shape"], w2: Float[Tensor, "*shape"], alphas: Float[Tensor, " A"]
) -> Float[Tensor, " A *shape"]:
    """w2 + alpha (w - w2) for each alpha: [A, *w.shape], one batched product."""
    return w2 + alphas.view(-1, *[1] * w.ndim) * (w - w2)


def cosine_logits(
    scale: Float[Tensor, ""], text: Float[Tensor, "*S K D"], images: Float[Tensor, "B D"]
) -> Float[Tensor, "*S B K"]:
    """Text [..., K, D] raw, images [B, D] normalised -> [..., B, K]. SigLIP's bias is left out: it is the same for all classes."""
    import torch.nn.functional as F

    return scale * images @ F.normalize(text, dim=-1).transpose(-1, -2)


@dataclass(frozen=True)
class TextLine:
    """Of classifiers: w are raw text features [K, D], normalised after the interpolation, as the classifier does."""

    encode: Encode
    scale: Tensor
    text1: Tensor
    text2: Tensor

    @property
    def first(self) -> Tensors:
        return {"text": self.text1}

    def unit(self, *, weighted: bool) -> float:
        return 2 * float(self.text1.square().sum()) if weighted else len(self.text1)

    def fisher(self, x: Tensor) -> Tensors:
        return {"text": exact_fisher.of_text_features(self.text1, x, self.scale)}

    def at(self, weights: Tensors, alphas: Tensor, x: Tensor) -> tuple[Tensors, Iterator[Tensor]]:
        text = self.encode(weights)  # [K, D]: the one text forward of a step
        points = interpolate(text, self.text2, alphas)  # [A, K, D]
        return {"text": text}, (cosine_logits(self.scale, each, x) for each in (text, points))


@dataclass(frozen=True)
class TextWeightLine:
    """Of the weights that make text features: a step encodes w and all points at once."""

    encode: Encode
    scale: Tensor
    first: Tensors
    second: Tensors

    def unit(self, *, weighted: bool) -> float:
        return 1.0

    def fisher(self, x: Tensor) -> None:
        return None

    def at(self, weights: Tensors, alphas: Tensor, x: Tensor) -> tuple[Tensors, Iterator[Tensor]]:
        import torch

        stacked = {n: torch.cat([w[None], interpolate(w, self.second[n], alphas)]) for n, w in weights.items()}
        text, *points = self.encode(stacked)  # [1 + A, K, D]
        there = [torch.stack(points)] if points else []
        return weights, (cosine_logits(self.scale, each, x) for each in (text, *there))


@dataclass(frozen=True)
class HeadLine:
    """Of linear heads w [K, D + 1]: logits are linear in w, so those of a point lie between its ends' and cost nothing."""

    w1: Tensor
    w2: Tensor

    @property
    def first(self) -> Tensors:
        return {"w": self.w1}

    def unit(self, *, weighted: bool) -> float:
        return float((self.w1.square() + self.w2.square()).sum())

    def fisher(self, x: Tensor) -> Tensors:
        return {"w": exact_fisher.of_head(self.w1, x)}

    def at(self, weights: Tensors, alphas: Tensor, x: Tensor) -> tuple[Tensors, Iterator[Tensor]]:
        z, z2 = x @ weights["w"].T, x @ self.w2.T  # [B, K]
        return weights, iter((z, interpolate(z, z2, alphas)))


@dataclass(frozen=True)
class TowerLine:
    """Of towers: each point is a forward of its own, made when it is asked for."""

    logits: Callable[[Tensors, Tensor], Tensor]
    first: Tensors
    second: Tensors
    apart: Tensor
    """|w2 - w1|^2 over what is trained."""

    def unit(self, *, weighted: bool) -> Tensor:
        return self.apart

    def fisher(self, x: Tensor) -> None:
        return None

    def at(self, weights: Tensors, alphas: Tensor, x: Tensor) -> tuple[Tensors, Iterator[Tensor]]:
        return weights, self._logits(weights, alphas, x)

    def _logits(self, weights: Tensors, alphas: Tensor, x: Tensor) -> Iterator[Tensor]:
        yield self.logits(weights, x)
        for alpha in alphas:
            point = {name: self.second[name] + alpha * (w - self.second[name]) for name, w in weights.items()}
            yield self.logits(point, x)[None]
