"""The sprite sheet: every emoji, shape and letter of the microworld as one RGBA picture of 40 x 40 pixels."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import as_file, files

import numpy as np

from mergekit_vl.microworld.concepts import GLYPH_NAMES, LETTER_FACES, LETTERS, SHAPES, TASK_FACES

SIZE = 40
COLUMNS = 32

KEYS: tuple[str, ...] = (
    *GLYPH_NAMES,
    *SHAPES,
    *(f"{face}:{letter}" for face in LETTER_FACES + TASK_FACES for letter in LETTERS),
)
"""Name of each sprite, in sheet order."""

INDEX: dict[str, int] = {key: i for i, key in enumerate(KEYS)}


@lru_cache(maxsize=1)
def load_sprites() -> np.ndarray:
    """All sprites: float32 [N, 4, 40, 40] in 0..1, straight (not premultiplied) alpha."""
    from PIL import Image

    with as_file(files("mergekit_vl") / "assets" / "sprites.webp") as path, Image.open(path) as image:
        sheet = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
    rows = sheet.shape[0] // SIZE
    grid = sheet.reshape(rows, SIZE, COLUMNS, SIZE, 4).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(grid.reshape(rows * COLUMNS, 4, SIZE, SIZE)[: len(KEYS)])
