"""TIES-Merging (Yadav et al. 2023, arXiv 2306.01708, algorithm 1: trim, elect sign, disjoint merge)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import UserError
from mergekit_vl.merging.chunks import Chunk, Models, Run, Tensor
from mergekit_vl.merging.coefficients import Coefficient, coefficient, per_model, value_at
from mergekit_vl.merging.prepass import delta, magnitude, model_ranks, tensor_ranks
from mergekit_vl.options import option
from mergekit_vl.strategies.sparse import Drop, Sparse, each_density, elected, sparse


class Trims(Sparse, Protocol):
    @property
    def trim(self) -> Literal["model", "tensor"]: ...


Thresholds = list[float] | dict[str, list[float]]
"""Per model, or by tensor and model."""


def check_trim(where: str, method: Trims, models: Models) -> None:
    if method.trim == "model" and not all(isinstance(density, float) for density in each_density(method, models)):
        raise UserError("one density for the whole model", where=where, hint="give a number, or set trim=tensor")


def smallest_kept(size: int, density: float) -> list[int]:
    """The ascending position of the smallest of the `density` largest of `size` magnitudes; none where nothing is kept."""
    return [size - max(1, int(density * size))] if density > 0 and size else []


def thresholds(method: Trims, models: Models, run: Run, chunk_size: int) -> Thresholds:
    """The smallest magnitude that is kept."""
    densities = each_density(method, models)
    if method.trim == "model":
        size = sum(t.size for t in models.tensors if not t.tied_to)
        positions = [smallest_kept(size, value_at(density, "", 0.0)) for density in densities]  # numbers: `check_trim`
        return [ranks[0] if ranks else np.inf for ranks in model_ranks(models, delta, positions, run, chunk_size)]

    def position(tensor: Tensor, i: int) -> list[int]:
        return smallest_kept(tensor.size, value_at(densities[i], tensor.name, tensor.depth))

    by_tensor = tensor_ranks(models, delta, position, run, chunk_size)
    return {name: [ranks[0] if ranks else np.inf for ranks in found] for name, found in by_tensor.items()}


def trimmed(method: Trims, chunk: Chunk, i: int, stats: Thresholds) -> Array:
    """The task vector of model i without the elements that are smaller than its threshold."""
    vector = chunk.task_vectors[i]
    vector *= magnitude(vector) >= (stats[chunk.tensor.name] if isinstance(stats, dict) else stats)[i]
    return vector


TRIM = Drop(trimmed, thresholds, passes=lambda method: 2, check=check_trim)


@sparse("ties", TRIM, alone={"density": 1.0})
@dataclass(frozen=True)
class Ties:
    """base + scale * disjoint mean of the task vectors, each trimmed to its largest magnitudes, over the models of the elected sign.

    The defaults are the paper's: the largest `density` of a whole task vector is kept, its sign is elected by the trimmed vectors'
    sum, and scale is 1 (section 4.2, no validation set). Elements that equal the threshold are all kept. Departures: a sum of
    exactly zero elects no sign, since sgn(0) = 0, where the released code takes the sign of the whole; `weights`
    (not in the paper) make the disjoint mean a weighted one.
    mergekit's variant: trim=tensor elect=weighted. PEFT's: trim=tensor elect=raw, its mean without weights.
    """

    density: Coefficient = coefficient(0.2, "share of each task vector that is kept", low=0, high=1)
    densities: tuple[Coefficient, ...] = per_model("one per tuned model, instead of `density`", instead_of="density")
    weights: tuple[Coefficient, ...] = per_model("one per tuned model; empty: all 1")
    scale: Coefficient = coefficient(1.0, "lambda, of the merged task vector")
    trim: Literal["model", "tensor"] = option("model", "keep the largest of the whole model, or of each tensor")
    elect: Literal["raw", "weighted"] = option("raw", "elect the sign before or after the weights")
    mean: bool = option(True, "mean over the agreeing models; false: their sum")

    grid = {"density": (0.1, 0.2, 0.5), "scale": (0.3, 0.6, 1.0)}

    def merge_chunk(self, chunk: Chunk, stats: Thresholds) -> Array:
        return elected(self, chunk, TRIM.vectors(self, chunk, stats))
