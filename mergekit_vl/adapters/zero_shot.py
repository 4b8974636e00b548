"""The zero-shot adapter: no parameters, a classifier of class names in templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NoReturn

from mergekit_vl.errors import Unsuitable
from mergekit_vl.models.adapter import About
from mergekit_vl.models.classifier import ImageEncoder, cosine_head

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.adapter import Adapter
    from mergekit_vl.models.classifier import Classes, Head


@dataclass(frozen=True)
class ZeroShot:
    """Nothing is tuned. Several templates are averaged after normalisation, as in CLIP's own zero-shot ensemble."""

    space = "none"
    about = About("a zero-shot model", "nothing", makes_texts=True, without_file="zero_shot")
    chosen: ClassVar[Mapping[str, float]] = {}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> ZeroShot:
        return self

    def text_features(self, backbone: Backbone, classes: Classes) -> Float[Tensor, "K D"]:
        import torch
        import torch.nn.functional as F

        per_template = [backbone.encode_texts(texts) for texts in classes.texts()]
        if len(per_template) == 1:
            return per_template[0]  # raw, as the prompt's are
        return torch.stack([F.normalize(features, dim=-1) for features in per_template]).mean(0)

    def image_encoder(self, backbone: Backbone) -> ImageEncoder:
        return ImageEncoder(backbone)

    def bind(self, backbone: Backbone, classes: Classes) -> Head:
        return cosine_head(backbone, self.text_features(backbone, classes))

    def untuned(self, backbone: Backbone) -> ZeroShot:
        return self

    def aligned(self, others: Sequence[ZeroShot]) -> Sequence[ZeroShot]:
        return others

    def networks(self, backbone: Backbone, classes: Sequence[Classes], *, training: bool) -> NoReturn:
        raise Unsuitable(
            f"answers of the space {self.space} do not depend on weights", hint="tune a prompt, a head or a tower"
        )

    def linear_maps(self, features: Tensor) -> Mapping[str, Tensor]:
        return {}

    def with_chosen(self, chosen: Mapping[str, float]) -> ZeroShot:
        return self

    def started_from(self, base: Adapter, backbone: Backbone, classes: Classes) -> ZeroShot:
        return self

    def check(self, backbone: Backbone) -> None:
        backbone.require_text()

    def usage(self, backbone: Backbone) -> None:
        return None

    def whole(self, backbone: Backbone) -> None:
        return None

    def save(self, path: Path, *, backbone: str) -> None:
        """There is nothing to write (`About.without_file`)."""

    @classmethod
    def load(cls, path: Path, *, device: str = "cpu") -> ZeroShot:
        return cls()
