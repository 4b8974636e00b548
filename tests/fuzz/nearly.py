"""Inputs that are nearly right: good ones with some values exchanged, taken away or put in, and some letters of their text changed."""

import copy
from typing import Any

from hypothesis import strategies as st

from mergekit_vl.errors import UserError

ODD = [
    *(None, True, False, 0, -1, 1, 2, 2**63, -(2**40), 2**70, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf")),
    *("", " ", "x", "all", "0.5", "[red]", "$\\foo$", "a" * 300, "\x07", "a\nb", "\ud800", "a\0b", "\u202e", "é"),
    *("../x", "/dev/zero", "/etc/passwd", "~nobody/x", "x/" * 3000, ".", ".."),
    *("${", "${}", "${a}", "${oc.env:HOME}", "${oc.decode:1}", "${strategy}", "${.}", "${dataset.path}${dataset}"),
    *("micro", "linear", "ties", "folder", "coop", "float16"),
    *([], {}, [[]], [1, 2], [None], ["a", "b"], [0.5, float("nan")], {"a": 1}, {"*": 0.5}, {"x": {"y": {}}}),
    *({"name": "x"}, {"name": "ties"}, [{"name": "wise_ft"}], {"value": 1}, [{"value": 0.5, "filter": "x"}]),
]
KEYS = [
    "x",
    "",
    " ",
    "${",
    "label",
    "of",
    "input",
    "grid",
    "batch_norm",
    "path",
    "name",
    "weight",
    "seed",
    "checkpoint",
    "\x1b",
]
PIECES = [
    "[",
    "{",
    "}",
    "${",
    "&a ",
    "*a",
    "!!int ",
    "!!set ",
    "\t",
    "'",
    '"',
    "? ",
    "- ",
    "\x00",
    "\u2028",
    ": ",
    "\n",
    "1e999",
]
"""Pieces of YAML and JSON that change what stands around them."""


def _places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in ((*at, key), *_places(value, (*at, key)))]


@st.composite
def nearly(draw: Any, good: list[Any]) -> Any:
    """One of the good documents, changed in one to three places."""
    tree = copy.deepcopy(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(1, 3))):
        places = _places(tree)
        if not places:
            break
        *above, last = draw(st.sampled_from(places))
        holder = tree
        for step in above:
            holder = holder[step]
        change = draw(st.sampled_from(["exchange", "exchange", "exchange", "take", "put"]))
        if change == "take":
            del holder[last]
        elif change == "put" and isinstance(holder, dict):
            holder[draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(st.sampled_from(ODD)))
        else:
            holder[last] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return tree


@st.composite
def spliced(draw: Any, text: str) -> str:
    """The text with up to two pieces put in place of some of its letters."""
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(PIECES)) + text[at + draw(st.integers(0, 20)) :]
    return text


def refused_or_read(read: Any) -> bool:
    """Whether it was read; what is refused is one printable line."""
    try:
        read()
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) <= 1000
        return False
    return True
