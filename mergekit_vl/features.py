"""The feature store: image features and the bank of augmented views, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mergekit_vl.data import Progress, silent
from mergekit_vl.errors import UserError
from mergekit_vl.files import write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchvision.transforms import InterpolationMode

    from mergekit_vl.data import Augment, Split
    from mergekit_vl.model import ImagePath

THREADS = min(8, os.cpu_count() or 1)


def default_folder() -> Path:
    """`$MERGEKIT_VL_CACHE`, or mergekit_vl in the user's cache folder."""
    if found := os.environ.get("MERGEKIT_VL_CACHE"):
        return Path(found)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mergekit_vl"


@dataclass
class FeatureStore:
    """Features by (image path, images, transform). Features are raw float32 [N, D]."""

    folder: Path | None = field(default_factory=default_folder)
    """None: nothing is kept."""
    report: Progress = silent
    encoded: int = 0
    """Images that went through a tower so far."""
    seconds: float = 0.0
    """That this took, reading the images included."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    splits: dict[str, dict[str, Split]] = field(default_factory=dict)
    """By source and key, the splits that were asked for: one may be part of another."""

    def features(self, path: ImagePath, split: Split) -> Tensor:
        """Test-time features [N, D] of the split's rows."""
        found = self._find(path, split, "test")
        if found is not None:
            return found
        made = self._encode(
            path, len(split), lambda i: test_view(split.source.load(int(split.rows[i])), path), "features"
        )
        return self._keep(self._key(path, split.key, "test"), made)

    def views(self, path: ImagePath, split: Split, *, epochs: int, seed: int, augment: Augment) -> Tensor:
        """Features [epochs, N, D] of augmented views, one per (image, epoch), each seeded by (seed, image, epoch).

        Stored by epoch, so that a longer run continues a shorter one. Exact in distribution: the training step sees a
        fresh view of every image in every epoch, as it would without the bank.
        """
        out = []
        missing = []
        for epoch in range(epochs):
            transform = f"view:{seed}:{epoch}:{augment.crop}:{augment.flip}"
            out.append(self._find(path, split, transform))
            if out[-1] is None:
                missing.append((epoch, self._key(path, split.key, transform)))
        if missing:
            n = len(split)

            def view(i: int) -> Tensor:
                epoch, row = missing[i // n][0], int(split.rows[i % n])
                return train_view(split.source.load(row), path, augment, seed=(seed, row, epoch))

            features = self._encode(path, n * len(missing), view, "augmented views").view(len(missing), n, -1)
            for (epoch, key), rows in zip(missing, features):
                out[epoch] = self._keep(key, rows.clone())
        return torch.stack(out)  # type: ignore[arg-type]

    def temporary(self) -> FeatureStore:
        """A store that keeps nothing, for models that are looked at once: the towers of single epochs."""
        return FeatureStore(None)

    def _key(self, path: ImagePath, split: str, transform: str) -> str:
        text = json.dumps([path.key, split, transform, path.backbone.preprocess, path.backbone.precision, 1])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _find(self, path: ImagePath, split: Split, transform: str) -> Tensor | None:
        """What is kept of the split, or of a larger one that holds its images; None where these must be encoded."""
        known = self.splits.setdefault(split.source.key, {})
        known[split.key] = split
        if (own := self._read(self._key(path, split.key, transform))) is not None:
            return own
        for key, other in known.items():
            if len(other) > len(split) and np.isin(split.rows, other.rows).all():
                if (found := self._read(self._key(path, key, transform))) is not None:
                    order = np.argsort(other.rows)
                    return found[torch.from_numpy(order[np.searchsorted(other.rows, split.rows, sorter=order)])]
        return None

    def _read(self, key: str) -> Tensor | None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if key not in self.memory and self.folder is None:
            return None
        if key not in self.memory:
            file = self.folder / key[:2] / f"{key}.safetensors"
            try:
                self.memory[key] = load_file(file)["features"]
            except (FileNotFoundError, SafetensorError):  # a damaged file is computed again
                return None
        return self.memory[key]

    def _keep(self, key: str, features: Tensor) -> Tensor:
        from safetensors.torch import save

        if self.folder is None:
            return features
        self.memory[key] = features
        data = save({"features": features.contiguous()})
        write_bytes(self.folder / key[:2] / f"{key}.safetensors", data, mend="set MERGEKIT_VL_CACHE to another folder")
        return features

    def _encode(self, path: ImagePath, n: int, load: Callable[[int], Tensor], what: str) -> Tensor:
        out = []
        done = 0
        began = time.perf_counter()
        for batch in prefetched(load, n, path.backbone.block):
            out.append(path.encode(batch).cpu())
            self.encoded += len(batch)
            done += len(batch)
            self.report(done, n, what)
        self.seconds += time.perf_counter() - began
        if not out:
            raise UserError("there are no images to encode", mend="check the dataset's splits")
        return torch.cat(out)


def prefetched(load: Callable[[int], Tensor], n: int, size: int) -> Iterator[Tensor]:
    """Batches of `size` of load(0), ..., load(n - 1): the next one is loaded by threads while one is worked on, so memory is flat."""
    with ThreadPoolExecutor(THREADS) as pool:

        def ask(start: int) -> list[Future[Tensor]]:
            return [pool.submit(load, i) for i in range(start, min(start + size, n))]

        waiting = ask(0)
        for start in range(size, n + size, size):
            batch, waiting = waiting, ask(start)
            yield torch.stack([each.result() for each in batch])


def test_view(image: Image, path: ImagePath) -> Tensor:
    """The model's own transform of test images: resize (a crop_pct below 1: to a larger size), then crop the centre. [3, H, W].

    `resize_mode` as open_clip names them: shortest (side to the size), squash (both sides, no crop), longest (padded with black).
    """
    import math

    from torchvision.transforms import functional as T

    settings = path.backbone.preprocess
    height, width = _size(settings)
    mode = settings.get("resize_mode", "shortest")
    crop = settings.get("crop_pct", 1.0)
    if image.size != (width, height) or crop != 1:
        if mode == "squash":
            size = [math.floor(height / crop), math.floor(width / crop)]
        else:
            ratios = (height / crop / image.height, width / crop / image.width)
            if mode == "shortest" and height == width:
                size = math.floor(height / crop)  # torchvision's own rounding of the other side
            else:
                ratio = max(ratios) if mode == "shortest" else min(ratios)
                size = [round(image.height * ratio), round(image.width * ratio)]
        image = T.center_crop(T.resize(image, size, _interpolation(settings)), [height, width])
    return _tensor(image, path)


test_view.__test__ = False  # type: ignore[attr-defined]  # not a test, whatever pytest thinks of its name


def train_view(image: Image, path: ImagePath, augment: Augment, *, seed: Sequence[int]) -> Tensor:
    """One augmented view; the draws are torchvision's RandomResizedCrop (ratio 3/4 to 4/3, ten tries), from a generator of our own."""
    import math
    import random

    from torchvision.transforms import functional as T

    draw = random.Random(repr(tuple(seed)))
    settings = path.backbone.preprocess
    width, height = image.size
    for _ in range(10):
        area = width * height * draw.uniform(augment.crop, 1.0)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = draw.randint(0, height - h), draw.randint(0, width - w)
            break
    else:
        w = h = min(width, height)
        top, left = (height - h) // 2, (width - w) // 2
    image = T.resized_crop(image, top, left, h, w, list(_size(settings)), _interpolation(settings))
    if augment.flip and draw.random() < 0.5:
        image = T.hflip(image)
    return _tensor(image, path)


def _size(settings: dict[str, Any]) -> tuple[int, int]:
    """Height and width."""
    size = settings["image_size"]
    return (size, size) if isinstance(size, int) else tuple(size)


def _interpolation(settings: dict[str, Any]) -> InterpolationMode:
    from torchvision.transforms import InterpolationMode

    return InterpolationMode(settings.get("interpolation", "bicubic"))


def _tensor(image: Image, path: ImagePath) -> Tensor:
    from torchvision.transforms import functional as T

    settings = path.backbone.preprocess
    return T.normalize(T.to_tensor(image), settings["mean"], settings["std"])
