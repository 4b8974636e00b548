"""Images as model inputs: the transform of test images, augmented views, and batches that threads load ahead."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergekit_vl.backbones.vision import CROP_MODES

if TYPE_CHECKING:
    from jaxtyping import Float
    from PIL.Image import Image

    from mergekit_vl.backbones.backbone import Preprocess
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


def eval_view(image: Image, encoder: ImageEncoder) -> Float[Tensor, "3 H W"]:
    """The model's own transform of test images, [3, H, W]: timm's where the settings have a crop_pct, else open_clip's."""
    return _transform(json.dumps(encoder.backbone.preprocess, sort_keys=True))(image)


@lru_cache(64)
def _transform(settings: str) -> Callable[[Image], Tensor]:
    """Built by the library whose model it is."""
    given: Preprocess = json.loads(settings)
    size, mode = _size(given), given.get("resize_mode", "shortest")
    interpolation = given.get("interpolation", "bicubic")
    if "crop_pct" in given:
        import timm

        made: Callable[[Image], Tensor] = timm.data.create_transform(
            (3, *size),
            interpolation=interpolation,
            mean=tuple(given["mean"]),
            std=tuple(given["std"]),
            crop_pct=given["crop_pct"],
            crop_mode=CROP_MODES[mode],
        )
        return made
    from open_clip.transform import image_transform

    made = image_transform(
        size if size[0] != size[1] else size[0],
        is_train=False,
        mean=given["mean"],
        std=given["std"],
        resize_mode=mode,
        interpolation=interpolation,
        fill_color=given.get("fill_color", 0),
    )
    return made


def train_view(image: Image, encoder: ImageEncoder, augment: Augment, *, seed: Sequence[int]) -> Float[Tensor, "3 H W"]:
    """One augmented view: torchvision's RandomResizedCrop (ratio 3/4 to 4/3, ten tries, then the largest centre within the ratios), with
    draws that depend on `seed` alone, whatever thread makes it.
    """
    import math
    import random

    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as T

    draw = random.Random(repr(tuple(seed)))
    settings = encoder.backbone.preprocess
    width, height = image.size
    for _ in range(10):
        area = width * height * draw.uniform(augment.crop, 1.0)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = draw.randint(0, height - h), draw.randint(0, width - w)
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        top, left = (height - h) // 2, (width - w) // 2
    interpolation = InterpolationMode(settings.get("interpolation", "bicubic"))
    image = T.resized_crop(image, top, left, h, w, list(_size(settings)), interpolation)
    if augment.flip and draw.random() < 0.5:
        image = T.hflip(image)
    view: Tensor = T.normalize(T.to_tensor(image), settings["mean"], settings["std"])
    return view


def _size(settings: Preprocess) -> tuple[int, int]:
    """Height and width."""
    size = settings["image_size"]
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
