"""A run's own folder: one command at a time, claimed for one recipe, and no new one left behind where nothing came of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit_vl.errors import UserError
from mergekit_vl.system.atomic_files import PARTIAL, made_parents, sweep, write_text
from mergekit_vl.system.locks import locked

MARK, LOCK = ".recipe-hash", ".lock"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep every other command out of a run's folder; raises UserError at once where another process is at work in it.

    Where nothing can be written there is no lock: what is there can still be told.
    """
    hint = "choose another --out"
    if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK)):
        yield
        return
    with made_parents(folder / LOCK, hint=hint), locked(folder / LOCK, where=folder, hint=hint):
        yield


def claim(folder: Path, mark: str, load: Callable[[Path], Any], *, force: bool) -> Any:
    """Take a folder, `alone`, for what `mark` stands for; what `load` finds there if it is done already.

    Raises UserError for the folder of something else.
    """
    file = folder / MARK
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file", where=str(folder), hint="choose another --out")
    if folder.is_dir() and any(path.suffix != PARTIAL and path.name != LOCK for path in folder.iterdir()):
        if not file.exists() or file.read_bytes().strip() != mark.encode():
            raise UserError(
                "this folder belongs to another recipe, or to other settings of it",
                where=str(folder),
                hint="choose another --out",
            )
        if force:  # what says that it is done goes first, and the mark stays: a kill leaves a run that goes on
            for path in sorted(folder.iterdir(), key=lambda path: path.suffix != ".json"):
                if path.name not in (MARK, LOCK):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        elif (found := load(folder)) is not None:
            return found
    write_text(file, mark + "\n")
    sweep(folder)
    return None


@contextmanager
def tidied(folder: Path) -> Iterator[None]:
    """What fails or is interrupted inside before its first result leaves no new folder behind."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except BaseException:
        if folder.is_dir() and [path.name for path in folder.iterdir()] == [MARK]:
            (folder / MARK).unlink()
        for place in new:
            if not place.is_dir() or any(place.iterdir()):
                break
            place.rmdir()
        raise
