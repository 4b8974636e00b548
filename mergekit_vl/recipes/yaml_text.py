"""YAML of strangers as plain data: mappings with text keys, lists, text, numbers, booleans and null, of bounded size and depth.

1e-3 is a number and a date is text, as in YAML 1.2; no tag makes anything else. Aliases count as often as
they stand there, so that ten lines cannot be a billion values.
"""

from __future__ import annotations

import re
from typing import Any

from mergekit_vl.errors import UserError

MOST_BYTES = 128 * 2**10


def parse(text: str, *, where: str) -> Any:
    """The data of one document; raises UserError for what is not YAML, and for what a recipe cannot hold."""
    found = parse_documents(text, where=where)
    if len(found) > 1:
        raise UserError(f"{len(found)} documents in one file", where=where, hint="one recipe a file")
    return found[0] if found else None


def parse_documents(text: str, *, where: str) -> list[Any]:
    """The data of every document between lines of `---`, without empty ones; raises UserError as `parse` does."""
    import yaml

    from mergekit_vl.recipes.yaml_loader import Loader

    try:
        return [_plain(each) for each in yaml.load_all(text, Loader=Loader) if each is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(
            f"broken YAML{place}: {error.problem or error.context}", where=where, hint="mend the line"
        ) from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:  # a tag on what it is not for
        raise UserError(f"broken YAML: {error}", where=where, hint="mend the line") from None


def _plain(value: object) -> object:
    """A copy in which nothing is shared; raises ValueError for what JSON, paths and random generators cannot hold."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r} is no text: put it between quotes")
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, int) and abs(value) >= 2**64:
        raise ValueError("a whole number of more than 64 bits")
    if isinstance(value, str) and (found := _UNSTORABLE.search(value)):
        raise ValueError(f"text holds the character U+{ord(found[0]):04X}")
    return value


_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
