"""DARE with task arithmetic (Yu et al. 2023, "Language models are super Mario", arXiv 2311.03099, section 3: drop and rescale)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.merging.coefficients import Coefficient, coefficient, per_model
from mergekit_vl.merging.task_vectors import keep_at_random
from mergekit_vl.options import option
from mergekit_vl.strategies.sparse import Drop, Ratios, Rescales, density_at, l1_ratios, sparse, summed

Rescale = Literal["density", "l1", "none"]


def dropped(method: Rescales, chunk: Chunk, i: int) -> Array:
    """The task vector of model i without the elements that its draws drop."""
    vector = chunk.task_vectors[i]
    vector *= keep_at_random(chunk, i, density_at(method, chunk, i))
    return vector


def dare(method: Rescales, chunk: Chunk, i: int, ratios: Ratios | None) -> Array:
    """The same, rescaled."""
    vector, density = dropped(method, chunk, i), density_at(method, chunk, i)
    if method.rescale == "density" and 0 < density < 1:
        vector *= vector.dtype.type(1 / density)
    elif ratios is not None:
        vector *= vector.dtype.type(ratios[chunk.tensor.name][i])
    return vector


def ratios(method: Rescales, models: Models, run: Run, chunk_size: int) -> Ratios | None:
    return l1_ratios(method, models, dropped, "elementwise", run, chunk_size)


AT_RANDOM = Drop(dare, ratios, passes=lambda method: int(method.rescale == "l1"))


@sparse("dare_linear", AT_RANDOM, alone={"density": 1.0, "scale": 1.0})
@dataclass(frozen=True)
class DareLinear:
    """base + scale * sum_i w_i * DARE(task vector i): each element is dropped with probability 1 - density, the rest divided by density.

    Draws are counter-based (`task_vectors.draw`), so the result depends on the seed and not on the machine.
    mergekit's variant: rescale=l1 scale=1, weights per model. PEFT's and the paper's: rescale=density.
    """

    density: Coefficient = coefficient(0.1, "share that is kept; the paper drops 0.9 and more", low=0, high=1)
    densities: tuple[Coefficient, ...] = per_model("one per tuned model, instead of `density`", instead_of="density")
    weights: tuple[Coefficient, ...] = per_model("one per tuned model; empty: all 1")
    scale: Coefficient = coefficient(0.4, "of the sum, as in task arithmetic")
    rescale: Rescale = option("density", "divide by density, or match the task vector's L1 norm in each tensor")

    grid = {"density": (0.1, 0.3, 0.5), "scale": (0.2, 0.4, 0.7)}

    def merge_chunk(self, chunk: Chunk, stats: Ratios | None) -> Array:
        return summed(self, chunk, AT_RANDOM.vectors(self, chunk, stats))
