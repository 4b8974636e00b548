"""Image folders: one folder per class, either under train/val/test, or together, in which case the splits are drawn here."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mergekit_vl.datasets.base import Dataset, Split
from mergekit_vl.errors import UserError, unknown
from mergekit_vl.options import option
from mergekit_vl.printable import shown
from mergekit_vl.reporter import SILENT, Reporter
from mergekit_vl.system.regular_files import check_utf8, read_regular, read_text, user_path

if TYPE_CHECKING:
    from PIL.Image import Image

VAL_NAMES = ("val", "valid", "validation")
THREADS = 4
MOST_MEGAPIXELS = 64
"""Of an image that is decoded, unless an option says otherwise: a small file can hold many more pixels than memory."""
LARGE_MEGAPIXELS = 16
"""Images from here on are checked one at a time, not by all threads at once."""
STARTS_PROGRAMS = {"EPS", "WMF"}
"""Formats that are not read: decoding them would run Ghostscript, or the system's own player, on the file."""

MEGAPIXELS_HELP = "images with more million pixels are refused, before they are decoded"

Identity = tuple[int, int]
"""A folder's device and number there, whatever links lead to it."""
Classes = dict[str, list[str]]
"""Class folder, relative to its split -> its images, relative to the root."""


@dataclass(frozen=True)
class FolderImages:
    """Image files under a root, read and decoded when asked for."""

    root: Path
    files: tuple[str, ...]
    """Relative to the root, sorted; a row is a position here."""
    key: str
    """sha256 over each file's relative path, size and content hash."""
    megapixels: float = MOST_MEGAPIXELS
    """A larger image is refused."""

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> Image:
        """The image as RGB, upright by its EXIF orientation; raises UserError for a file that is gone or damaged since the dataset was."""
        file = self.root / self.files[index]
        try:
            return decode(file, megapixels=self.megapixels)
        except (MemoryError, UserError):
            raise
        except Exception as error:  # PIL's decoders raise nearly anything
            raise UserError(
                f"cannot be read any more: {error}", where=str(file), hint="restore it, or load the dataset again"
            ) from None


@dataclass(frozen=True)
class Folder:
    """Images in class folders: `path/train|val|test/<class>/*`, or `path/<class>/*` to be split in three.

    A class is any folder, however deep, that directly holds images. Without `val` a share of train becomes val. Every
    image is decoded once here, so that a damaged one is met before the training and not in the middle of it.
    """

    path: str = option(help="the folder of images")
    classes_file: str | None = option(
        None, "class names, one a line in the order of the sorted folders, or lines 'folder<TAB>name'"
    )
    template: str = option("a photo of a {}.", "the prompt around a class name")
    templates: tuple[str, ...] = option((), "several prompts, instead of `template`")
    val_share: float = option(0.1, "share of each class that becomes val where there is no val folder")
    test_share: float = option(0.3, "share of each class that becomes test where there are no train and test folders")
    split_seed: int = option(0, "draws the shares")
    shifts: tuple[str, ...] = option(
        (),
        "folders of test images of the same class folders, or some of them, under other distributions (protocol robust)",
    )
    skip_corrupt: bool = option(False, "leave out images that cannot be decoded, with a warning, instead of stopping")
    max_megapixels: float = option(MOST_MEGAPIXELS, MEGAPIXELS_HELP)

    named_by = "path"
    """The option that tells one dataset of this kind from another."""

    def load(self, reporter: Reporter = SILENT) -> Dataset:
        """The dataset; raises UserError for whatever is wrong with the options, the folders or the images."""
        templates = self._checked_templates()
        check_megapixels(self.max_megapixels)
        root = user_path(self.path).resolve()
        check_utf8(root.name, where=self.path)
        if not root.is_dir():
            raise UserError(
                "not a folder" if root.exists() else "no such folder", where=str(root), hint="check dataset.path"
            )
        found = _scan(root)
        self._check_shares(single="" in found)
        folders = self._check(root, found)
        names = self._names(folders)
        if inside := [folder for folder in folders if any(folder.startswith(f"{other}/") for other in folders)]:
            warnings.warn(
                f"{root}: {_count(inside, 'class', 'classes')} inside another class's folder: {_some(inside)}; "
                "move the images up if they are of that one",
                stacklevel=2,
            )

        source, found = self._decodable(reporter, root, found)
        self._check(root, found)
        row = {file: i for i, file in enumerate(source.files)}
        parts = self._parts(root, found)
        train, val, test = (_split(source, row, folders, parts[part]) for part in ("train", "val", "test"))
        shifts: dict[str, Split] = {}
        for given in self.shifts:
            shifted = user_path(given).resolve()
            check_utf8(shifted.name, where=given)
            if shifted.name in shifts or shifted.name in ("ID", root.name):
                raise UserError(f"two sets are called {shifted.name!r}", where="dataset.shifts", hint="rename a folder")
            shifts[shifted.name] = self._shift(reporter, shifted, folders)
        return Dataset(root.name, names, templates, train, val, test, shifts=shifts)

    def _shift(self, reporter: Reporter, root: Path, folders: Sequence[str]) -> Split:
        """All images of a folder of class folders, as test images of those of our classes that it shows."""
        if not root.is_dir():
            raise UserError("no such folder", where=str(root), hint="check dataset.shifts")
        found = {"": {folder: files for folder, files in _classes_in(root, root).items() if files}}
        if not found[""]:
            raise UserError("no class folder holds an image", where=str(root), hint="check dataset.shifts")
        if alone := sorted(folder for folder in found[""] if folder not in folders):
            raise UserError(
                f"{_count(alone, 'class', 'classes')} that {self.path} does not have: {_some(alone)}",
                where=str(root),
                hint="name the class folders as there, or leave these out",
            )
        source, found = self._decodable(reporter, root, found)
        return _split(source, {file: i for i, file in enumerate(source.files)}, folders, found[""])

    def _decodable(
        self, reporter: Reporter, root: Path, found: dict[str, Classes]
    ) -> tuple[FolderImages, dict[str, Classes]]:
        """The images that decode; the others are refused, or left out with a warning where `skip_corrupt`."""
        source, corrupt = _verified(
            reporter,
            root,
            sorted(file for classes in found.values() for files in classes.values() for file in files),
            self.max_megapixels,
        )
        if not corrupt:
            return source, found
        if not self.skip_corrupt:
            if first := next((error for error in corrupt.values() if error is not None), None):
                raise first
            raise UserError(
                f"{_count(corrupt, 'image')} cannot be decoded: {_some(corrupt)}",
                where=str(root),
                hint="remove it, or set dataset.skip_corrupt=true",
            )
        warnings.warn(
            f"{root}: skipped {_count(corrupt, 'image')} that cannot be decoded: {_some(corrupt, 20)}", stacklevel=2
        )
        return source, {
            split: {f: [x for x in files if x not in corrupt] for f, files in classes.items()}
            for split, classes in found.items()
        }

    def _checked_templates(self) -> tuple[str, ...]:
        templates = tuple(self.templates) or (self.template,)
        for template in templates:
            if "{}" not in template and "{c}" not in template:
                raise UserError(
                    f"no {{}} in {template!r}", where="dataset.template", hint="put {} or {c} where the class name goes"
                )
        return templates

    def _check_shares(self, *, single: bool) -> None:
        for key, share in (("val_share", self.val_share), ("test_share", self.test_share)):
            if not 0 < share < 1:
                raise UserError(f"{key}={share}", where=f"dataset.{key}", hint="between 0 and 1, both excluded")
        if single and self.val_share + self.test_share >= 1:
            raise UserError(
                f"val_share={self.val_share} and test_share={self.test_share} leave nothing to train on",
                where="dataset.val_share",
                hint="their sum must be below 1",
            )

    def _check(self, root: Path, found: dict[str, Classes]) -> list[str]:
        """The sorted class folders, once each split has what it must."""
        where = str(root)
        if not any(files for classes in found.values() for files in classes.values()):
            raise UserError(
                "no class folder holds an image", where=where, hint="put the images into one folder per class"
            )
        for split, classes in found.items():
            if split == "val":
                if not any(classes.values()):
                    raise UserError(
                        "the val folder holds no images",
                        where=where,
                        hint="fill it, or remove it to take a share of train",
                    )
                continue
            if empty := [f"{split}/{folder}".lstrip("/") for folder in sorted(classes) if not classes[folder]]:
                raise UserError(
                    f"{_count(empty, 'class folder')} without images: {_some(empty)}",
                    where=where,
                    hint="fill or remove it",
                )
        train = found.get("train", found.get("", {}))
        for split, classes in found.items():
            if alone := sorted(folder for folder in classes if folder not in train):
                raise UserError(
                    f"{_count(alone, 'class', 'classes')} in {split} but not in train: {_some(alone)}",
                    where=where,
                    hint="add it to train",
                )
            if split == "test" and (alone := sorted(folder for folder in train if folder not in classes)):
                raise UserError(
                    f"{_count(alone, 'class', 'classes')} in train but not in test: {_some(alone)}",
                    where=where,
                    hint="add it to test",
                )
        if len(train) < 2:
            raise UserError(
                f"only one class, {next(iter(train))!r}", where=where, hint="at least two class folders are needed"
            )
        return sorted(train)

    def _names(self, folders: Sequence[str]) -> tuple[str, ...]:
        if self.classes_file is None:
            names = _names_of(folders)
            where, hint = self.path, "rename a folder, or name the classes in dataset.classes_file"
        else:
            names = _names_in(user_path(self.classes_file), folders)
            where, hint = self.classes_file, "give each class a name of its own"
        if twice := sorted(name for name, n in Counter(names).items() if n > 1):
            raise UserError(
                f"{_count(twice, 'class name')} used more than once: {_some(twice)}", where=where, hint=hint
            )
        return names

    def _parts(self, root: Path, found: dict[str, Classes]) -> dict[str, Classes]:
        """train, val and test, drawing those that have no folder."""
        if "val" in found:
            return found
        least, into = (3, "three") if "" in found else (2, "train and val")
        pool = found.get("", found.get("train", {}))
        if small := sorted(f"{folder} ({len(files)})" for folder, files in pool.items() if len(files) < least):
            raise UserError(
                f"{_count(small, 'class', 'classes')} with too few images to split in {into}: {_some(small)}",
                where=str(root),
                hint=f"at least {least} images per class",
            )
        parts: dict[str, Classes] = {"train": {}, "val": {}, "test": dict(found.get("test", {}))}
        for folder, files in pool.items():
            files = sorted(files)
            random.Random(f"{self.split_seed}:{folder}").shuffle(
                files
            )  # by class: another class's images change nothing here
            n = len(files)
            n_test = min(max(1, round(n * self.test_share)), n - 2) if least == 3 else 0
            n_val = min(max(1, round(n * self.val_share)), n - 1 - n_test)
            if least == 3:
                parts["test"][folder] = files[:n_test]
            parts["val"][folder] = files[n_test : n_test + n_val]
            parts["train"][folder] = files[n_test + n_val :]
        return parts


def _split(source: FolderImages, row: dict[str, int], folders: Sequence[str], part: Classes) -> Split:
    pairs = sorted((row[file], label) for label, folder in enumerate(folders) for file in part.get(folder, ()))
    rows, labels = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return Split(source, rows.copy(), labels.copy())


def _scan(root: Path) -> dict[str, Classes]:
    """Classes of 'train', 'test' and perhaps 'val', or of '' for a single folder."""
    train, test = root / "train", root / "test"
    if train.is_dir() and test.is_dir():
        folders = {"train": train, "test": test}
        if val := next((root / name for name in VAL_NAMES if (root / name).is_dir()), None):
            folders["val"] = val
        return {split: _classes_in(folder, root) for split, folder in folders.items()}
    found = _classes_in(root, root)
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


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(sorted(set(Image.OPEN) - STARTS_PROGRAMS))


def readable_suffixes() -> set[str]:
    """Of the image files that can be decoded, in lower case with the dot."""
    from PIL import Image

    formats = _formats()
    return {ext for ext, kind in Image.registered_extensions().items() if kind in formats}


def _classes_in(folder: Path, root: Path) -> Classes:
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
            f"{root}: {_count(again, 'folder')} left out that links show again: {_some(sorted(again))}", stacklevel=2
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


def _verified(
    reporter: Reporter, root: Path, files: Sequence[str], megapixels: float
) -> tuple[FolderImages, dict[str, UserError | None]]:
    """The source of the files that decode, and those that do not, with what is to be said of those that are not merely damaged."""

    def look(file: str) -> str | UserError | None:
        try:
            data = _encoded(root / file, megapixels)
            decode(data, where=root / file, megapixels=megapixels, draft=True)
        except MemoryError:
            raise
        except UserError as error:
            return error
        except Exception:  # PIL's decoders raise nearly anything
            return None
        return f"{file}\0{len(data)}\0{hashlib.sha256(data).hexdigest()}\n"

    with ThreadPoolExecutor(THREADS) as pool:
        lines = []
        for line in pool.map(look, files):
            lines.append(line)
            reporter.progress(len(lines), len(files), f"reading the images of {root.name}")
    good = {file: line for file, line in zip(files, lines) if isinstance(line, str)}
    bad = {file: line for file, line in zip(files, lines) if not isinstance(line, str)}
    key = hashlib.sha256("".join(good.values()).encode()).hexdigest()
    return FolderImages(root, tuple(good), key, megapixels), bad


def check_megapixels(megapixels: float) -> None:
    if not 0 < megapixels <= 1e6:
        raise UserError(f"max_megapixels={megapixels}", hint="above 0, a million at most")


def _encoded(file: Path, megapixels: float) -> bytes:
    """A file's bytes, where it may be an image of so many pixels: 16 bytes a pixel are more than any format takes."""
    return read_regular(file, most=int(16e6 * megapixels) + 2**20)


_LARGE = threading.Lock()
_BOUND = threading.Lock()
_BOUNDS: list[int] = []
"""Those of the images that are decoded now."""
_BEFORE: list[int | None] = []
"""The process's own, while images are decoded."""


@contextmanager
def _pillow_bound(pixels: int) -> Iterator[None]:
    """Inside, Pillow's own bound, which holds for images inside of files too: it warns above this number, and refuses twice as much.

    The bound is the whole process's: it is the least of those that are asked for now, and afterwards what it was before.
    """
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    with _BOUND:
        if not _BOUNDS:
            _BEFORE.append(Image.MAX_IMAGE_PIXELS)
        _BOUNDS.append(pixels)
        Image.MAX_IMAGE_PIXELS = min(_BOUNDS)
    try:
        yield
    finally:
        with _BOUND:
            _BOUNDS.remove(pixels)
            Image.MAX_IMAGE_PIXELS = min(_BOUNDS) if _BOUNDS else _BEFORE.pop()


def decode(
    file: Path | bytes, *, where: Path | None = None, megapixels: float = MOST_MEGAPIXELS, draft: bool = False
) -> Image:
    """RGB; raises UserError for more pixels than are allowed, and whatever PIL raises for what is damaged.

    A draft reads all the bytes too, but a JPEG comes out small, which is much cheaper, and only a pixel is given back.
    """
    import io
    from contextlib import nullcontext

    from PIL import Image, ImageOps

    place = file if isinstance(file, Path) else where

    def refused() -> UserError:
        hint = "leave it out, or raise max_megapixels if you trust it"
        return UserError(f"it has more than {megapixels:g} million pixels", where=str(place or ""), hint=hint)

    data = file if isinstance(file, bytes) else _encoded(file, megapixels)
    try:
        with (
            _pillow_bound(max(1, int(megapixels * 1e6) // 2)),
            Image.open(io.BytesIO(data), formats=_formats()) as image,
        ):
            pixels = image.width * image.height
            if pixels > megapixels * 1e6:
                raise refused()
            with _LARGE if draft and pixels > 1e6 * LARGE_MEGAPIXELS else nullcontext():
                if draft:
                    image.draft("RGB", (1, 1))
                image.load()
                upright = image.crop((0, 0, 1, 1)) if draft else image
            ImageOps.exif_transpose(upright, in_place=True)
    except Image.DecompressionBombError:
        raise refused() from None
    if upright.mode.startswith("I"):  # 16 bits: PIL would clip where it should scale
        upright = Image.fromarray((np.asarray(upright) // 256).clip(0, 255).astype(np.uint8))
    if "transparency" in upright.info:
        upright = upright.convert("RGBA")
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _names_of(folders: Sequence[str]) -> tuple[str, ...]:
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


def _names_in(file: Path, folders: Sequence[str]) -> tuple[str, ...]:
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
                f"{_count(missing, 'class folder')} without a name: {_some(missing)}",
                where=where,
                hint="add a line for it",
            )
        return tuple(named[folder] for folder in folders)
    if len(lines) != len(folders):
        raise UserError(
            f"{len(lines)} names for {len(folders)} class folders", where=where, hint="one per folder, in sorted order"
        )
    return tuple(lines)


def _count(things: Sized, one: str, many: str = "") -> str:
    return f"{len(things)} {one if len(things) == 1 else many or one + 's'}"


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(shown(name, 100) for name in names[:most]) + (", ..." if len(names) > most else "")
