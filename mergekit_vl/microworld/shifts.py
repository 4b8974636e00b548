"""Domain shifts of the tasks: renderings that pretraining never shows. Images [N, 3, H, W] in 0..1, strength 0 (none) to 1."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Shift = Callable[[Tensor, float, np.random.Generator], Tensor]


def emboss(x: Tensor, s: float, rng: np.random.Generator) -> Tensor:
    """Grey relief, lit from the upper left."""
    kernel = torch.tensor([[-1.0, -0.7, 0], [-0.7, 0, 0.7], [0, 0.7, 1.0]])
    gray = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    relief = (0.5 + F.conv2d(gray, kernel[None, None])).clamp(0, 1)
    return x * (1 - s) + relief * s


def negative(x: Tensor, s: float, rng: np.random.Generator) -> Tensor:
    """Inverted colours."""
    return x * (1 - s) + (1 - x) * s


def thermal(x: Tensor, s: float, rng: np.random.Generator) -> Tensor:
    """Brightness shown as a blue-red-yellow scale; the colours of things are lost."""
    v = x.mean(1, keepdim=True)
    heat = torch.cat([(v * 2.2).clamp(0, 1), (v * 2 - 0.8).clamp(0, 1), (1 - (v - 0.25).abs() * 3).clamp(0, 1)], 1)
    return x * (1 - s) + heat * s


def mosaic(x: Tensor, s: float, rng: np.random.Generator) -> Tensor:
    """Blocks of 2 to 8 pixels."""
    side = round(x.shape[-1] / (1 + 7 * s))
    return F.interpolate(F.interpolate(x, (side, side), mode="area"), x.shape[-2:], mode="nearest")


def halftone(x: Tensor, s: float, rng: np.random.Generator) -> Tensor:
    """Printed dots whose size is the darkness."""
    line = torch.arange(x.shape[-1]) * 2 * np.pi / 4
    screen = (torch.sin(line)[:, None] + torch.sin(line)[None]) / 4 + 0.5
    dots = ((x - screen) * 6 + 0.5).clamp(0, 1)
    return x * (1 - s) + dots * s


def swirl(x: Tensor, s: float, rng: np.random.Generator) -> Tensor:
    """Turned about the centre, most in the middle; either way round."""
    n, side = len(x), x.shape[-1]
    line = (torch.arange(side) + 0.5) / side * 2 - 1
    yy, xx = torch.meshgrid(line, line, indexing="ij")
    r = (xx.square() + yy.square()).sqrt()
    turn = torch.from_numpy(rng.choice([-1.0, 1.0], n).astype(np.float32))[:, None, None] * 2.5 * s * (1 - r).clamp(0)
    grid = torch.stack([xx * turn.cos() - yy * turn.sin(), xx * turn.sin() + yy * turn.cos()], -1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def blur(x: Tensor, s: float, rng: np.random.Generator) -> Tensor:
    """Gaussian, up to 5 pixels."""
    sigma = max(5 * s, 1e-3)
    line = torch.arange(-12, 13, dtype=torch.float32)
    kernel = torch.exp(-line.square() / (2 * sigma * sigma))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    x = F.conv2d(F.pad(x, (12, 12, 0, 0), mode="replicate"), kernel, groups=3)
    return F.conv2d(F.pad(x, (0, 0, 12, 12), mode="replicate"), kernel.transpose(-1, -2), groups=3)


def scatter(x: Tensor, s: float, rng: np.random.Generator) -> Tensor:
    """Frosted glass: every pixel is taken from a random place nearby."""
    n, side = len(x), x.shape[-1]
    line = (torch.arange(side) + 0.5) / side * 2 - 1
    yy, xx = torch.meshgrid(line, line, indexing="ij")
    shake = torch.from_numpy(rng.uniform(-1, 1, (n, side, side, 2)).astype(np.float32)) * (0.4 * s)
    return F.grid_sample(x, torch.stack([xx, yy], -1) + shake, padding_mode="border", align_corners=False)


def night(x: Tensor, s: float, rng: np.random.Generator) -> Tensor:
    """Dark, blue and grainy."""
    dark = x.square() * torch.tensor([0.35, 0.4, 0.6])[None, :, None, None]
    grain = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)) * 0.08
    return (x * (1 - s) + (dark + grain) * s).clamp(0, 1)


def blinds(x: Tensor, s: float, rng: np.random.Generator) -> Tensor:
    """Seen through slats that hide up to two thirds of the image."""
    n, side = len(x), x.shape[-1]
    start = torch.from_numpy(rng.integers(0, 6, n))[:, None]
    hidden = (torch.arange(side)[None] + start) % 6 < round(4 * s)
    return torch.where(hidden[:, None, :, None], torch.tensor(0.75), x)


def hue(x: Tensor, s: float, rng: np.random.Generator) -> Tensor:
    """Colour channels exchanged, another way for each image."""
    orders = torch.from_numpy(np.array([[1, 2, 0], [2, 0, 1], [1, 0, 2], [2, 1, 0]])[rng.integers(0, 4, len(x))])
    swapped = torch.gather(x, 1, orders[:, :, None, None].expand_as(x))
    return x * (1 - s) + swapped * s


SHIFTS: dict[str, Shift] = {
    f.__name__: f for f in (emboss, negative, thermal, mosaic, halftone, swirl, blur, scatter, night, blinds, hue)
}
