"""Folders of classes: which there are, whatever links lead to them, the images that they hold, and the names of the classes."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit_vl.datasets.image_files import readable_suffixes
from mergekit_vl.errors import UserError, unknown
from mergekit_vl.printable import counted, first_names
from mergekit_vl.system.regular_files import check_utf8, read_text

VAL_NAMES = ("val", "valid", "validation")
Identity = tuple[int, int]
"""A folder's device and number there, whatever links lead to it."""
Classes = dict[str, list[str]]
"""Class folder, relative to its split -> its images, relative to the root."""


def scan(root: Path) -> dict[str, Classes]:
    """Classes of 'train', 'test' and perhaps 'val', or of '' for a single folder."""
    train, test = root / "train", root / "test"
    if train.is_dir() and test.is_dir():
        folders = {"train": train, "test": test}
        if val := next((root / name for name in VAL_NAMES if (root / name).is_dir()), None):
            folders["val"] = val
        return {split: classes_in(folder, root) for split, folder in folders.items()}
    found = classes_in(root, root)
    for split, other in (("train", "test"), ("test", "train")):
        if (root / split).is_dir() and not found.get(
            split
        ):  # one that holds images itself is a class: trains are vehicles
            raise UserError(
                f"a {split} folder but no {other} folder",
                where=str(root),
                hint=f"add {other}, or set dataset.path={root / split} to split that one",
            )
    return {"": found}


def classes_in(folder: Path, root: Path) -> Classes:
    """Each folder below that directly holds images, and each leaf, which ought to.

    A folder is visited once, where it comes up first: links can lead to it on as many ways as there are atoms.
    """
    readable = readable_suffixes()
    classes: Classes = {}
    again: list[str] = []
    first = _identity(folder)
    parents: dict[Identity, Identity | None] = {_identity(p): None for p in folder.resolve().parents}
    parents[first] = None
    """Of each folder that was met, and none of those above the first, which are met already."""
    waiting = [(folder, first)]
    while waiting:
        here, own = waiting.pop()
        entries = entries_of(here)
        folders = [here / name for name, is_folder in entries if is_folder]
        below = []
        for there in sorted(folders, key=os.path.islink):  # a folder's own name rather than that of a link to it
            identity = _identity(there)
            if identity not in parents:
                parents[identity] = own
                below.append((there, identity))
            elif not _is_above(identity, own, parents):
                again.append(there.relative_to(root).as_posix())
        waiting += below
        images = [name for name, is_folder in entries if not is_folder and Path(name).suffix.lower() in readable]
        if here != folder and (images or not below):
            files = [(here / name).relative_to(root).as_posix() for name in images]
            for name in (here.relative_to(root).as_posix(), *files):
                check_utf8(name, where=str(root))
            classes[here.relative_to(folder).as_posix()] = files
    if again:
        warnings.warn(
            f"{root}: {counted(again, 'folder')} left out that links show again: {first_names(sorted(again))}",
            stacklevel=2,
        )
    return classes


def entries_of(folder: Path) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of what a folder holds, in order, but for what is hidden."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"cannot be listed: {error.strerror}", where=str(folder), hint="check its permissions"
        ) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_above(found: Identity, own: Identity, parents: Mapping[Identity, Identity | None]) -> bool:
    """Whether a link leads back to its folder or one above, which brings nothing."""
    at: Identity | None = own
    while at is not None:
        if at == found:
            return True
        at = parents[at]
    return found in parents and parents[found] is None


def _identity(folder: Path) -> Identity:
    try:
        status = folder.stat()
    except OSError as error:
        raise UserError(
            f"cannot be listed: {error.strerror}", where=str(folder), hint="check its permissions"
        ) from None
    return status.st_dev, status.st_ino


def names_of(folders: Sequence[str]) -> tuple[str, ...]:
    """The last folder's name, with as many parents before it as it takes to be unique."""
    parts = [folder.split("/") for folder in folders]
    depth = [1] * len(parts)
    while True:
        names = [" ".join(p[-d:]).replace("_", " ") for p, d in zip(parts, depth)]
        counts = Counter(names)
        longer = [min(d + (counts[name] > 1), len(p)) for p, d, name in zip(parts, depth, names)]
        if longer == depth:
            return tuple(names)
        depth = longer


def names_in(file: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """The class names that a file gives to the folders."""
    where = str(file)
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if any("\t" in line for line in lines):
        last = Counter(folder.split("/")[-1] for folder in folders)
        known = {folder.split("/")[-1]: folder for folder in folders if last[folder.split("/")[-1]] == 1} | {
            f: f for f in folders
        }
        named: dict[str, str] = {}
        for line in lines:
            given, tab, name = (part.strip() for part in line.partition("\t"))
            if not (given and name):
                raise UserError(
                    f"no tab in {line!r}", where=where, hint="either every line is 'folder<TAB>name' or none is"
                )
            if given not in known:
                raise unknown("class folder", given, known, where=where)
            if known[given] in named:
                raise UserError(f"class folder {given!r} twice", where=where, hint="remove one of the lines")
            named[known[given]] = name
        if missing := [folder for folder in folders if folder not in named]:
            raise UserError(
                f"{counted(missing, 'class folder')} without a name: {first_names(missing)}",
                where=where,
                hint="add a line for it",
            )
        return tuple(named[folder] for folder in folders)
    if len(lines) != len(folders):
        raise UserError(
            f"{len(lines)} names for {len(folders)} class folders", where=where, hint="one per folder, in sorted order"
        )
    return tuple(lines)
