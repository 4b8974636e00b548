"""The contract of strategies: `merge`, and optional members with their defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, runtime_checkable

from mergekit_vl.options import Options

if TYPE_CHECKING:
    from mergekit_vl.models.inputs import MergeInputs
    from mergekit_vl.models.model import Model


class Strategy(Options, Protocol):
    """A frozen dataclass whose fields are its options."""

    def merge(self, inputs: MergeInputs) -> Model: ...


@runtime_checkable
class Trains(Protocol):
    @property
    def trains(self) -> bool:
        """Whether it has a training loop. Its models are then stored; those of other strategies are made again when they are needed."""
        ...


@runtime_checkable
class HasGrid(Protocol):
    @property
    def grid(self) -> Mapping[str, Sequence[Any]] | Callable[[int], Mapping[str, Sequence[Any]]]:
        """Values by option that `bench` tries after the defaults, or a function of the number of tuned models that returns them."""
        ...


@runtime_checkable
class HasControls(Protocol):
    def controls(self) -> Sequence[tuple[str, Strategy]]:
        """(label, strategy) pairs that `run` adds as rows, to show what the parts of this strategy contribute."""
        ...


@runtime_checkable
class TrainsOn(Protocol):
    @classmethod
    def continued(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The class's options for plain training from the tuned model, as long as `options` (its own or a tuner's) say."""
        ...


def trains(strategy: object) -> bool:
    """Whether a strategy, or its class, has a training loop."""
    return isinstance(strategy, Trains) and strategy.trains


def trains_on(cls: object) -> TypeGuard[type[TrainsOn]]:
    """Whether a strategy's class can train a tuned model on."""
    return isinstance(cls, type) and isinstance(cls, TrainsOn)


def grid_of(strategy: object, models: int) -> Mapping[str, Sequence[Any]]:
    """What a strategy, or its class, has tried for this many tuned models."""
    if not isinstance(strategy, HasGrid):
        return {}
    grid = strategy.grid
    return grid(models) if callable(grid) else grid


def controls_of(strategy: Strategy) -> tuple[tuple[str, Strategy], ...]:
    return tuple(strategy.controls()) if isinstance(strategy, HasControls) else ()
