"""Sparse task vectors: (what is dropped of each) x (how the rest is combined).

`Drop` is the first factor, `summed` and `elected` are the second; a method of the family names one of each:

    @sparse("dare_ties", AT_RANDOM)
    @dataclass(frozen=True)
    class DareTies:
        ...options: density, densities, weights, scale, and what its two parts read...

        def merge_chunk(self, chunk, stats):
            return elected(self, chunk, AT_RANDOM.vectors(self, chunk, stats))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models, PerModel, Run
from mergekit_vl.merging.coefficients import Coefficient
from mergekit_vl.merging.method import Chunks, MethodInfo
from mergekit_vl.merging.prepass import absolute_sums
from mergekit_vl.merging.task_vectors import add_to_base, agreeing, weighted_sum
from mergekit_vl.strategies.closed_form import closed_form

Cls = TypeVar("Cls", bound=type)


class Sparse(Protocol):
    """The options that all of the family have."""

    density: Coefficient
    densities: tuple[Coefficient, ...]
    weights: tuple[Coefficient, ...]
    scale: Coefficient


@dataclass(frozen=True)
class Drop:
    """What is dropped of a task vector, and what becomes of the rest. `method` is the strategy, whose options its functions read."""

    vector: Callable[[Any, Chunk, int, Any], Array]
    """(method, chunk, i, stats): the sparse task vector of model i."""
    prepass: Callable[[Any, Models, Run, int], Any] = lambda method, models, run, chunk_size: None
    """(method, models, run, chunk_size): its `stats`, what must be known of all tensors first."""
    passes: Callable[[Any], int] = lambda method: 0
    """Over the files, for `prepass`."""
    check: Callable[[str, Any, Models], None] = lambda where, method, models: None
    """(where, method, models): raises UserError for options that make no sense together."""
    chunks: Chunks = "elementwise"

    def vectors(self, method: Sparse, chunk: Chunk, stats: Any) -> PerModel:
        """The sparse task vectors of a chunk."""
        return PerModel(len(chunk.tuned), lambda i: self.vector(method, chunk, i, stats))


def sparse(name: str, drop: Drop, **traits: Any) -> Callable[[Cls], Cls]:
    """`closed_form` for a method of the family: its passes and checks are those of what it drops; `traits` are `closed_form`'s."""

    def describe(self: Any, n: int) -> MethodInfo:
        return dataclasses.replace(self.info, passes=drop.passes(self))

    def check(self: Any, models: Models) -> None:
        drop.check(self.info.where, self, models)

    def prepass(self: Any, models: Models, run: Run, chunk_size: int) -> Any:
        return drop.prepass(self, models, run, chunk_size)

    def of(cls: Cls) -> Cls:
        for part in (describe, check, prepass):
            setattr(cls, part.__name__, part)
        return closed_form(name, chunks=drop.chunks, needs_base=True, **traits)(cls)

    return of


def summed(method: Sparse, chunk: Chunk, vectors: Iterable[Array]) -> Array:
    """base + scale * sum_i w_i v_i: task arithmetic."""
    return add_to_base(chunk, weighted_sum(vectors, chunk.weights(method.weights)), chunk.at(method.scale))


def elected(method: Any, chunk: Chunk, vectors: Iterable[Array]) -> Array:
    """base + scale * the disjoint mean (or sum) over the models of the elected sign: TIES."""
    merged = agreeing(list(vectors), chunk.weights(method.weights), elect=method.elect, mean=method.mean)
    return add_to_base(chunk, merged, chunk.at(method.scale))


def each_density(method: Sparse, models: Models) -> tuple[Coefficient, ...]:
    """The density of every tuned model: `densities`, or `density` for all."""
    return method.densities or (method.density,) * len(models.tuned)


def density_at(method: Sparse, chunk: Chunk, i: int) -> float:
    """The density of model i in a chunk."""
    return chunk.at(each_density(method, chunk.models)[i])


def l1_ratios(
    method: Any, models: Models, dropped: Callable[[Any, Chunk, int], Array], chunks: Chunks, run: Run, chunk_size: int
) -> dict[str, Array] | None:
    """By tensor name, for each model, the factor that gives what is left of its task vector the L1 norm of the whole; None unless rescale=l1."""
    if method.rescale != "l1":
        return None

    def both(chunk: Chunk) -> list[Array]:
        pairs = ((vector, dropped(method, chunk, i)) for i, vector in enumerate(chunk.task_vectors))
        return [vector for pair in pairs for vector in pair]

    ratios = {}
    for name, sums in absolute_sums(models, both, run, chunk_size, chunks).items():
        before, after = sums[0::2], sums[1::2]
        small = (before < 1e-7) | (after < 1e-7)
        ratios[name] = np.where(small, 1.0, before / np.where(small, 1.0, after))
    return ratios
