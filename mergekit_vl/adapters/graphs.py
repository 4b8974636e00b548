"""CUDA graphs: the many small kernels of a training step are launched together instead of one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def graphed(work: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`work` with its forward and its backward captured as CUDA graphs, once for each shape of its argument.

    A short text forward is a thousand launches, which take a CPU about ten times as long as the GPU needs for the work (docs/gpu.md).
    What it gives lies where the next call writes: a step has to end with its backward before the next one begins. Without
    gradients `work` itself runs.
    """
    import torch

    captured: dict[torch.Size, Callable[[Tensor], Tensor]] = {}

    def call(x: Tensor) -> Tensor:
        if not x.requires_grad:
            return work(x)
        if x.shape not in captured:
            sample = x.detach().clone().requires_grad_(True)
            captured[x.shape] = cast("Callable[[Tensor], Tensor]", torch.cuda.make_graphed_callables(work, (sample,)))
        return captured[x.shape](x)

    return call
