"""Text from elsewhere - labels, names of classes and files - as it can be shown: what would act on a terminal, a page or a line is spelt out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sized

ACTING = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters: escapes, line ends, tabs
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # the direction of what follows
    "\u2028\u2029\ufeff\ud800-\udfff]"  # line and paragraph ends, byte order mark, halves of a pair
)


def printable(text: str) -> str:
    """One line without anything that acts: a control character becomes what Python writes for it, such as \\x1b and \\n."""
    return ACTING.sub(_spelt, text)


def _spelt(found: re.Match[str]) -> str:
    byte = ord(found[0]) - 0xDC00  # how Python holds a byte of a file's name that is not UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else repr(found[0])[1:-1]


def shown(text: str, most: int) -> str:
    """The same, and no longer than this."""
    return shortened(printable(text), most)


def shortened(text: str, most: int) -> str:
    """At most this many characters; the middle of a longer one is left out."""
    if len(text) <= most:
        return text
    head = (most - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def counted(things: Sized, one: str, many: str = "") -> str:
    """How many there are: "1 class", "3 classes"."""
    return f"{len(things)} {one if len(things) == 1 else many or one + 's'}"


def first_names(names: Iterable[str], most: int = 3) -> str:
    """The first names, shown, with commas between them; dots for the rest."""
    names = list(names)
    return ", ".join(shown(name, 100) for name in names[:most]) + (", ..." if len(names) > most else "")


def in_html(text: str) -> str:
    """The text in a page, and in an attribute's quotes."""
    import html  # whose table of entities a merge does not need

    return html.escape(printable(text))


MARKS = re.compile(r"[&<>\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown, with HTML, tables and mathematics, reads as a mark; an underscore inside a word is none."""
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def in_markdown(text: str) -> str:
    """The text in a paragraph, a list or a table's cell."""
    return MARKS.sub(lambda mark: ENTITIES.get(mark[0], f"\\{mark[0]}"), printable(text))


def in_code(text: str) -> str:
    """The same as code, where nothing in it has to be escaped."""
    return (
        f"`{text}`"
        if text.strip() and not re.search("[`|<>&]", text) and text == printable(text)
        else in_markdown(text)
    )
