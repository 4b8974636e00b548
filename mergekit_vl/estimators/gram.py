"""Gram matrices X^T X of the inputs of every linear map in an image tower.

A dispatch mode sees every product with a weight, whatever module or function makes it: nn.Linear, the attention's packed in_proj and its
out_proj, which no hook on a Linear sees, projections that are bare parameters, and convolutions whose windows do not overlap (1 x 1 kernels;
patch embeddings and other kernels as wide as their stride), which are linear maps of patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mergekit_vl.models.model import ImageEncoder
from mergekit_vl.models.views import eval_view, prefetched

if TYPE_CHECKING:
    from mergekit_vl.datasets.base import Split
    from mergekit_vl.models.model import Single
    from mergekit_vl.reporter import Reporter

BATCH = 32
aten = torch.ops.aten


@dataclass
class Gram:
    """Of one weight: the sum over rows x [in] of what it read of x x^T."""

    sum: Tensor
    rows: int
    transposed: bool
    """Whether the weight is stored as [in, out]."""

    @property
    def mean(self) -> Tensor:
        return self.sum / self.rows


@dataclass
class Grams:
    """Sums by the weight's name."""

    weights: Mapping[str, Tensor]
    found: dict[str, Gram] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {weight.data_ptr(): name for name, weight in self.weights.items()}

    def observe(self, x: Tensor, used: Tensor) -> None:
        """x [..., in] was multiplied by `used` [in, out], if that is one of the weights."""
        name = self.names.get(used.data_ptr())
        if name is None:
            return
        weight = self.weights[name]
        shape = tuple(weight.flatten(1).shape)  # a kernel [out, in, h, w] as [out, in h w]
        if weight.ndim == 2 and used.shape == weight.shape and used.stride() == weight.stride() and used.stride(1) == 1:
            transposed = True
        elif tuple(used.shape[::-1]) == shape:
            transposed = False
        else:
            return  # a part of it
        x = x.reshape(-1, x.shape[-1]).float()
        gram = self.found.setdefault(name, Gram(torch.zeros(2 * (x.shape[1],), device=x.device), 0, transposed))
        gram.sum += x.T @ x
        gram.rows += len(x)


class _Seen(TorchDispatchMode):
    def __init__(self, grams: Grams) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.grams = grams

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        if func is aten.addmm.default:
            self.grams.observe(args[1], args[2])
        elif func is aten.mm.default:
            self.grams.observe(args[0], args[1])
        elif func is aten.bmm.default and args[1].stride(0) == 0:  # one weight for the whole batch
            self.grams.observe(args[0], args[1][0])
        elif func is aten.linear.default:
            self.grams.observe(args[0], args[1].T)
        elif func is aten.convolution.default:
            self._convolution(*args)
        return out

    def _convolution(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
    ) -> None:
        kernel = list(weight.shape[2:])
        if weight.ndim != 4 or groups != 1 or transposed or any(padding) or (kernel != [1, 1] and kernel != stride):
            return
        patches = torch.nn.functional.unfold(x, tuple(kernel), stride=tuple(stride))  # [B, in h w, L]
        self.grams.observe(patches.mT, weight.flatten(1).T)


@torch.no_grad()
def of_tower(model: Single, images: Split, rows: list[int], reporter: Reporter) -> tuple[dict[str, Gram], Tensor]:
    """Gram matrices by names in the backbone's model, of a tower at its own weights, and its features [N, D]."""
    backbone = model.encoders[0].backbone
    path = ImageEncoder(backbone)
    inside = {tensor.data_ptr() for tensor in backbone.image.parameters()}
    weights = {n: p for n, p in backbone.model.named_parameters() if p.ndim in (2, 4) and p.data_ptr() in inside}
    grams, features = Grams(weights), []

    def view(i: int) -> Tensor:
        return eval_view(images.source.load(int(images.rows[rows[i]])), path)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation, whose products nobody sees
    try:
        for batch in prefetched(view, len(rows), BATCH):
            with _Seen(grams):
                x = backbone.image(batch.to(backbone.device))
            features.append((x[0] if isinstance(x, tuple) else x).float())
            reporter.progress(min(len(features) * BATCH, len(rows)), len(rows), "Gram matrices")
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return grams.found, torch.cat(features)
