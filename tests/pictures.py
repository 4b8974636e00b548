"""Folders of small pictures that scripts and tests run on: noise, in a colour for each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write(folder: Path, draw: np.random.Generator, *, side: int = 48) -> None:
    """Twelve pictures [side, side] of each of three classes, told apart by their colour."""
    for i, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        for n in range(12):
            pixels = draw.integers(0, 120, (side, side, 3), np.uint8)
            pixels[..., i] += 100
            Image.fromarray(pixels).save(folder / name / f"{n}.png")
