"""Model Breadcrumbs (Davari & Belilovsky 2023, arXiv 2312.06795, section 3: mask both tails of each layer's task vector)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import UserError
from mergekit_vl.merging.chunks import Chunk, Models, Run, Tensor
from mergekit_vl.merging.coefficients import Coefficient, coefficient, per_model, value_at
from mergekit_vl.merging.prepass import delta, magnitude, tensor_ranks
from mergekit_vl.strategies.sparse import Drop, Sparse, each_density, sparse, summed


class Masks(Sparse, Protocol):
    @property
    def gamma(self) -> float: ...


Bounds = dict[str, list[list[float]]]
"""By tensor and model, the smallest and the largest magnitude that stay; none where nothing does."""


def check_tails(where: str, method: Masks, models: Models) -> None:
    for density in each_density(method, models):
        for tensor in models.tensors:
            if value_at(density, tensor.name, tensor.depth) + method.gamma > 1:
                told = f"density + gamma exceed 1 at gamma={method.gamma:g}"
                raise UserError(told, where=where, hint="lower one of them")


def tails(method: Masks, models: Models, run: Run, chunk_size: int) -> Bounds:
    densities = each_density(method, models)

    def positions(tensor: Tensor, i: int) -> list[int]:
        kept = int(value_at(densities[i], tensor.name, tensor.depth) * tensor.size)
        below = tensor.size - kept - int(method.gamma * tensor.size)
        return [below, below + kept - 1] if kept else []

    return tensor_ranks(models, delta, positions, run, chunk_size)


def masked(method: Masks, chunk: Chunk, i: int, stats: Bounds) -> Array:
    """The task vector of model i between the bounds of its magnitudes."""
    vector, bounds = chunk.task_vectors[i], stats[chunk.tensor.name][i]
    size = magnitude(vector)
    vector *= (size >= bounds[0]) & (size <= bounds[1]) if bounds else False
    return vector


TAILS = Drop(masked, tails, passes=lambda method: 2, check=check_tails)


@sparse("breadcrumbs", TAILS, alone={"density": 1.0, "gamma": 0.0, "scale": 1.0})
@dataclass(frozen=True)
class Breadcrumbs:
    """base + scale * sum_i w_i * masked task vector i: in each tensor the largest `gamma` and the smallest are masked, `density` stays.

    The paper writes the masks as quantiles beta (below) and gamma (above) of the magnitudes of a layer; here density = 1 - beta - (1 - its
    gamma). Departures: a layer is a tensor; magnitudes equal to a threshold all stay; the default scale is ours, the paper searches it.
    mergekit's variant: scale=1, weights per model.
    """

    density: Coefficient = coefficient(0.14, "share that is kept (beta = 0.85 masked below)", low=0, high=1)
    densities: tuple[Coefficient, ...] = per_model("one per tuned model, instead of `density`", instead_of="density")
    gamma: float = coefficient(0.01, "share of the largest magnitudes that is masked", low=0, high=1)
    weights: tuple[Coefficient, ...] = per_model("one per tuned model; empty: all 1")
    scale: Coefficient = coefficient(0.3, "alpha, of the sum")

    grid = {"density": (0.14, 0.3, 0.6), "scale": (0.3, 0.6, 1.0)}

    def merge_chunk(self, chunk: Chunk, stats: Bounds) -> Array:
        return summed(self, chunk, TAILS.vectors(self, chunk, stats))
