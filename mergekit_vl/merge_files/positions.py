"""Position embeddings of another image size or context length: told as that, and interpolated where it is asked for, by timm's and open_clip's own functions."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

from mergekit_vl.checkpoints.checkpoint import Checkpoint
from mergekit_vl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING = re.compile(r"(?:^|\.)(?:positional_embedding|position_embeddings?(?:\.weight)?|pos_embed)$")
OF_IMAGES = re.compile(r"(?:^|\.)(?:visual|vision_model|vision|image_encoder|vit|trunk|embeddings)\.")
MOST_PREFIX = 5
"""Tokens before those of patches: none, a class token, a distillation token, registers."""

Shape = tuple[int, ...]


def is_position(name: str) -> bool:
    return EMBEDDING.search(name) is not None


def _grid(name: str, first: Shape, other: Shape) -> tuple[int, int, int] | None:
    """(tokens before the patches, side of the first's grid, of the other's) where both are square grids of patches; None for texts."""
    if not (OF_IMAGES.search(name) or name.endswith("pos_embed")):
        return None
    for before in (1, 0, 2, *range(3, MOST_PREFIX + 1)):
        counts = [shape[-2] - before for shape in (first, other)]
        sides = [math.isqrt(max(n, 0)) for n in counts]
        if all(side and side * side == n for side, n in zip(sides, counts)):
            return before, sides[0], sides[1]
    return None


def told(name: str, first: Shape, other: Shape) -> str:
    """What two shapes of a position embedding mean; empty where they differ in more than their positions."""
    if len(first) != len(other) or len(first) not in (2, 3) or first[-1] != other[-1] or first == other:
        return ""
    if grid := _grid(name, first, other):
        return f"another image size: {grid[1]} x {grid[1]} patches against {grid[2]} x {grid[2]}"
    return f"another context length: {first[-2]} positions against {other[-2]}"


def resized(first: Checkpoint, other: Checkpoint, kept: Collection[str]) -> tuple[Checkpoint, list[str]]:
    """The other model with its position embeddings interpolated to the first's positions, in memory; and what was done in words."""
    odd = {
        name: what
        for name, tensor in other.tensors.items()
        if name in first.tensors and name not in kept and is_position(name)
        if (what := told(name, first.tensors[name].shape, tensor.shape))
    }
    if not odd:
        return other, []
    from mergekit_vl.checkpoints.pickles import from_torch
    from mergekit_vl.checkpoints.torch_io import tensors

    made: dict[str, Tensor] = {
        name: _resized(name, t, first.tensors[name].shape) for name, t in tensors(other, odd).items()
    }
    held = from_torch(made, str(other.path), other.label)
    other = replace(other, tensors={**other.tensors, **held.tensors}, arrays={**other.arrays, **held.arrays})
    return other, [f"{other.label}: {name} is of {what}: interpolated" for name, what in odd.items()]


def _resized(name: str, given: Tensor, shape: Shape) -> Tensor:
    import torch
    from open_clip.model import resize_text_pos_embed
    from timm.layers import resample_abs_pos_embed

    table = given.float().reshape(-1, shape[-1])
    if not torch.isfinite(table).all():
        raise UserError(f"{name} has values that are not finite", hint="use an undamaged checkpoint")
    if grid := _grid(name, shape, tuple(given.shape)):
        before, side, old = grid
        made = resample_abs_pos_embed(table[None], [side, side], [old, old], num_prefix_tokens=before)
    else:
        state: dict[str, Tensor] = {"positional_embedding": table}
        resize_text_pos_embed(state, SimpleNamespace(positional_embedding=torch.empty(shape[-2:])))
        made = state["positional_embedding"]
    found: Tensor = made.reshape(shape).to(given.dtype)
    return found
