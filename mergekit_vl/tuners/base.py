"""What a tuner is: `tune`, and what else a class may have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mergekit_vl.options import Options

if TYPE_CHECKING:
    from mergekit_vl.models.inputs import MergeInputs
    from mergekit_vl.models.model import Single


class Tuner(Options, Protocol):
    """A frozen dataclass whose fields are its options; `inputs.tuned` is empty and `inputs.data` holds the one task."""

    def tune(self, inputs: MergeInputs) -> Single: ...


@runtime_checkable
class MovesTower(Protocol):
    @property
    def moves_tower(self) -> bool:
        """Whether its models have image features of their own, so that each encodes the test images."""
        ...


def moves_tower(tuner: object) -> bool:
    """Of a tuner; a checkpoint moves nothing."""
    return isinstance(tuner, MovesTower) and tuner.moves_tower
