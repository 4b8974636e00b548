"""DARE with task arithmetic (Yu et al. 2023, "Language models are super Mario", arXiv 2311.03099, section 3: drop and rescale)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.merging.coefficients import Coefficient
from mergekit_vl.merging.task_vectors import (
    add_to_base,
    check_task_vectors,
    each_density,
    keep_at_random,
    l1_ratios,
    weighted_sum,
)
from mergekit_vl.options import option
from mergekit_vl.strategies.in_memory import merge_adapters

WHERE = "strategy dare_linear"
Rescale = Literal["density", "l1", "none"]


@dataclass(frozen=True)
class DareLinear:
    """base + scale * sum_i w_i * DARE(task vector i): each element is dropped with probability 1 - density, the rest divided by density.

    Draws are counter-based (`task_vectors.draw`), so the result depends on the seed and on nothing of the machine.
    mergekit's variant: rescale=l1 scale=1, weights per model. PEFT's and the paper's: rescale=density.
    """

    density: Coefficient = option(0.1, "share that is kept; the paper drops 0.9 and more")
    densities: tuple[Coefficient, ...] = option((), "one per tuned model, instead of `density`")
    weights: tuple[Coefficient, ...] = option((), "one per tuned model; empty: all 1")
    scale: Coefficient = option(0.4, "of the sum, as in task arithmetic")
    rescale: Rescale = option("density", "divide by density, or match the task vector's L1 norm in each tensor")

    grid = {"density": (0.1, 0.3, 0.5), "scale": (0.2, 0.4, 0.7)}

    form, averages = "elementwise", False

    @property
    def passes(self) -> int:
        return int(self.rescale == "l1")

    def held(self, n: int) -> int:
        return 2 * n + 4

    def check(self, models: Models) -> None:
        check_task_vectors(WHERE, self, models)

    merge = merge_adapters

    def prepass(self, models: Models, run: Run, chunk_size: int) -> Any:
        return l1_ratios(models, self, dropped, run, chunk_size) if self.rescale == "l1" else None

    def merge_chunk(self, chunk: Chunk, stats: Any) -> Array:
        vectors = [dare(self, chunk, i, stats) for i in range(len(chunk.models.tuned))]
        return add_to_base(chunk, weighted_sum(vectors, chunk.weights(self.weights)), chunk.at(self.scale))


def dropped(method: Any, chunk: Chunk, i: int) -> Array:
    """The task vector of model i without the elements that its draws drop."""
    vector = chunk.delta(i)
    vector *= keep_at_random(chunk, i, chunk.at(each_density(method, chunk.models)[i]))
    return vector


def dare(method: Any, chunk: Chunk, i: int, stats: Any) -> Array:
    """The same, rescaled; `method` is this or `dare_ties`."""
    vector = dropped(method, chunk, i)
    density = chunk.at(each_density(method, chunk.models)[i])
    if method.rescale == "density" and 0 < density < 1:
        vector *= vector.dtype.type(1 / density)
    elif method.rescale == "l1":
        vector *= vector.dtype.type(stats[chunk.tensor.name][i])
    return vector
