"""The contract of protocols: from a dataset to images to tune on, tests, and the metric that makes the headline of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar, overload, runtime_checkable

from mergekit_vl.options import Options

if TYPE_CHECKING:
    from mergekit_vl.checkpoints.dtypes import Array
    from mergekit_vl.datasets.base import Dataset, Split
    from mergekit_vl.models.inputs import TaskData
    from mergekit_vl.models.model import Classes

V = TypeVar("V", float, "Array")
"""An accuracy, or an array of them."""


@dataclass(frozen=True)
class Metric:
    """Columns are plain means of the accuracies of their tests; the headline is the mean of the columns."""

    headline: str
    """The headline's name: HM, accuracy, mean of ID and OOD."""
    columns: Mapping[str, tuple[str, ...]]
    harmonic: bool = False
    normalised: bool = False
    """Also report accuracies divided by those of the model that was tuned on the column's own task."""

    @overload
    def column(self, name: str, accuracies: Mapping[str, float]) -> float: ...
    @overload
    def column(self, name: str, accuracies: Mapping[str, Array]) -> Array: ...
    def column(self, name: str, accuracies: Mapping[str, float] | Mapping[str, Array]) -> float | Array:
        """Of one column, from accuracies (numbers or arrays) by test."""
        tests = self.columns[name]
        return sum(accuracies[test] for test in tests) / len(tests)

    @overload
    def score(self, columns: Sequence[float]) -> float: ...
    @overload
    def score(self, columns: Sequence[Array]) -> Array: ...
    def score(self, columns: Sequence[float | Array]) -> float | Array:
        """The headline of the columns' values, in their order; numbers or arrays of them. A harmonic mean with a zero is zero."""
        import numpy as np

        if not self.harmonic:
            return sum(columns) / len(columns)
        values = np.stack([np.asarray(c, dtype=np.float64) for c in columns])
        with np.errstate(divide="ignore"):
            mean: Array = len(values) / (1 / values).sum(0)
        return mean if mean.ndim else float(mean)

    def headline_of(self, accuracies: Mapping[str, V]) -> V:
        """The headline from accuracies (numbers or arrays) by test."""
        return self.score([self.column(name, accuracies) for name in self.columns])


@dataclass(frozen=True)
class Task:
    """What is tuned on and what is tested: `data` never overlaps a test, each test is (name, classes, split)."""

    data: tuple[TaskData, ...]
    """One, or one per model to be tuned where models of several tasks are merged."""
    tests: tuple[tuple[str, Classes, Split], ...]
    metric: Metric
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Class names by part (base, novel); empty if the protocol does not divide the classes."""
    note: str = ""
    """A note that is printed with the table."""
    kept: tuple[TaskData, ...] = ()
    """What must not be forgotten: strategies choose on its validation images too."""


class EvaluationProtocol(Options, Protocol):
    """A frozen dataclass whose fields are its options."""

    def task(self, dataset: Dataset, seed: int) -> Task:
        """Of one dataset; of a sequence of them where the class says `joint = True`."""
        ...


class JointProtocol(Options, Protocol):
    """One that says `joint = True`."""

    def task(self, datasets: Sequence[Dataset], seed: int) -> Task: ...


@runtime_checkable
class IsJoint(Protocol):
    @property
    def joint(self) -> bool:
        """Whether all datasets of a recipe make one cell, a model being tuned on each and those merged."""
        ...


@runtime_checkable
class TunesOnFirst(Protocol):
    @property
    def tunes_on_first(self) -> bool:
        """Whether, of all datasets that make one cell, models are tuned on the first alone."""
        ...


@runtime_checkable
class HasShots(Protocol):
    @property
    def shots(self) -> int | None:
        """Images per class to tune on, an option; none: all."""
        ...


def joint(protocol: EvaluationProtocol) -> bool:
    return isinstance(protocol, IsJoint) and protocol.joint


def one_task_each(protocol: EvaluationProtocol) -> bool:
    """Whether each dataset is a task of its own, with a tuned model of its own."""
    return joint(protocol) and not (isinstance(protocol, TunesOnFirst) and protocol.tunes_on_first)


def shots_of(protocol: EvaluationProtocol) -> int | None:
    return protocol.shots if isinstance(protocol, HasShots) else None
