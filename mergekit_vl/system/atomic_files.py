"""Atomic files: written under a temporary name, synced and renamed, so a killed process leaves the old file or the new one."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_vl.errors import UserError

PARTIAL = ".partial"
"""How the name of a file ends whose writing a kill cut short."""
AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of Linux' renameat2: paths are relative to the working folder; the two names change places."""


NAME_BYTES = 80
"""Of a label in a file's name, which systems allow 255."""


def slug(label: str) -> str:
    """A label as part of a file's name: as it is where it can be, else what can be kept of it and a digest; no two labels share one."""
    kept = re.sub(r"[^\w.+-]+", "_", label)
    if label and kept == label and len(label.encode()) <= NAME_BYTES:
        return label
    digest = hashlib.sha256(label.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{kept.encode()[:NAME_BYTES].decode('utf-8', 'ignore')}-{digest}"


def write_bytes(path: Path, data: bytes, *, hint: str = "choose another --out, or mend its permissions") -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}{PARTIAL}")
        descriptor = _alone(temporary)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(
            f"cannot be written: {error.strerror}",
            where=str(path),
            hint="make room" if error.errno == errno.ENOSPC else hint,
        ) from None


def _alone(temporary: Path) -> int:
    """The temporary file, empty, for this writer alone: one name for all writers, so what a kill left is taken over by the next."""
    while True:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        if is_named(descriptor, temporary):
            os.ftruncate(descriptor, 0)
            return descriptor
        os.close(descriptor)  # another writer was done with it in between


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders under `folder` that no writer holds: kills left them."""
    for path in folder.rglob(f".*{PARTIAL}"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        except OSError:
            pass  # being written, or another user's
        finally:
            os.close(descriptor)


def is_named(descriptor: int, path: Path) -> bool:
    """Whether an open file still is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def write_text(path: Path, text: str) -> None:
    """As UTF-8; half a pair, as names of files that are no UTF-8 have it, is written as JSON writes it: \\udcff."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def exchange(one: Path, other: Path) -> bool:
    """Let two files or folders change places in one step; False where the system or the file system has none."""
    import ctypes

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # not Linux
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one))


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def made_parents(path: Path, *, hint: str) -> Iterator[None]:
    """Make the folders above `path`; those that are empty in the end go again."""
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(path), hint=hint) from None
    try:
        yield
    finally:
        for folder in missing:
            try:
                folder.rmdir()
            except OSError:
                break


def is_a_path(text: str) -> bool:
    """Whether a word that may also be a tag is written as a file or folder: it has a suffix, or folders."""
    return bool(Path(text).suffix) or len(Path(text).parts) > 1


def cell_name(dataset: str, seed: int) -> str:
    """The folder of a cell: one data set, one seed."""
    return f"{slug(dataset)}-seed{seed}"
