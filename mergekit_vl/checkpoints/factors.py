"""Factors of low-rank updates (LoRA and its kin) among a checkpoint's tensors, by name and by shape.

The update of a layer is a product, B A. The mean of the A times the mean of the B is not the mean of the products, so factors are never merged as plain
tensors, whatever wrote them: PEFT, loralib, kohya, diffusers, CLIP-LoRA, or a script.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

WORDS = ("lora", "loha", "lokr", "hada", "dora", "vera")
NAMED = rf"(?<![a-zA-Z])(?:ada|q)?(?:{'|'.join(WORDS)})(?![a-z])"
"""A word of a name that says so."""
ENDS = (("a", "b"), ("down", "up"), ("left", "right"), ("u", "v"))
"""What the two of a pair are called."""
PAIRED = frozenset(word for pair in ENDS for word in pair)
WHOLE = r"mlp|ffn|feed_?forward|expert|gate"
"""Layers whose two matrices are called `up` and `down` too, with a nonlinearity between them."""
FULL = 2
"""A product of rank r from n to m is an update of low rank where r is at most n / FULL and m / FULL."""


def factors(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The tensors that are factors, in the order given: those whose names say so, and pairs whose shapes do.

    A pair is two matrices (or kernels) under names that differ in one word, as `down` and `up`, without a bias: layers of an adapter with a
    nonlinearity between them have biases, or are as wide as the network.
    """
    found = {name for name in shapes if any(w in name.lower() for w in WORDS) and re.search(NAMED, name, re.I)}
    stems: dict[tuple[str, ...], dict[str, str]] = {}
    for name, shape in shapes.items():
        if name in found or len(shape) not in (2, 4) or PAIRED.isdisjoint(name.lower().replace("_", ".").split(".")):
            continue
        if re.search(WHOLE, name, re.I):
            continue
        words = re.split(r"([._])", name)
        for i, word in enumerate(words):
            if word.lower() in PAIRED:
                stem = (*words[:i], "*", *words[i + 1 :])
                stems.setdefault(stem, {})[word.lower()] = name
    for each in stems.values():
        for first, second in ENDS:
            down, up = each.get(first), each.get(second)
            if down is None or up is None or not _low_rank(shapes[down], shapes[up]):
                continue
            if not any(re.sub(r"weight$", "bias", name) in shapes for name in (down, up) if name.endswith("weight")):
                found |= {down, up}
    return [name for name in shapes if name in found]


def _low_rank(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether [r, n] and [m, r], or both transposed, make a product of low rank."""
    for r, n, m, inner in ((a[0], a[1], b[0], b[1]), (a[1], a[0], b[1], b[0])):
        if r == inner and r and FULL * r <= min(n, m):
            return True
    return False
