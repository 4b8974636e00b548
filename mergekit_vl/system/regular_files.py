"""Reading files that users or strangers supply: valid paths, regular files only, bounded sizes, UTF-8 text, checked JSON."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from mergekit_vl.errors import UserError

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
MOST_TEXT = 16 * 2**20
MOST_JSON_VALUES = 250_000
"""As many take about 60 MB once they are read."""
MOST_OF_RUN = 256 * 2**20
"""Bytes of a JSON file of a run folder: it can list a million images."""
T = TypeVar("T")


def user_path(given: str) -> Path:
    """A path from a user, a recipe or another file, with `~` expanded; raises UserError for a path that no file can have."""
    if not given:
        raise UserError("an empty path", hint="write `.` for this folder")
    if "\0" in given:
        raise UserError("a path holds no NUL character", where=given, hint="correct the path")
    try:
        path = Path(given).expanduser()
        try:
            os.lstat(path)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise UserError("longer than a path can be", where=given, hint="correct the path") from None
        return path
    except RuntimeError:
        raise UserError("whose home folder is it?", where=given, hint="write the path without ~") from None
    except UnicodeEncodeError:
        raise UserError("a path of half characters", where=given, hint="correct the path") from None


def check_utf8(name: str, *, where: str) -> None:
    """Raise UserError for a file's name that is not UTF-8: neither JSON nor a text tower can hold it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} is a name that is not UTF-8", where=where, hint="rename it") from None


def check_regular(path: Path) -> int:
    """The size of a regular file in bytes; raises UserError for anything else, since reading a FIFO or a device may never end."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), hint="check the path") from None
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in KINDS if is_kind(status.st_mode)), "no regular file")
        raise UserError(f"is {kind}", where=str(path), hint="give a regular file")
    return status.st_size


def read_regular(path: Path, *, most: int) -> bytes:
    """A regular file's bytes, as many as its size says (those of /proc/self/mem are none); raises UserError for any other file, one
    that cannot be read, and one of more than `most` bytes."""
    size = check_regular(path)
    if size > most:
        raise UserError(
            f"{size} bytes are more than the {most} that it can have", where=str(path), hint="is it this file?"
        )
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # should a FIFO have taken its place
        with os.fdopen(descriptor, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), hint="check its permissions") from None


def read_text(path: Path, *, most: int = MOST_TEXT) -> str:
    """A regular file of UTF-8, its byte order mark dropped; raises UserError as `read_regular` does, and for other bytes."""
    try:
        return read_regular(path, most=most).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("not UTF-8", where=str(path), hint="save it as UTF-8") from None


def parse_json(raw: bytes | str, *, where: str, what: str = "not JSON", hint: str = "copy the file again") -> Any:
    """JSON from elsewhere. Raises UserError for what is none, is not UTF-8, names a key twice, or holds NaN, a number of thousands of
    digits, half a character, more than MOST_JSON_VALUES values, or one too deep within others."""

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1) if len(names) < 1000 else "a key"
            raise UserError(f"{what}: {twice} is in it twice", where=where, hint=hint)
        return made

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is no number")

    try:
        text = raw.decode() if isinstance(raw, bytes) else raw
        values = text.count(",") + text.count("[") + text.count("{")
        if values > MOST_JSON_VALUES:
            raise ValueError(f"about {values:,} values, and {MOST_JSON_VALUES:,} are the most")
        found = json.loads(text, object_pairs_hook=once, parse_constant=no_number)
        if "\\ud" in text.lower():
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise UserError(f"{what}: its values are nested too deep", where=where, hint=hint) from None
    except UnicodeError:
        raise UserError(f"{what}: not UTF-8", where=where, hint=hint) from None
    except ValueError as error:
        raise UserError(f"{what}: {str(error)[:200]}", where=where, hint=hint) from None
    return found


def check_shape(found: object, shape: type[T], *, what: str, where: str) -> T:
    """`found` itself, of the typed dictionary `shape`; raises UserError with the first key that is not as that has it."""
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(shape).validate_python(found, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{what}: {key}: {first['msg']}", where=where, hint="copy the file again") from None
    return cast("T", found)


def read_json(path: Path, shape: Callable[[Any], T]) -> T:
    """What `shape` makes of a run's JSON file; raises UserError for what is no JSON, and where `shape` finds what it does not expect."""
    again = "copy the run's folder again, or run it again with --force"
    try:
        return shape(json.loads(read_text(path, most=MOST_OF_RUN)))
    except RecursionError:
        raise UserError("JSON of too many levels", where=str(path), hint=again) from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"not what a run writes there: {error!r}", where=str(path), hint=again) from None
