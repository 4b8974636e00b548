"""Every error that a user can meet: what happened, where, and how to mend it, on one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, what turns the direction of writing, and the halves of characters that stand for bytes that are not UTF-8."""


def shown(text: str, most: int = 2000) -> str:
    """Text from elsewhere on one line: what cannot be printed is escaped, and the middle of what is longer than `most` letters left out."""
    text = UNPRINTABLE.sub(_escaped, text)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-(most // 2) :]}"


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte of a file name that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


class UserError(Exception):
    """An error of the input. The command line prints it as one line and exits with 2."""

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = what, where, mend
        super().__init__(shown((f"{shown(where, 300)}: " if where else "") + what + (f" ({mend})" if mend else "")))


class Failed(UserError):
    """The input is sound, and its computation came to nothing: a loss that is not finite, memory that ends."""


def unknown(kind: str, name: object, known: Iterable[str], *, where: str = "") -> UserError:
    """The error for a name that is not among `known`, with the nearest one that is."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "known: " + (", ".join(known) or "none")
    return UserError(f"unknown {kind} {name!r}", where=where, mend=hint)
