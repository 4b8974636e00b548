"""What a strategy is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from mergekit_vl.models.inputs import MergeInputs
    from mergekit_vl.models.model import Model


class Strategy(Protocol):
    """A frozen dataclass whose fields are its options."""

    def merge(self, inputs: MergeInputs) -> Model: ...


def trains(strategy: Any) -> bool:
    """Whether a strategy has a training loop: its class says `trains = True`."""
    return getattr(strategy, "trains", False)
