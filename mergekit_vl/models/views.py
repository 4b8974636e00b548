"""Images as a model reads them: the transform of test images, augmented views, and batches of them that threads load."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchvision.transforms import InterpolationMode

    from mergekit_vl.datasets.base import Augment
    from mergekit_vl.models.classifier import ImageEncoder

THREADS = min(8, os.cpu_count() or 1)


def prefetched(load: Callable[[int], Tensor], n: int, size: int) -> Iterator[Tensor]:
    """Batches of `size` of load(0), ..., load(n - 1): the next one is loaded by threads while one is worked on, so memory is flat."""
    with ThreadPoolExecutor(THREADS) as pool:

        def ask(start: int) -> list[Future[Tensor]]:
            return [pool.submit(load, i) for i in range(start, min(start + size, n))]

        waiting = ask(0)
        for start in range(size, n + size, size):
            batch, waiting = waiting, ask(start)
            yield torch.stack([each.result() for each in batch])


def test_view(image: Image, path: ImageEncoder) -> Tensor:
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


def train_view(image: Image, path: ImageEncoder, augment: Augment, *, seed: Sequence[int]) -> Tensor:
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


def _tensor(image: Image, path: ImageEncoder) -> Tensor:
    from torchvision.transforms import functional as T

    settings = path.backbone.preprocess
    return T.normalize(T.to_tensor(image), settings["mean"], settings["std"])
