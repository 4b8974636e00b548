"""Atomic files: written beside their place, synced, renamed; a killed process leaves the old file or the new one."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from mergekit_vl.errors import UserError

PARTIAL = ".partial"
"""How the name of a file ends whose writing a kill cut short."""


def slug(label: str) -> str:
    """A label as part of a file's name."""
    return re.sub(r"[^\w.+-]+", "_", label)


def write_bytes(path: Path, data: bytes, *, mend: str = "choose another --out, or mend its permissions") -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(
            f"cannot be written: {error.strerror}",
            where=str(path),
            mend="make room" if error.errno == errno.ENOSPC else mend,
        ) from None


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
