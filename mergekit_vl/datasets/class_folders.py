"""Folders of classes: which there are, whatever links lead to them, the images that they hold, and how they are split."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from mergekit_vl.datasets.image_files import LEFT_OUT, readable_suffixes, told_left_out
from mergekit_vl.errors import UserError
from mergekit_vl.printable import counted, first_names
from mergekit_vl.system.regular_files import check_utf8

SPLITS = {
    "train": ("train", "training", "trn", "train_set", "training_set"),
    "val": ("val", "valid", "validation", "dev", "val_set", "validation_set"),
    "test": ("test", "testing", "tst", "test_set"),
}
"""What people call the folders of splits, in any case, with `-` or a space for `_`."""
Identity = tuple[int, int]
"""A folder's device and number there, whatever links lead to it."""
Classes = dict[str, list[str]]
"""Class folder, relative to its split -> its images, relative to the root."""


def split_folders(root: Path) -> dict[str, Path]:
    """The folders that are splits, by what they are; raises UserError where two are the same.

    A folder of that name that holds images itself beside folders of other names is a class: trains are vehicles.
    """
    found: dict[str, list[str]] = {}
    others = False
    for name, is_folder in entries_of(root):
        if not is_folder:
            continue
        plain = name.lower().replace("-", "_").replace(" ", "_")
        split = next((split for split, names in SPLITS.items() if plain in names), None)
        if split is None:
            others = True
        else:
            found.setdefault(split, []).append(name)
    flat = [name for names in found.values() for name in names if _holds_images(root / name)]
    if flat and others:
        return {}
    for split, names in found.items():
        if len(names) > 1:
            raise UserError(
                f"{' and '.join(names)} are both names of {split}", where=str(root), hint="keep one, or rename one"
            )
    if flat:
        raise UserError(
            f"{' and '.join(flat)} hold{'s' * (len(flat) == 1)} images and no class folders",
            where=str(root),
            hint=f"put the images into a folder for each class: {root / flat[0]}/CLASS/IMAGE; or, of a table of labels: --dataset table path=TABLE",
        )
    return {split: root / names[0] for split, names in found.items()}


def _holds_images(folder: Path) -> bool:
    readable = readable_suffixes()
    return any(not is_folder and Path(name).suffix.lower() in readable for name, is_folder in entries_of(folder))


def scan(root: Path, tell: Callable[[str], object]) -> dict[str, Classes]:
    """Classes of 'train', 'test' and 'val' as far as there are folders for them, or of '' for a folder without splits."""
    folders = split_folders(root)
    if not folders:
        return {"": classes_in(root, root)}
    if {path.name for path in folders.values()} != folders.keys():
        told = ", ".join(f"{path.name} is {split}" for split, path in folders.items())
        tell(f"{root.name}: {told}")
    return {
        split: classes_in(folder, root) for split, folder in sorted(folders.items(), key=lambda each: each[0] == "val")
    }


def check_divided(root: Path, found: Mapping[str, Classes]) -> None:
    """Raise UserError where folders of splits leave nothing to train on, or nothing to test on."""
    if "" in found or ("train" in found and len(found) > 1):
        return
    there = ", ".join(found)
    lacking, hint = ("test", "add test or val") if "train" in found else ("train", "add train")
    folder = next(path for split, path in split_folders(root).items() if split in found)
    raise UserError(
        f"a {there} folder but no {lacking} folder",
        where=str(root),
        hint=f"{hint}, or set dataset.path={folder} to split that one",
    )


def classes_in(folder: Path, root: Path) -> Classes:
    """Each folder below that directly holds images, and each leaf, which ought to.

    A folder is visited once, where it comes up first: links can lead to it on as many ways as there are atoms.
    """
    readable = readable_suffixes()
    classes: Classes = {}
    again: list[str] = []
    left_out: Counter[str] = Counter()
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
        left_out.update(
            ending
            for name, is_folder in entries
            if not is_folder and (ending := Path(name).suffix.lower()) in LEFT_OUT and ending not in readable
        )
        if here != folder and (images or not below):
            files = [(here / name).relative_to(root).as_posix() for name in images]
            for name in (here.relative_to(root).as_posix(), *files):
                check_utf8(name, where=str(root))
            classes[here.relative_to(folder).as_posix()] = files
    if left_out:
        warnings.warn(f"{folder}: {told_left_out(left_out)}", stacklevel=2)
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
