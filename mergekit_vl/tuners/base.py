"""What a tuner is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mergekit_vl.models.inputs import MergeInputs
    from mergekit_vl.models.model import Single


class Tuner(Protocol):
    """A frozen dataclass whose fields are its options; `inputs.tuned` is empty and `inputs.data` holds the one task."""

    def tune(self, inputs: MergeInputs) -> Single: ...
