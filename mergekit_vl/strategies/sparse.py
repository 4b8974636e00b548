"""Sparse task vectors: a rule that drops elements of each (`Drop`), and a rule that combines the rest (`summed`, `elected`).

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
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models, PerModel, Run
from mergekit_vl.merging.coefficients import Coefficient
from mergekit_vl.merging.method import Chunks, ClosedForm, MethodInfo
from mergekit_vl.merging.prepass import absolute_sums
from mergekit_vl.merging.task_vectors import add_to_base, agreeing, weighted_sum
from mergekit_vl.strategies.closed_form import closed_form

Cls = TypeVar("Cls", bound=type)
Ratios = dict[str, Array]
"""By tensor name, a factor for each model."""


class Sparse(Protocol):
    """The options that all methods of the family have."""

    @property
    def density(self) -> Coefficient: ...
    @property
    def densities(self) -> tuple[Coefficient, ...]: ...
    @property
    def weights(self) -> tuple[Coefficient, ...]: ...
    @property
    def scale(self) -> Coefficient: ...


class Elects(Sparse, Protocol):
    """The options of methods that elect signs."""

    @property
    def elect(self) -> Literal["raw", "weighted"]: ...
    @property
    def mean(self) -> bool: ...


class Rescales(Sparse, Protocol):
    """The option of methods that rescale the remaining elements."""

    @property
    def rescale(self) -> str: ...


Method = TypeVar("Method", bound=Sparse)
Stats = TypeVar("Stats")
Rescaling = TypeVar("Rescaling", bound=Rescales)


def nothing(method: object, models: Models, run: Run, chunk_size: int) -> Any:
    """The prepass of what need know nothing: its `stats` are None."""
    return None


@dataclass(frozen=True)
class Drop(Generic[Method, Stats]):
    """A rule that drops elements of a task vector and may rescale the rest. `method` is the strategy, whose options its functions read."""

    vector: Callable[[Method, Chunk, int, Stats], Array]
    """(method, chunk, i, stats): the sparse task vector of model i."""
    prepass: Callable[[Method, Models, Run, int], Stats] = nothing
    """(method, models, run, chunk_size): its `stats`, what must be known of all tensors first."""
    passes: Callable[[Method], int] = lambda method: 0
    """Over the files, for `prepass`."""
    check: Callable[[str, Method, Models], None] = lambda where, method, models: None
    """(where, method, models): raises UserError for options that make no sense together."""
    chunks: Chunks = "elementwise"

    def vectors(self, method: Method, chunk: Chunk, stats: Stats) -> PerModel:
        """The sparse task vectors of a chunk."""
        return PerModel(len(chunk.tuned), lambda i: self.vector(method, chunk, i, stats))


def sparse(name: str, drop: Drop[Any, Any], **traits: Any) -> Callable[[Cls], Cls]:
    """`closed_form` for a method of the family: its passes and checks are those of what it drops; `traits` are `closed_form`'s."""

    def describe(self: ClosedForm, n: int) -> MethodInfo:
        return dataclasses.replace(self.info, passes=drop.passes(self))

    def check(self: ClosedForm, models: Models) -> None:
        drop.check(self.info.where, self, models)

    def prepass(self: ClosedForm, models: Models, run: Run, chunk_size: int) -> object:
        return drop.prepass(self, models, run, chunk_size)

    def of(cls: Cls) -> Cls:
        for part in (describe, check, prepass):
            setattr(cls, part.__name__, part)
        return closed_form(name, chunks=drop.chunks, needs_base=True, **traits)(cls)

    return of


def summed(method: Sparse, chunk: Chunk, vectors: Iterable[Array]) -> Array:
    """base + scale * sum_i w_i v_i: task arithmetic."""
    return add_to_base(chunk, weighted_sum(vectors, chunk.weights(method.weights)), chunk.at(method.scale))


def elected(method: Elects, chunk: Chunk, vectors: Iterable[Array]) -> Array:
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
    method: Rescaling,
    models: Models,
    dropped: Callable[[Rescaling, Chunk, int], Array],
    chunks: Chunks,
    run: Run,
    chunk_size: int,
) -> Ratios | None:
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
