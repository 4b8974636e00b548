"""Every error that a user can meet: what happened, where, and how to mend it, on one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from mergekit_vl.printable import shown

LONGEST = 1000
"""Characters of an error's line."""


class UserError(Exception):
    """An error of the input. The command line prints it as one line and exits with 2."""

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        self.what, self.where, self.hint = what, where, hint
        place = f"{shown(where, 300)}: " if where else ""
        super().__init__(shown(place + what + (f" ({hint})" if hint else ""), LONGEST))


class Unsuitable(UserError):
    """A method or its options do not fit the models and data at hand: one of another kind would. `bench` leaves such a row out, and
    takes every other error for a failure."""


class Failed(UserError):
    """The input is sound, and its computation came to nothing: a loss that is not finite, memory that ends."""


def first_line(error: BaseException) -> str:
    """Of the text of an error from elsewhere; its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


MOST_KNOWN = 40
"""Names that an error lists; of more it says where they are."""


def unknown(kind: str, name: object, known: Iterable[str], *, where: str = "", see: str = "") -> UserError:
    """The error for a name that is not among `known`, with the nearest one that is; `see` is where all are listed."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "known: " + (", ".join(known) or "none")
    if not close and len(known) > MOST_KNOWN:
        hint = f"there are {len(known)}" + (f": see {see}" if see else f", {', '.join(known[:5])} ...")
    return UserError(f"unknown {kind} {name!r}", where=where, hint=hint)
