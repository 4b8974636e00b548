"""Model Breadcrumbs (Davari & Belilovsky 2023, arXiv 2312.06795, section 3: mask both tails of each layer's task vector)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import UserError
from mergekit_vl.merging.chunks import Chunk, Models, Run, Tensor
from mergekit_vl.merging.coefficients import Coefficient, value_at
from mergekit_vl.merging.prepass import delta, magnitude, tensor_ranks
from mergekit_vl.merging.task_vectors import add_to_base, check_task_vectors, each_density, weighted_sum
from mergekit_vl.options import option
from mergekit_vl.strategies.in_memory import merge_adapters

WHERE = "strategy breadcrumbs"


@dataclass(frozen=True)
class Breadcrumbs:
    """base + scale * sum_i w_i * masked task vector i: in each tensor the largest `gamma` and the smallest are masked, `density` stays.

    The paper writes the masks as quantiles beta (below) and gamma (above) of the magnitudes of a layer; here density = 1 - beta - (1 - its
    gamma). Departures: a layer is a tensor; magnitudes equal to a threshold all stay; the default scale is ours, the paper searches it.
    mergekit's variant: scale=1, weights per model.
    """

    density: Coefficient = option(0.14, "share that is kept (beta = 0.85 masked below)")
    densities: tuple[Coefficient, ...] = option((), "one per tuned model, instead of `density`")
    gamma: float = option(0.01, "share of the largest magnitudes that is masked")
    weights: tuple[Coefficient, ...] = option((), "one per tuned model; empty: all 1")
    scale: Coefficient = option(0.3, "alpha, of the sum")

    grid = {"density": (0.14, 0.3, 0.6), "scale": (0.3, 0.6, 1.0)}

    form, averages, passes = "elementwise", False, 2

    def held(self, n: int) -> int:
        return n + 5

    def check(self, models: Models) -> None:
        check_task_vectors(WHERE, self, models)
        check_tails(WHERE, self, models)

    merge = merge_adapters

    def prepass(self, models: Models, run: Run, chunk_size: int) -> Any:
        return tails(self, models, run, chunk_size)

    def merge_chunk(self, chunk: Chunk, stats: Any) -> Array:
        vectors = [masked(chunk, i, bounds) for i, bounds in enumerate(stats[chunk.tensor.name])]
        return add_to_base(chunk, weighted_sum(vectors, chunk.weights(self.weights)), chunk.at(self.scale))


def check_tails(where: str, method: Any, models: Models) -> None:
    models.check_coefficient(where, method.gamma, "gamma", 0, 1)
    for density in each_density(method, models):
        for tensor in models.tensors:
            if value_at(density, tensor.name, tensor.depth) + method.gamma > 1:
                raise UserError(
                    f"density + gamma exceed 1 at gamma={method.gamma:g}", where=where, hint="lower one of them"
                )


def tails(method: Any, models: Models, run: Run, chunk_size: int) -> dict[str, Any]:
    """By tensor and model, the smallest and the largest magnitude that stay; none where nothing does."""
    densities = each_density(method, models)

    def positions(tensor: Tensor, i: int) -> list[int]:
        kept = int(value_at(densities[i], tensor.name, tensor.depth) * tensor.size)
        below = tensor.size - kept - int(method.gamma * tensor.size)
        return [below, below + kept - 1] if kept else []

    return tensor_ranks(models, delta, positions, run, chunk_size)


def masked(chunk: Chunk, i: int, bounds: list[float]) -> Array:
    """The task vector of model i between the bounds of its magnitudes."""
    vector = chunk.delta(i)
    size = magnitude(vector)
    vector *= (size >= bounds[0]) & (size <= bounds[1]) if bounds else False
    return vector
