"""Zero-shot: class names in templates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_vl.models.model import ImageEncoder, cosine_head

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.model import Classes, Head


@dataclass(frozen=True)
class ZeroShot:
    """Nothing is tuned. Several templates are averaged after normalisation, as in CLIP's own zero-shot ensemble."""

    space = "none"

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> ZeroShot:
        return self

    def text_features(self, backbone: Backbone, classes: Classes) -> Tensor:
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

    def anchor(self, backbone: Backbone) -> ZeroShot:
        return self
