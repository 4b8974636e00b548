"""The pretraining world: random scenes with the captions that describe them."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mergekit_vl.microworld.concepts import COLOURS, GLYPH_NAMES, LETTER_FACES, LETTERS, SHAPES, TEXTURES, letter_name
from mergekit_vl.microworld.render import Scenes, render
from mergekit_vl.microworld.sprites import INDEX

COLOUR_NAMES = tuple(COLOURS)
PALETTE = np.array(list(COLOURS.values()), dtype=np.float32) / 255
STYLE_WORDS = (
    ("a photo of a", "a picture of a", "an image of a", "a", "this is a"),
    ("a gray photo of a", "a black and white photo of a"),
    ("a sketch of a", "a drawing of a", "an outline of a"),
)
PLACE_WORDS = ("on the left", "on the right", "at the top", "at the bottom")


def held_out(colour: int, shape: int) -> bool:
    """Colour-shape pairs that pretraining never shows or names (a sixth of them)."""
    return (colour * 7 + shape * 5) % 6 == 0


PAIRS = tuple((c, s) for c in range(len(COLOURS)) for s in range(len(SHAPES)) if not held_out(c, s))


def jitter(colours: np.ndarray, rng: np.random.Generator, amount: float = 0.08) -> np.ndarray:
    return np.clip(colours + rng.normal(0, amount, colours.shape), 0, 1).astype(np.float32)


def sample_batch(
    rng: np.random.Generator, glyphs: int = 170, pairs: int = 60, letters: int = 26
) -> tuple[Tensor, list[str]]:
    """Images float [N, 3, 48, 48] and N captions; within a batch no concept occurs twice, so every other row is a negative."""
    n = glyphs + pairs + letters
    glyph_ids = rng.choice(len(GLYPH_NAMES), glyphs, replace=False)
    pair_ids = rng.choice(len(PAIRS), pairs, replace=False)
    letter_ids = rng.permutation(len(LETTERS))[:letters]
    colour = rng.integers(0, len(COLOURS), n)
    texture = np.where(rng.random(n) < 0.5, rng.integers(1, len(TEXTURES), n), 0)
    background = rng.choice(3, n, p=[0.5, 0.25, 0.25])
    background_colour = rng.integers(0, len(COLOURS), n)
    background_texture = rng.integers(1, len(TEXTURES), n)
    style = rng.choice(3, n, p=[0.66, 0.12, 0.22])
    scale = rng.uniform(0.5, 1.0, n)
    offset = rng.uniform(-0.35, 0.35, (n, 2)) * (1.35 - scale)[:, None]

    fill = np.where(rng.random(n) < 0.2, 1, 0)
    sprite = np.empty(n, dtype=np.int64)
    nouns: list[str] = []
    for i in range(n):
        if i < glyphs:
            name = GLYPH_NAMES[glyph_ids[i]]
            sprite[i] = INDEX[name]
            nouns.append(f"{COLOUR_NAMES[colour[i]]} {name}" if fill[i] and style[i] == 0 else name)
            continue
        fill[i] = 2 if texture[i] else 1
        if i < glyphs + pairs:
            colour[i], shape = PAIRS[pair_ids[i - glyphs]]
            sprite[i], noun = INDEX[SHAPES[shape]], SHAPES[shape]
            style[i] = 0
            words = COLOUR_NAMES[colour[i]]
            if texture[i] and rng.random() < 0.7:
                words += f" {TEXTURES[texture[i]]}"
            nouns.append(f"{words} {noun}")
        else:
            letter = LETTERS[letter_ids[i - glyphs - pairs]]
            face = LETTER_FACES[rng.integers(len(LETTER_FACES))]
            sprite[i] = INDEX[f"{face}:{letter}"]
            words = f"{COLOUR_NAMES[colour[i]]} " if style[i] == 0 and rng.random() < 0.4 else ""
            nouns.append(words + (f"{face} " if rng.random() < 0.3 else "") + letter_name(letter))
    flat = fill > 0
    clash = flat & (background_colour == colour)
    background_colour = np.where(
        clash, (colour + 1 + rng.integers(0, len(COLOURS) - 1, n)) % len(COLOURS), background_colour
    )

    captions = [
        _caption(
            nouns[i], style[i], background[i], background_colour[i], background_texture[i], scale[i], offset[i], rng
        )
        for i in range(n)
    ]
    first = PALETTE[colour]
    second = np.where(first.mean(1, keepdims=True) > 0.5, first * 0.45, 0.55 + first * 0.45)
    back = PALETTE[background_colour]
    second_back = back * 0.6 + PALETTE[rng.integers(0, len(COLOURS), n)] * 0.4
    images = render(
        Scenes(
            sprite=sprite,
            fill=fill,
            fill_texture=texture,
            fill_colours=jitter(np.stack([first, second], 1), rng, 0.04),
            background=background,
            background_texture=background_texture,
            background_colours=jitter(np.stack([back, second_back], 1), rng),
            scale=scale,
            angle=rng.normal(0, 0.15, n),
            offset=offset,
            flip=(rng.random(n) < 0.5) & (np.arange(n) < glyphs),
            style=style,
            noise=rng.uniform(0, 0.05, n),
        ),
        rng,
    )
    return images, captions


def _caption(
    noun: str,
    style: int,
    background: int,
    colour: int,
    texture: int,
    scale: float,
    offset: np.ndarray,
    rng: np.random.Generator,
) -> str:
    heads = STYLE_WORDS[style]
    head = heads[rng.integers(len(heads))]
    if rng.random() < 0.15 and abs(scale - 0.75) > 0.15:
        head = head + (" small" if scale < 0.75 else " large")
    caption = f"{head} {noun}"
    tail = rng.random()
    if tail < 0.25 and style == 0:
        behind = COLOUR_NAMES[colour] if background != 2 else TEXTURES[texture]
        caption += f" on a {behind} background"
    elif tail < 0.35 and np.abs(offset).max() > 0.15:
        axis = int(np.abs(offset[1]) > np.abs(offset[0]))
        caption += " " + PLACE_WORDS[2 * axis + int((offset[axis] > 0) ^ False)]
    return caption + "." if rng.random() < 0.5 else caption


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can contain."""
    phrases = [
        *GLYPH_NAMES,
        *SHAPES,
        *COLOURS,
        *TEXTURES,
        *LETTER_FACES,
        *(letter_name(x) for x in LETTERS),
        *PLACE_WORDS,
    ]
    phrases += [word for words in STYLE_WORDS for word in words] + ["small", "large", "on a background", "."]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))
