"""Draw scenes: a batch of sprites with fills, backgrounds, poses and styles, all images at once.

Shapes: N images of 3 x 48 x 48 pixels, colours in 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_vl.microworld.sprites import load_sprites

IMAGE_SIZE = 48

FILLS = ("own", "flat", "texture")
BACKGROUNDS = ("plain", "gradient", "texture")
STYLES = ("photo", "gray", "sketch")


@dataclass(frozen=True)
class Scenes:
    """What is on N images; every field has N rows."""

    sprite: np.ndarray  # int, row of the sprite sheet
    fill: np.ndarray  # int, FILLS
    fill_texture: np.ndarray  # int, concepts.TEXTURES
    fill_colours: np.ndarray  # [N, 2, 3]
    background: np.ndarray  # int, BACKGROUNDS
    background_texture: np.ndarray  # int, concepts.TEXTURES
    background_colours: np.ndarray  # [N, 2, 3]
    scale: np.ndarray  # 1 fills the image
    angle: np.ndarray  # radians
    offset: np.ndarray  # [N, 2], in half image widths
    flip: np.ndarray  # bool
    style: np.ndarray  # int, STYLES
    noise: np.ndarray  # standard deviation

    def __len__(self) -> int:
        return len(self.sprite)


def render(scenes: Scenes, rng: np.random.Generator) -> Tensor:
    """Images float32 [N, 3, 48, 48] in 0..1; `rng` draws texture phases and noise."""
    n = len(scenes)
    grid = _grid(n)
    rgba = _place(scenes, grid)
    colour, alpha = rgba[:, :3], rgba[:, 3:]
    phase = _t(rng.uniform(0, 1, (n, 3)))

    ink = _texture(_long(scenes.fill_texture), grid, phase)
    painted = _mix(_t(scenes.fill_colours), ink)
    flat = _t(scenes.fill_colours)[:, 0, :, None, None].expand_as(painted)
    fill = _long(scenes.fill)[:, None, None, None]
    colour = torch.where(fill == 0, colour, torch.where(fill == 1, flat, painted))

    ramp = (grid[..., 1:2].permute(0, 3, 1, 2) * 0.5 + 0.5).clamp(0, 1)
    behind = torch.where(
        _long(scenes.background)[:, None, None, None] == 2,
        _texture(_long(scenes.background_texture), grid * 0.7, 1 - phase),
        torch.where(_long(scenes.background)[:, None, None, None] == 1, ramp, torch.zeros(())),
    )
    image = colour * alpha + _mix(_t(scenes.background_colours), behind) * (1 - alpha)

    style = _long(scenes.style)[:, None, None, None]
    image = torch.where(style == 1, image.mean(1, keepdim=True).expand_as(image), image)
    if (style == 2).any():
        image = torch.where(style == 2, outline(colour * alpha + 0.5 * (1 - alpha), alpha), image)
    noise = _t(rng.standard_normal((n, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32))
    return (image + noise * _t(scenes.noise)[:, None, None, None]).clamp(0, 1)


def outline(image: Tensor, alpha: Tensor) -> Tensor:
    """Dark lines on white paper where colour or coverage changes; [N, 3, H, W]."""
    strength = gradient(image.mean(1, keepdim=True)) + gradient(alpha) * 0.5
    return (1 - 1.6 * strength).clamp(0, 1).expand(-1, 3, -1, -1)


def gradient(gray: Tensor) -> Tensor:
    """Magnitude of the Sobel gradient of [N, 1, H, W], scaled to about 0..1."""
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    padded = F.pad(gray, (1, 1, 1, 1), mode="replicate")
    both = F.conv2d(padded, torch.stack([kernel, kernel.T])[:, None])
    return both.square().sum(1, keepdim=True).sqrt()


def _t(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _long(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))


def _grid(n: int) -> Tensor:
    """Pixel centres, [N, 48, 48, 2] (x, y) in -1..1."""
    line = (torch.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], -1)[None].expand(n, -1, -1, -1)


def _place(scenes: Scenes, grid: Tensor) -> Tensor:
    """The posed sprites, [N, 4, 48, 48]."""
    sprites = torch.from_numpy(load_sprites()[scenes.sprite])
    cos, sin = _t(np.cos(scenes.angle)), _t(np.sin(scenes.angle))
    mirror = _t(np.where(scenes.flip, -1.0, 1.0))
    turn = torch.stack([torch.stack([cos * mirror, sin * mirror], -1), torch.stack([-sin, cos], -1)], 1)
    local = (grid - _t(scenes.offset)[:, None, None]) / _t(scenes.scale)[:, None, None, None]
    local = torch.einsum("nij,nhwj->nhwi", turn, local)
    return F.grid_sample(sprites, local, align_corners=False)


def _mix(colours: Tensor, ink: Tensor) -> Tensor:
    """First colour where `ink` [N, 1, H, W] is 0, second where it is 1."""
    a, b = colours[:, 0, :, None, None], colours[:, 1, :, None, None]
    return a * (1 - ink) + b * ink


def _texture(kind: Tensor, grid: Tensor, phase: Tensor) -> Tensor:
    """Ink in 0..1, [N, 1, H, W], for concepts.TEXTURES in order."""
    x, y = grid[..., 0] * 3, grid[..., 1] * 3
    p, q, r = (phase[:, i, None, None] for i in range(3))
    dots = ((x + p) % 1 - 0.5).square() + ((y + q) % 1 - 0.5).square() < 0.09
    zigzag = (y + ((x + p) % 1 - 0.5).abs() * 1.2 + q) % 1 < 0.5
    lattice = ((x + p) % 1 < 0.25) | ((y + q) % 1 < 0.25)
    speckle = torch.sin((x * 12.9 + p * 7).floor() * 78.2 + (y * 12.9 + q * 7).floor() * 37.7 + r * 9) * 43.7 % 1 < 0.4
    inks = (
        torch.zeros_like(x),
        ((x + y) * 0.75 + p) % 1 < 0.5,
        dots,
        (((x + p).floor() + (y + q).floor()) % 2) > 0.5,
        zigzag,
        (grid[..., 1] * 0.5 + 0.5).clamp(0, 1),
        lattice,
        speckle,
    )
    out = torch.zeros_like(x)
    for i, ink in enumerate(inks):
        out = torch.where(kind[:, None, None] == i, ink.to(x.dtype), out)
    return out[:, None]
