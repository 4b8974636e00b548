"""A timm model cut before its classifier, and that classifier as one matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from mergekit_vl.backbones.backbone import Classifier

if TYPE_CHECKING:
    from jaxtyping import Float

    class TimmModel(nn.Module):
        """What all of timm's image models have; timm names no class for it."""

        def forward_features(self, x: Tensor) -> Tensor: ...
        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor: ...
        def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]: ...
        def reset_classifier(self, num_classes: int) -> None: ...


class TimmFeatures(nn.Module):
    """Images to what the classifier reads: [B, D], or both tokens of a distilled DeiT, [B, 2 D]."""

    def __init__(self, model: TimmModel) -> None:
        super().__init__()
        self.model = model
        self.both_tokens = isinstance(model, VisionTransformerDistilled)

    def forward(self, images: Tensor) -> Tensor:
        x = self.model.forward_features(images)
        return x[:, :2].flatten(1) if self.both_tokens else self.model.forward_head(x, pre_logits=True)


def own_classifier(model: TimmModel, features: Float[Tensor, "B D"], logits: Float[Tensor, "B K"]) -> Classifier | None:
    """The model's own head as one matrix, or None where that does not turn these features [B, D] into these logits [B, K]."""
    found = model.get_classifier()
    heads = found if isinstance(found, tuple) else (found,)
    fused = [_fused(head) for head in heads]
    linears = [head for head in fused if isinstance(head, nn.Linear)]
    if len(linears) < len(fused):
        return None
    weights = [head.weight for head in linears]
    if isinstance(model, VisionTransformerDistilled):
        weight = torch.cat(weights, 1) / len(weights)
    else:
        weight = torch.stack(weights).mean(0)
    bias = torch.stack([torch.zeros(len(weight)) if head.bias is None else head.bias for head in linears]).mean(0)
    if weight.shape[1] != features.shape[1]:
        return None
    if not torch.allclose(features @ weight.T + bias, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
        return None
    return Classifier(weight.detach().clone(), bias.detach().clone())


def _fused(head: nn.Module) -> nn.Module:
    """One linear map: LeViT's heads begin with a BatchNorm."""
    fuse: Callable[[], nn.Module] | None = getattr(head, "fuse", None)
    return head if fuse is None else fuse()
