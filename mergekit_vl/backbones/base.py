"""What a registered backbone is: options that build one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mergekit_vl.options import Options

if TYPE_CHECKING:
    from mergekit_vl.backbones.backbone import Backbone


class BackboneOptions(Options, Protocol):
    """A frozen dataclass whose fields are its options."""

    def build(self, device: str) -> Backbone: ...


@runtime_checkable
class HasBase(Protocol):
    @property
    def base(self) -> str:
        """What reports call the model before fine-tuning."""
        ...


def base_label(backbone: BackboneOptions) -> str:
    return backbone.base if isinstance(backbone, HasBase) else "zero-shot"
