"""Draw `mergekit_vl/assets/sprites.webp` from fonts on this machine (only needed to change the world's concepts).

    python scripts/make_sprites.py NotoColorEmoji.ttf DEJAVU_FOLDER

Noto Color Emoji and DejaVu are in Debian's `fonts-noto-color-emoji` and `fonts-dejavu`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mergekit_vl.microworld.concepts import GLYPHS, LETTER_FACES, LETTERS, SHAPES, TASK_FACES
from mergekit_vl.microworld.sprites import COLUMNS, KEYS, SIZE

FACE_FILES = {
    "sans": "DejaVuSans.ttf",
    "serif": "DejaVuSerif.ttf",
    "mono": "DejaVuSansMono.ttf",
    "bold": "DejaVuSans-Bold.ttf",
    "italic": "DejaVuSerif-BoldItalic.ttf",
}
OVER = 8  # shapes and letters are drawn 8 times larger, then reduced


def emoji(char: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((10, 10), char, font=font, embedded_color=True)
    return fit(canvas)


def fit(canvas: Image.Image) -> Image.Image:
    """Crop to what is drawn, pad to a square and reduce to SIZE with a pixel of margin."""
    box = canvas.getbbox()
    assert box is not None, "nothing was drawn"
    crop = canvas.crop(box)
    side = max(crop.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(crop, ((side - crop.width) // 2, (side - crop.height) // 2))
    out = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    out.paste(square.resize((SIZE - 2, SIZE - 2), Image.Resampling.LANCZOS), (1, 1))
    return out


def letter(char: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    canvas = Image.new("RGBA", (SIZE * OVER * 2, SIZE * OVER * 2), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((SIZE * OVER // 2, 0), char, font=font, fill="white")
    return fit(canvas)


def polygon(points: list[tuple[float, float]]) -> Image.Image:
    """Points in -1..1, y downwards."""
    side = SIZE * OVER
    canvas = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).polygon(
        [((x * 0.95 + 1) * side / 2, (y * 0.95 + 1) * side / 2) for x, y in points], fill="white"
    )
    return canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def around(n: int, radius=lambda a: 1.0, start: float = -math.pi / 2) -> list[tuple[float, float]]:
    angles = [start + 2 * math.pi * i / n for i in range(n)]
    return [(radius(a) * math.cos(a), radius(a) * math.sin(a)) for a in angles]


def ring(inner: float, shift: float = 0.0) -> list[tuple[float, float]]:
    outer = around(180)
    hole = [(x * inner + shift, y * inner) for x, y in around(180)]
    return [*outer, outer[0], hole[0], *reversed(hole)]


def shapes() -> dict[str, Image.Image]:
    star = [(r * x, r * y) for i, (x, y) in enumerate(around(10)) for r in [1.0 if i % 2 == 0 else 0.42]]
    heart = [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17)
        for t in [2 * math.pi * i / 180 for i in range(180)]
    ]
    w = 0.33
    cross = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]
    drop = [(0.62 * x, 0.38 + 0.62 * y) for x, y in around(180, start=-0.3) if y > -0.45] + [(0, -1)]
    drop.sort(key=lambda p: math.atan2(p[1] - 0.2, p[0]))
    points = {
        "circle": around(180),
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
        "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
        "pentagon": around(5),
        "hexagon": around(6, start=0),
        "star shape": star,
        "cross": cross,
        "ellipse": [(x, 0.55 * y) for x, y in around(180)],
        "rectangle": [(-1, -0.5), (1, -0.5), (1, 0.5), (-1, 0.5)],
        "ring shape": ring(0.55),
        "crescent": ring(0.75, 0.3),
        "heart": heart,
        "arrow": [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)],
        "half disc": [(x, y + 0.45) for x, y in around(180) if y <= 0.001],
        "trapezoid": [(-0.5, -0.7), (0.5, -0.7), (1, 0.7), (-1, 0.7)],
        "drop": drop,
        "flower shape": around(180, radius=lambda a: 0.72 + 0.28 * math.cos(5 * a + math.pi / 2)),
        "wedge": [
            (-0.8, 0.9),
            *[(-0.8 + 1.75 * math.cos(a), 0.9 - 1.75 * math.sin(a)) for a in [math.pi / 2 * i / 60 for i in range(61)]],
        ],
        "bar": [(-1, -0.22), (1, -0.22), (1, 0.22), (-1, 0.22)],
    }
    points["half disc"].sort(key=lambda p: math.atan2(p[1] - 0.2, p[0]))
    return {name: polygon(points[name]) for name in SHAPES}


def main(emoji_font: str, dejavu: str) -> None:
    noto = ImageFont.truetype(emoji_font, 109)
    sprites = [emoji(char, noto) for entries in GLYPHS.values() for char, _ in entries]
    sprites += list(shapes().values())
    for face in LETTER_FACES + TASK_FACES:
        font = ImageFont.truetype(str(Path(dejavu) / FACE_FILES[face]), SIZE * OVER)
        sprites += [letter(char, font) for char in LETTERS]
    assert len(sprites) == len(KEYS)
    rows = -(-len(sprites) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * SIZE, rows * SIZE), (0, 0, 0, 0))
    for i, sprite in enumerate(sprites):
        sheet.paste(sprite, (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
    target = Path(__file__).parent.parent / "mergekit_vl" / "assets" / "sprites.webp"
    sheet.save(target, quality=85, method=6, exact=False)
    print(f"{target}: {len(sprites)} sprites, {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
