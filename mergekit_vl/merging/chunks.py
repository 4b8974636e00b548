"""The input of closed forms: models of aligned tensors, read chunk by chunk.

A chunk is a flat range of one tensor. It is read from a model when the method indexes it and is not kept (`PerModel`), so a method
that loops over the models has two arrays in memory, however many models there are. Arrays are float32 (float64 for a tensor that a model
stores in float64), and the caller may overwrite them. Only the base's array is kept, and it is read only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, TypeVar, overload

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import Unsuitable, UserError
from mergekit_vl.merging.coefficients import Coefficient, check_filters, value_at

if TYPE_CHECKING:
    from jaxtyping import Float

CHUNK_SIZE = 1 << 17
"""Default number of elements of a chunk: 512 KiB of float32, which stays in a core's cache."""
BLOCK = 1 << 13
"""Chunks start at multiples of this, so that random draws and sums do not depend on the chunk size."""

Job = TypeVar("Job")
Result = TypeVar("Result")


class Run(Protocol):
    """`run(function, jobs)` computes the jobs in several threads and returns the results in the order of the jobs, without those that are None."""

    def __call__(self, function: Callable[[Job], Result | None], jobs: Iterable[Job], /) -> list[Result]: ...


class Source(Protocol):
    """Where one model's tensors are read from: files, or arrays in memory."""

    def read(self, name: str, start: int, stop: int, wide: np.dtype) -> Array:
        """Elements start..stop of the flattened tensor, converted to `wide`; a new array."""
        ...


@dataclass(frozen=True)
class Tensor:
    """A float tensor that all models have."""

    name: str
    shape: tuple[int, ...]
    depth: float = 0.0
    """0 at the first block, 1 at the last (`coefficients.depths`)."""
    wide: np.dtype = np.dtype(np.float32)
    """The dtype in which it is merged."""
    tied_to: str = ""
    """The tensor whose storage this one shares (tied weights); random draws and statistics are those of that one."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Elements of one slice along the first axis; a vector is a single row."""
        return self.size // self.shape[0] if len(self.shape) > 1 and self.shape[0] else self.size


Whole = Callable[[Tensor, int], bool]
"""Whether a tensor of n tuned models is merged whole, and not in flat chunks."""


@dataclass(frozen=True)
class PerModel(Sequence[Array]):
    """One array per model. Indexing reads the model's array anew, so the caller may overwrite it."""

    number: int
    read: Callable[[int], Array]

    def __len__(self) -> int:
        return self.number

    @overload
    def __getitem__(self, i: int) -> Array: ...
    @overload
    def __getitem__(self, i: slice) -> list[Array]: ...
    def __getitem__(self, i: int | slice) -> Array | list[Array]:
        which = range(self.number)[i]
        return self.read(which) if isinstance(which, int) else [self.read(each) for each in which]

    def __iter__(self) -> Iterator[Array]:
        return map(self.read, range(self.number))


@dataclass(frozen=True)
class Models:
    """`tuned` in the order of the recipe, without `base` (the zero-shot model); `tensors` in the order of the file."""

    base: Source | None
    tuned: tuple[Source, ...]
    tensors: tuple[Tensor, ...]
    labels: tuple[str, ...]
    """Of the tuned models."""
    seed: int = 0
    base_label: str = "zero-shot"
    device: str = "cpu"
    """Where matrices are decomposed (`svd.py`); everything else is numpy's on the CPU."""

    @property
    def members(self) -> tuple[Source, ...]:
        """The base, if there is one, and the tuned models: the members of an average."""
        return (self.base, *self.tuned) if self.base is not None else self.tuned

    @property
    def member_labels(self) -> tuple[str, ...]:
        return (self.base_label, *self.labels) if self.base is not None else self.labels

    def chunks(
        self,
        form: str = "elementwise",
        chunk_size: int = CHUNK_SIZE,
        tensor: Tensor | None = None,
        whole: Whole | None = None,
    ) -> Iterator[Chunk]:
        """Every tensor (or one) cut into chunks: of `chunk` elements, of whole rows, or whole tensors.

        `whole` says which tensors the form "tensor" takes whole; without it, all.
        """
        for each in self.tensors if tensor is None else (tensor,):
            step = max(1, each.size)
            flat = form == "tensor" and whole is not None and not whole(each, len(self.tuned))
            if flat or form in ("accumulating", "elementwise"):
                step = chunk_size
            elif form == "rows" and each.row:
                step = each.row * max(1, chunk_size // each.row)
            for start in range(0, each.size, step):
                yield Chunk(self, each, start, min(start + step, each.size))

    def check_count(
        self, method: str, *, at_least: int = 1, at_most: int | None = None, needs_base: bool = False
    ) -> None:
        """Raise UserError for too few or too many tuned models, or a missing base."""
        n = len(self.tuned)
        if needs_base and self.base is None:
            raise Unsuitable(
                "needs the model that the others were tuned from", where=method, hint="give it with --base"
            )
        if n < at_least or (at_most is not None and n > at_most):
            wanted = f"{at_least}" if at_least == at_most else f"at least {at_least}" if n < at_least else f"{at_most}"
            one = " tuned model" if wanted == "1" else " tuned models"
            raise Unsuitable(
                f"{wanted}{one}, not {n}",
                where=method,
                hint="use linear for several" if at_most is not None and n > at_most else "name more models",
            )

    def check_weights(
        self,
        method: str,
        weights: tuple[Coefficient, ...],
        labels: tuple[str, ...],
        what: str,
        whose: str = "tuned models",
    ) -> None:
        """Raise UserError unless there is none or one coefficient per label, and each filter covers a tensor."""
        if weights and len(weights) != len(labels):
            raise Unsuitable(
                f"{len(weights)} {what} for {len(labels)} {whose}",
                where=method,
                hint=f"one each: {', '.join(labels)}",
            )
        for weight in weights:
            self.check_coefficient(method, weight, what)

    def check_coefficient(
        self, method: str, coefficient: Coefficient, what: str, low: float = -math.inf, high: float = math.inf
    ) -> None:
        """Raise UserError for a filter that covers nothing, and for a value outside low..high for some tensor."""
        where = f"{method}: {what}"
        check_filters(coefficient, [t.name for t in self.tensors], where=where)
        for tensor in self.tensors:
            value = value_at(coefficient, tensor.name, tensor.depth, where=where)
            if not low <= value <= high:  # NaN too
                raise UserError(f"{what}={value:g}", where=method, hint=f"it lies in {low:g} .. {high:g}")

    def check_sum(
        self, method: str, weights: tuple[Coefficient, ...], n: int, hint: str = "change them, or set normalise=false"
    ) -> None:
        """Raise UserError for n weights that sum to zero for some tensor, by which they are to be divided."""
        for tensor in self.tensors:
            if abs(sum(self.weight_at(weights, tensor, n))) < 1e-12:
                raise UserError("the weights sum to zero", where=method, hint=hint)

    def weight_at(self, weights: tuple[Coefficient, ...], tensor: Tensor, n: int) -> tuple[float, ...]:
        """One number per model for this tensor; ones where no weights are given."""
        return tuple(value_at(w, tensor.name, tensor.depth) for w in weights) if weights else (1.0,) * n


@dataclass(frozen=True)
class Chunk:
    """Elements start..stop of one flattened tensor, in every model."""

    models: Models
    tensor: Tensor
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def read(self, source: Source) -> Float[Array, " n"]:
        return source.read(self.tensor.name, self.start, self.stop, self.tensor.wide)

    @cached_property
    def base(self) -> Float[Array, " n"]:
        """The base's values; read once, not to be overwritten."""
        assert self.models.base is not None
        return self.read(self.models.base)

    @property
    def tuned(self) -> PerModel:
        """The values of each tuned model."""
        return self._of(self.models.tuned)

    @property
    def members(self) -> PerModel:
        """The values of the base, where there is one, and of each tuned model."""
        return self._of(self.models.members)

    @property
    def task_vectors(self) -> PerModel:
        """Tuned minus base, of each tuned model."""
        return PerModel(len(self.models.tuned), self._task_vector)

    def _of(self, sources: tuple[Source, ...]) -> PerModel:
        return PerModel(len(sources), lambda i: self.read(sources[i]))

    def _task_vector(self, i: int) -> Float[Array, " n"]:
        values = self.read(self.models.tuned[i])
        values -= self.base
        return values

    def at(self, coefficient: Coefficient) -> float:
        """A coefficient's value for this tensor."""
        return value_at(coefficient, self.tensor.name, self.tensor.depth)

    def weights(self, weights: tuple[Coefficient, ...], n: int | None = None) -> tuple[float, ...]:
        """One number per tuned model (or per `n`) for this tensor; ones where no weights are given."""
        return self.models.weight_at(weights, self.tensor, len(self.models.tuned) if n is None else n)


@dataclass(frozen=True)
class Arrays:
    """A model held in memory: stored arrays by name, each with its dtype code."""

    tensors: dict[str, tuple[Array, str]]

    def read(self, name: str, start: int, stop: int, wide: np.dtype) -> Array:
        from mergekit_vl.checkpoints.dtypes import widen

        array, code = self.tensors[name]
        stored = array.reshape(-1)[start:stop]
        values = widen(stored, code, wide)
        return values.copy() if values is stored or np.shares_memory(values, stored) else values
