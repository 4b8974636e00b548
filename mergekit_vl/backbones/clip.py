"""open_clip models by architecture and pretrained tag, `hf-hub:` name or local file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_vl.errors import UserError, unknown
from mergekit_vl.options import option

if TYPE_CHECKING:
    from mergekit_vl.backbones.classic import Backbone


@dataclass(frozen=True)
class Clip:
    """Any classic CLIP that open_clip builds."""

    arch: str = option(help="open_clip architecture (ViT-B-16) or hf-hub:org/name")
    pretrained: str | None = option(None, "open_clip tag or a local checkpoint; none means random weights")

    def build(self, device: str) -> Backbone:
        import open_clip
        import torch

        from mergekit_vl.backbones.classic import Backbone

        where = f"backbone clip arch={self.arch} pretrained={self.pretrained}"
        if not self.arch.startswith("hf-hub:") and self.arch not in open_clip.list_models():
            raise unknown("arch", self.arch, open_clip.list_models(), where="backbone clip")
        if self.pretrained is None:
            torch.manual_seed(0)  # random weights, the same ones each time
        try:
            model, _, _ = open_clip.create_model_and_transforms(self.arch, pretrained=self.pretrained)
            tokenizer = open_clip.get_tokenizer(self.arch)
        except Exception as error:  # open_clip, torch and the hub raise many kinds
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"cannot be loaded: {first}",
                where=where,
                mend="give a tag of `open_clip.list_pretrained()` or a local file to backbone.pretrained",
            ) from error
        visual = model.visual
        size = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
        config = getattr(visual, "preprocess_cfg", {})
        mean = config.get("mean", open_clip.OPENAI_DATASET_MEAN)
        std = config.get("std", open_clip.OPENAI_DATASET_STD)
        return Backbone(
            model,
            tokenizer,
            {"image_size": size, "mean": tuple(mean), "std": tuple(std)},
            f"clip:{self.arch}:{self.pretrained}",
            device,
        )
