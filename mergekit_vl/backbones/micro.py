"""The embedded micro CLIP: open_clip's own classes at a size that ships in the package (trained by `scripts/pretrain_micro.py`).

Image tower: timm's ConvNeXt-Atto at 48 x 48 (LayerNorm, no running statistics). Text tower: open_clip's classic causal transformer
with open_clip's `SimpleTokenizer`. Only those rows of the token embedding that pretraining saw are stored; the others are drawn
from the seeded distribution of the stored ones when the model is built, and `unknown_words` names the words that need them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_vl.backbones import known_rows

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from open_clip import CLIP, SimpleTokenizer
    from torch import Tensor, nn

    from mergekit_vl.backbones.backbone import Backbone

IMAGE_SIZE = 48
CONTEXT = 24
VOCABULARY = 49408
CONFIG: dict[str, object] = {
    "embed_dim": 128,
    "vision_cfg": {
        "timm_model_name": "convnext_atto",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": IMAGE_SIZE,
    },
    "text_cfg": {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 128, "heads": 4, "layers": 3},
}
MEAN = (0.5, 0.5, 0.5)
STD = (0.3, 0.3, 0.3)
ASSET = "micro_clip.safetensors"


def normalise(images: Tensor) -> Tensor:
    """Images in 0..1, [B, 3, H, W], to the range the tower was trained on."""
    return (images - MEAN[0]) / STD[0]


@lru_cache(maxsize=1)
def tokenizer() -> SimpleTokenizer:
    from open_clip import SimpleTokenizer

    return SimpleTokenizer(context_length=CONTEXT)


def untrained() -> CLIP:
    from open_clip import CLIP

    return CLIP(**CONFIG)


@lru_cache(maxsize=1)
def known_tokens() -> Tensor:
    """Token ids that pretraining saw, sorted."""
    from mergekit_vl.microworld.pretraining import vocabulary

    ids: Tensor = tokenizer()(list(vocabulary())).unique()
    return ids[ids > 0]


def encode_short(model: CLIP, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
    """`model.encode_text` on ids cut at the longest text: exact for a causal tower that pools at the end token. [B, L] -> [B, D]."""
    import torch

    length = int(ids.argmax(-1).max()) + 1
    ids = ids[:, :length]
    x = model.token_embedding(ids) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)]
    features: Tensor = x @ model.text_projection
    return features


def export(model: nn.Module, path: Path) -> None:
    """Write fp16 tensors, with the known rows of the token embedding only."""
    state = model.state_dict()
    rows = state[known_rows.TABLE][known_tokens()]
    known_rows.write({**state, known_rows.TABLE: rows}, known_tokens(), path)


def load() -> CLIP:
    """The pretrained micro CLIP, float32, in eval mode."""
    with as_file(files("mergekit_vl") / "assets" / ASSET) as path:
        state, _ = known_rows.read(path, VOCABULARY)
    model = untrained()
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def unknown_words(names: tuple[str, ...]) -> tuple[str, ...]:
    """Words of class names that the micro model was never trained on."""
    from mergekit_vl.microworld.pretraining import vocabulary

    known = set(vocabulary())
    words = dict.fromkeys(word for name in names for word in re.findall(r"[a-z0-9]+", name.lower()))
    return tuple(word for word in words if word not in known)


@dataclass(frozen=True)
class Micro:
    """The embedded micro CLIP (no options)."""

    def build(self, device: str) -> Backbone:
        from mergekit_vl.backbones.clip import backbone_of

        return backbone_of(
            load(),
            tokenizer(),
            spec="micro",
            pretrained="embedded",
            config=CONFIG,
            preprocess={"mean": MEAN, "std": STD},
            device=device,
            warn=unknown_words,
            precision="float32",  # small enough that a GPU gains nothing by less, and its scores stay those of a CPU
        )
