"""Text from elsewhere - labels, names of classes and files - as it can be shown: what would act on a terminal or turn a line round is spelt out."""

from __future__ import annotations

import re

ACTING = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters: escapes, line ends, tabs
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # the direction of what follows
    "\u2028\u2029\ufeff\ud800-\udfff]"  # line and paragraph ends, byte order mark, halves of a pair
)


def printable(text: str) -> str:
    """One line without anything that acts: a control character becomes what Python writes for it, such as \\x1b and \\n."""
    return ACTING.sub(lambda found: repr(found[0])[1:-1], text)


def shortened(text: str, most: int) -> str:
    """At most this many characters; the middle of a longer one is left out."""
    if len(text) <= most:
        return text
    head = (most - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"
