"""Coefficients: a scalar, a gradient over depth, or either of them by parameter name.

    scale: 0.4                                   the same for every tensor
    scale: [0.0, 0.5, 1.0]                       from the first block to the last, straight lines between
    scale: {visual: 0.3, attn: [0, 1], "*": 0.5} the first entry that matches a tensor's name is used

An entry's key is a group (`GROUPS`) or a part of the name, with `*` and `?` as wildcards where it has any. Depth is 0 at the first
block of a tower and 1 at its last; what comes before the blocks has depth 0, what comes after them 1.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from mergekit_vl.errors import Unsuitable, UserError

Coefficient = float | tuple[float, ...] | dict[str, float | tuple[float, ...]]


def coefficient(default: object, help: str, *, low: float = -math.inf, high: float = math.inf) -> Any:
    """An option that is a coefficient within low..high at every tensor, or None."""
    return dataclasses.field(default=default, metadata={"help": help, "range": (low, high)})


def per_model(help: str, *, instead_of: str = "") -> Any:
    """An option with one coefficient per tuned model, or none; `instead_of` names the option that has one value for all models."""
    return dataclasses.field(default=(), metadata={"help": help, "per_model": instead_of})


VISUAL = re.compile(r"^(visual|vision|image_encoder|vision_model|vision_tower|image_tower)\b|\.(visual|vision_model)\.")
GROUPS: dict[str, re.Pattern[str]] = {
    "visual": VISUAL,
    "attn": re.compile(r"attn|attention"),
    "mlp": re.compile(r"mlp|c_fc|feed_forward|\bfc[12]\b|ffn"),
    "norm": re.compile(r"(^|[._])(ln|norm|bn)(\d|_|\.|$)|layer_?norm|batch_?norm"),
    "embedding": re.compile(r"embed|\bcls_token\b|\bconv1\b|stem"),
    "head": re.compile(r"^(head|fc|classifier)\b|proj$|text_projection|visual_projection"),
}
BLOCK = re.compile(
    r"^(.*?)\b(?:resblocks|blocks|layers?|layer|stages|stage|h)[._]?(\d+)(?:\.(?:blocks|layers)?\.?(\d+))?"
)
BEFORE = re.compile(r"embed|cls_token|class_token|reg_token|conv1|conv_stem|stem|ln_pre|norm_pre|\bbn1\b")


def in_group(name: str, group: str) -> bool:
    """Whether a tensor is of the group; `text` is a two-tower model's other half."""
    if group == "text":
        return not VISUAL.search(name) and name not in ("logit_scale", "logit_bias")
    return GROUPS[group].search(name) is not None


def matches(name: str, key: str) -> bool:
    """Whether a filter's key covers the tensor `name`."""
    if key in GROUPS or key == "text":
        return in_group(name, key)
    return fnmatchcase(name, key) if set("*?") & set(key) else key in name


def in_block(name: str) -> bool:
    """Whether a tensor is one of a tower's blocks'."""
    return BLOCK.match(name) is not None


def depths(names: Iterable[str]) -> dict[str, float]:
    """The depth of each tensor, 0 to 1, counted over the blocks of its tower."""
    names = list(names)
    found = {name: match for name in names if (match := BLOCK.match(name))}
    blocks = {name: (m[1], (int(m[2]), int(m[3] or 0))) for name, m in found.items()}
    order: dict[str, list[tuple[int, int]]] = {}
    for tower, block in blocks.values():
        order.setdefault(tower, []).append(block)
    ranks = {tower: {b: i for i, b in enumerate(sorted(set(found)))} for tower, found in order.items()}

    def depth(name: str) -> float:
        if name not in blocks:
            return 0.0 if BEFORE.search(name) else 1.0
        tower, block = blocks[name]
        return ranks[tower][block] / max(1, len(ranks[tower]) - 1)

    return {name: depth(name) for name in names}


def value_at(coefficient: Coefficient, name: str, depth: float, *, where: str = "") -> float:
    """The coefficient's value for the tensor `name` at `depth`."""
    if isinstance(coefficient, Mapping):
        for key, value in coefficient.items():
            if matches(name, key):
                return value_at(value, name, depth, where=where)
        raise UserError(f"no filter covers {name}", where=where, hint='add "*": VALUE for the rest')
    if isinstance(coefficient, tuple):
        if not coefficient:
            raise UserError("an empty gradient", where=where, hint="give a number or a list of numbers over depth")
        place = depth * (len(coefficient) - 1)
        left = min(int(place), len(coefficient) - 1)
        right = min(left + 1, len(coefficient) - 1)
        return coefficient[left] + (place - left) * (coefficient[right] - coefficient[left])
    return float(coefficient)


def check_filters(coefficient: Coefficient, names: Iterable[str], *, where: str) -> None:
    """Raise UserError for a filter that covers no tensor: most likely it is misspelt."""
    if not isinstance(coefficient, Mapping):
        return
    names = list(names)
    for key in coefficient:
        if key != "*" and not any(matches(name, key) for name in names):
            raise Unsuitable(
                f"the filter {key!r} covers no tensor",
                where=where,
                hint=f"use a part of a tensor's name or one of {', '.join(('text', *GROUPS))}",
            )
