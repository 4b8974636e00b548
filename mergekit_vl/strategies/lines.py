"""LiNeS, layer-increasing network scaling (Wang et al. 2024, arXiv 2410.17146, eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Tensor
from mergekit_vl.merging.coefficients import coefficient, in_block
from mergekit_vl.merging.task_vectors import weighted_sum
from mergekit_vl.options import option
from mergekit_vl.strategies.closed_form import closed_form


@closed_form("lines", chunks="accumulating", needs_base=True, alone={"alpha": 1.0, "beta": 0.0})
@dataclass(frozen=True)
class Lines:
    """base + lambda_l * the task vector, or the sum of several, with lambda_l = alpha + beta (l - 1) / (L - 1) in block l of L.

    Of one task vector (or the mean of several) the paper takes beta = 1 - alpha, the last block as it was tuned, and searches alpha; of a
    sum of N it takes alpha = 1/N, the mean in the first block, and searches beta. What is empty here follows that, with alpha = 0.5 and
    beta = 1 - alpha, ours, for what is searched. Blocks are counted in each tower. What is in no block (all of a prompt, for one) takes
    alpha, as in the released code; `outside=depth` gives what comes after the blocks the last one's factor. On a merged vector that is no sum (the paper's TIES
    with LiNeS), write its scale as a gradient: `ties scale=[alpha, alpha + beta]`.
    """

    alpha: float | None = coefficient(None, "factor of the first block; empty: 1 / N for a sum of N > 1, otherwise 0.5")
    beta: float | None = coefficient(None, "what the last block's factor has more; empty: 1 - alpha")
    combine: Literal["sum", "mean"] = option("sum", "of several task vectors")
    outside: Literal["alpha", "depth"] = option("alpha", "factor of what is in no block: alpha, or by its depth")

    grid = {"alpha": (0.1, 0.3, 0.5), "beta": (0.2, 0.5, 0.8)}

    def merge_chunk(self, chunk: Chunk, stats: object) -> Array:
        n = len(chunk.tuned)
        factor = self.factor(chunk.tensor, n) / (n if self.combine == "mean" else 1)
        return weighted_sum(chunk.members, (1 - n * factor, *(factor,) * n))

    def factor(self, tensor: Tensor, n: int) -> float:
        """lambda of a tensor, for n task vectors."""
        alpha = self.alpha
        if alpha is None:
            alpha = 1 / n if n > 1 and self.combine == "sum" else 0.5
        beta = 1 - alpha if self.beta is None else self.beta
        return alpha + beta * tensor.depth if in_block(tensor.name) or self.outside == "depth" else alpha
