"""Photographs that come with the package: ten kinds of clothing, 40 pictures each (made by `scripts/make_clothing.py`).

From the clothing set of Alexey Grigorev and the people who sent him their pictures (clothing-dataset-small), CC0; its licence is in the file.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from mergekit_vl.datasets.base import Dataset, Split
from mergekit_vl.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from PIL.Image import Image

ASSET = "clothing.zip"
NAMES = {"longsleeve": "long sleeve", "outwear": "outerwear"}
"""Folders that are called otherwise in texts."""


@dataclass(frozen=True, eq=False)
class PackedImages:
    """Pictures held as the bytes of their files."""

    files: tuple[str, ...]
    pictures: tuple[bytes, ...]
    key: str

    def __len__(self) -> int:
        return len(self.pictures)

    def load(self, index: int) -> Image:
        from PIL import Image

        with Image.open(io.BytesIO(self.pictures[index])) as image:
            return image.convert("RGB")


@dataclass(frozen=True)
class Clothing:
    """400 photographs of clothes at most 160 pixels a side: 20 to train on, 8 to choose by and 12 to test for each class."""

    def load(self, reporter: Reporter = SILENT) -> Dataset:
        content = (files("mergekit_vl") / "assets" / ASSET).read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name for name in archive.namelist() if name.endswith(".webp")]
            source = PackedImages(
                tuple(names), tuple(map(archive.read, names)), key=hashlib.sha256(content).hexdigest()
            )
        places = [name.split("/") for name in names]
        folders = sorted({folder for _, folder, _ in places})
        splits = {}
        for part in ("train", "val", "test"):
            rows = [row for row, place in enumerate(places) if place[0] == part]
            labels = [folders.index(places[row][1]) for row in rows]
            splits[part] = Split(source, np.array(rows), np.array(labels, dtype=np.int64))
        classes = tuple(NAMES.get(folder, folder) for folder in folders)
        return Dataset("clothing", classes, ("a photo of a {}.",), splits["train"], splits["val"], splits["test"])
