"""A timm model cut before its classifier, and that classifier as one matrix."""

from __future__ import annotations

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from mergekit_vl.backbones.backbone import Classifier


class TimmFeatures(nn.Module):
    """Images to what the classifier reads: [B, D], or both tokens of a distilled DeiT, [B, 2 D]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        x = self.model.forward_features(images)
        if isinstance(self.model, VisionTransformerDistilled):
            return x[:, :2].flatten(1)
        return self.model.forward_head(x, pre_logits=True)


def own_classifier(model: nn.Module, features: Tensor, logits: Tensor) -> Classifier | None:
    """The model's own head as one matrix, or None where that does not turn these features [B, D] into these logits [B, K]."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    linears = [head.fuse() if hasattr(head, "fuse") else head for head in heads]  # LeViT's begin with a BatchNorm
    if not all(isinstance(head, nn.Linear) for head in linears):
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
