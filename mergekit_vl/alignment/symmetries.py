"""Exact permutation symmetries of known architectures: which axes of which tensors may be reordered together.

Reordering the hidden units of an MLP, the heads of an attention, the numbers within a head, the channels of a convolution or those of a
residual stream gives other tensors and the same function. Each of these is a `Group`, recognised by names and shapes with the
tables of `families.py`. Every residual stream of a checkpoint that has an unknown tensor anywhere stays, since that tensor might read it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_vl.alignment.families import KNOWN, Roles, Shapes, few, roles_of
from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import UserError
from mergekit_vl.merging.coefficients import VISUAL
from mergekit_vl.system.regular_files import MOST_TEXT, parse_json, read_regular

HEAD_WIDTH, USUAL = 64, range(192, 1025)
"""Where nothing tells the heads they are taken to be 64 wide, in towers of these widths; wider ones have 80, 88, 96, 104 as well."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where a group acts: on one axis of a tensor; positions[unit, dim] lists the indices that move together."""

    tensor: str
    axis: int
    positions: Array


@dataclass(frozen=True, eq=False)
class Group:
    """Units that may be reordered, at all `places` alike.

    An attention's units are its heads. Each consists of several `parts` whose dims may be reordered within the head as well, those of
    queries and keys together and those of values and the output together. Any other group has one part of one dim.
    """

    name: str
    parts: tuple[tuple[Place, ...], ...]

    @property
    def size(self) -> int:
        """All units with all of their dims."""
        return math.prod(self.parts[0][0].positions.shape[:2])

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(place for part in self.parts for place in part)


@dataclass(frozen=True)
class Symmetries:
    groups: tuple[Group, ...]
    """In the order in which the network computes, streams before the blocks that read them."""
    notes: tuple[str, ...]
    """What is not reordered and why, and what was assumed."""


STREAM = re.compile(r"\|(w|s\d)$")
EVERYWHERE = ("logit_scale", "logit_bias")


def find(shapes: Shapes, heads: Mapping[str, int] | None = None, kept: Collection[str] = ()) -> Symmetries:
    """The symmetries of a checkpoint with these tensors; `heads` by tower (`visual`, `text`), where a config tells them.

    Tensors that are `kept` are not merged: they are the reference's, which no group reorders. Raises UserError where there is no group.
    """
    notes: list[str] = []
    roles = roles_of(shapes, notes)
    stray = [name for name in shapes if name not in roles and name not in EVERYWHERE]
    roles = {name: each for name, each in roles.items() if name not in kept}
    if stray:
        roles = {name: tuple("." if STREAM.search(role) else role for role in each) for name, each in roles.items()}
    groups = _groups(shapes, roles, heads or {}, notes)
    if not groups:
        raise UserError(
            f"--rebasin knows no permutation of this architecture, with tensors as {', '.join(list(shapes)[:3])}",
            hint=f"known are {KNOWN}",
        )
    if stray:
        notes.append(f"residual streams stay as they are: the unknown {few(stray)} may read them")
    return Symmetries(groups, tuple(dict.fromkeys(notes)))


def _groups(shapes: Shapes, roles: Roles, heads: Mapping[str, int], notes: list[str]) -> tuple[Group, ...]:
    axes: dict[str, list[tuple[str, int]]] = {}
    attentions: dict[str, dict[str, list[tuple[str, int]]]] = {}
    for name, each in roles.items():
        for axis, role in enumerate(each[: len(shapes.get(name, ()))]):
            where, _, kind = role.rpartition("|")
            if kind in ("qkv", "q", "k", "v", "o"):
                axes.setdefault(where, [])  # its place in the order
                attentions.setdefault(where, {}).setdefault(kind, []).append((name, axis))
            elif role != ".":
                axes.setdefault(role, []).append((name, axis))
    groups = []
    for key, found in axes.items():
        if key in attentions:
            group = _attention(key, attentions[key], shapes, heads, notes)
        else:
            sizes = {shapes[name][axis] for name, axis in found}
            place = np.arange(min(sizes)).reshape(-1, 1, 1)
            group = Group(_title(key), (tuple(Place(name, axis, place) for name, axis in found),))
            if len(sizes) > 1:
                notes.append(f"{_title(key)} stay as they are: {few(name for name, _ in found)} do not fit")
                group = None
        if group is not None and group.size > 1:
            groups.append(group)
    return tuple(groups)


TITLES = {
    "heads": "heads",
    "w": "residual stream",
    "h": "hidden units",
    "se": "squeezed channels",
    "a": "channels",
    "b": "second channels",
}


def _title(key: str) -> str:
    where, _, kind = key.rpartition("|")
    inside, _, last = kind.rpartition(".")
    place = ".".join(part for part in (where.rstrip("."), inside) if part)
    return f"{place} {TITLES.get(last, f'channels {last}')}".strip()


def _attention(
    where: str,
    axes: Mapping[str, list[tuple[str, int]]],
    shapes: Shapes,
    heads: Mapping[str, int],
    notes: list[str],
) -> Group | None:
    """Heads, and in each the dims of queries and keys, and those of values and the output; None where their number is not known."""
    name = _title(f"{where}|heads")
    lengths = {kind: {shapes[tensor][axis] for tensor, axis in found} for kind, found in axes.items()}
    width = min(lengths.get("o", {0}))
    if any(found != {3 * width if kind == "qkv" else width} for kind, found in lengths.items()) or not width:
        notes.append(f"{name} stay as they are: their tensors do not fit")
        return None
    tower = "text" if re.search(r"resblocks|encoder\.layers", where) and not VISUAL.search(where) else "visual"
    number = heads.get(tower)
    if number is None and width in USUAL and not width % HEAD_WIDTH:
        number = width // HEAD_WIDTH
        notes.append(
            f"{tower} heads are taken to be {HEAD_WIDTH} wide, since no config beside the model tells their number"
        )
    if not number or width % number:
        why = f"{number} do not divide {width}" if number else "no config beside the model tells their number"
        notes.append(f"{tower} heads stay as they are: {why}")
        return None
    dims = np.arange(width).reshape(number, -1, 1)
    parts: tuple[list[Place], list[Place]] = ([], [])
    for kind, found in axes.items():
        for tensor, axis in found:
            if kind == "qkv":
                parts[0].append(Place(tensor, axis, np.concatenate([dims, dims + width], -1)))
                parts[1].append(Place(tensor, axis, dims + 2 * width))
            else:
                parts[kind in "vo"].append(Place(tensor, axis, dims))
    return Group(name, tuple(tuple(part) for part in parts))


def heads_told(config: Path | None) -> dict[str, int]:
    """The number of heads by tower, as the open_clip_config.json or config.json in this folder tells or implies it."""
    if config is None:
        return {}
    for file in ("open_clip_config.json", "config.json"):
        try:
            told = parse_json(read_regular(config / file, most=MOST_TEXT), where=str(config / file))
            if isinstance(told, Mapping):
                ours = isinstance(told.get("model_cfg"), Mapping)
                found = _open_clip_heads(told["model_cfg"]) if ours else _other_heads(told)
                return {tower: n for tower, n in found.items() if isinstance(n, int) and n is not True and n > 0}
        except (UserError, AttributeError, TypeError, ZeroDivisionError):  # no such file, or not one of theirs
            continue
    return {}


def _open_clip_heads(config: Mapping[str, Any]) -> dict[str, object]:
    """As open_clip takes them; a tower of timm or transformers tells them elsewhere."""
    vision, text = config.get("vision_cfg") or {}, config.get("text_cfg") or {}
    found = {}
    if isinstance(vision.get("layers", 12), int) and "timm_model_name" not in vision:
        found["visual"] = vision.get("width", 768) // vision.get("head_width", HEAD_WIDTH)
    if "hf_model_name" not in text:
        found["text"] = text.get("heads", 8)
    return found


def _other_heads(config: Mapping[str, Any]) -> dict[str, object]:
    """Those of transformers and of timm."""
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    own = config.get("num_attention_heads") or (config.get("model_args") or {}).get("num_heads")
    found = {"visual": vision.get("num_attention_heads", own), "text": text.get("num_attention_heads", own)}
    if config.get("model_type") == "clip":  # its config leaves out what is as in ViT-B
        found = {"visual": vision.get("num_attention_heads", 12), "text": text.get("num_attention_heads", 8)}
    return found
