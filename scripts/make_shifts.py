"""Photographs under shifts that are fixed here, for docs/photographs.md.

    python scripts/make_shifts.py DATA/caltech-101 OUT

Reads a data set in CoOp's tree (`split_zhou_*.json` and its folder of images) and writes

    OUT/<shift>/caltech-101/        the same tree, every image under the shift: for `dataset: {name: coop_layout, root: OUT/<shift>}`
    OUT/folders/plain/{train,val,test}/<class>/   unchanged images, and
    OUT/folders/<shift>/<class>/    test images under the shift: for `dataset: {name: folder, path: ..., shifts: [...]}`

Shifts: sketch (the grey image divided by its blurred negative), grey, blur (radius 2 pixels), posterised (2 bits a channel).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

IMAGES = "101_ObjectCategories"
SPLITS = ("train", "val", "test")


def sketch(image: Image.Image) -> Image.Image:
    grey = ImageOps.grayscale(image)
    light = np.asarray(ImageOps.invert(grey).filter(ImageFilter.GaussianBlur(4)), dtype=np.float64)
    drawn = np.asarray(grey, dtype=np.float64) / np.maximum(255 - light, 1) * 255
    return Image.fromarray(drawn.clip(0, 255).astype(np.uint8)).convert("RGB")


SHIFTS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "sketch": sketch,
    "grey": lambda image: ImageOps.grayscale(image).convert("RGB"),
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "posterised": lambda image: ImageOps.posterize(image, 2),
}


def shifted(source: Path, target: Path, change: Callable[[Image.Image], Image.Image]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    change(Image.open(source).convert("RGB")).save(target, "JPEG", quality=92)


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("tree", type=Path)
    reader.add_argument("out", type=Path)
    reader.add_argument(
        "--whole", nargs="*", default=["sketch"], choices=SHIFTS, help="shifts of which train and val are written too"
    )
    given = reader.parse_args()
    (file,) = given.tree.glob("split_zhou_*.json")
    splits = json.loads(file.read_text())
    for split in SPLITS:
        for place, _, name in splits[split]:
            source = given.tree / IMAGES / place
            target = given.out / "folders" / "plain" / split / name / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            for shift, change in SHIFTS.items():
                if split == "test":
                    shifted(source, given.out / "folders" / shift / name / source.name, change)
                if shift in given.whole:
                    shifted(source, given.out / shift / given.tree.name / IMAGES / place, change)
    for shift in given.whole:
        shutil.copyfile(file, given.out / shift / given.tree.name / file.name)


if __name__ == "__main__":
    main()
