"""A lock file that lets one process at a time use a folder, names the process that has it, and is released when that process dies."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_vl.errors import UserError
from mergekit_vl.system.atomic_files import is_named

BUSY = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def locked(file: Path, *, where: Path, hint: str) -> Iterator[None]:
    """Hold the lock `file`, which is removed afterwards; raises UserError at once where another process holds it.

    The kernel gives up the lock of a process that dies, so a file that a kill left is taken over.
    """
    descriptor = _open(file, where, hint)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _open(file: Path, where: Path, hint: str) -> int:
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", where=str(where), hint=hint) from None
        try:
            held = _held(descriptor)
            if held is not None:
                raise UserError(f"is being written by {held}", where=str(where), hint=f"wait for it, or {hint}")
            if is_named(descriptor, file):
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return descriptor
        except OSError as error:
            os.close(descriptor)
            raise UserError(f"cannot be written: {error.strerror}", where=str(where), hint=hint) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder removed it in between


def _held(descriptor: int) -> str | None:
    """Who holds the lock, in words; None where it is ours now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except OSError as error:
        busy = error.errno in BUSY
    pid, _, host = os.pread(descriptor, 300, 0).decode(errors="replace").strip().partition(" ")
    if not busy and (not pid or (host == socket.gethostname() and not _alive(pid))):
        return None  # a file system without locks: what the file says must do
    return f"process {pid} on {host}" if pid else "another process"


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True
