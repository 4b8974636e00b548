"""Image folders: one folder per class, either under train/val/test, or together, in which case the splits are drawn here."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergekit_vl.datasets.base import Dataset, Split
from mergekit_vl.datasets.class_folders import Classes, check_divided, classes_in, scan, split_folders
from mergekit_vl.datasets.class_names import (
    WORDNET,
    are_few,
    doubles,
    for_folders,
    of_folders,
    of_wordnet,
    read_names,
    read_templates,
)
from mergekit_vl.datasets.foreign_data import found_in, told
from mergekit_vl.datasets.image_files import (
    MEGAPIXELS_HELP,
    MOST_MEGAPIXELS,
    FolderImages,
    check_megapixels,
    verified,
)
from mergekit_vl.errors import UserError
from mergekit_vl.options import option
from mergekit_vl.printable import counted, first_names
from mergekit_vl.reporter import SILENT, Reporter
from mergekit_vl.system.regular_files import check_utf8, user_path


@dataclass(frozen=True)
class Folder:
    """Images in class folders: `path/train|val|test/<class>/*`, or `path/<class>/*` to be split in three.

    A class is any folder, however deep, that directly holds images. Splits may be called Train, training, valid, dev and the like; without `val` a
    share of train becomes val, without `test` val is the test. Folders that are WordNet ids get ImageNet's names. Every image is decoded once here, so that a damaged one is met before the training and not in the middle of it.
    """

    path: str = option(help="the folder of images")
    classes_file: str | None = option(
        None,
        "class names: one a line in the order of the sorted folders, 'folder<TAB>name', 'id name', '0, name', CSV with a header, JSON list or map",
    )
    template: str = option("a photo of a {}.", "the prompt around a class name")
    templates: tuple[str, ...] = option((), "several prompts, instead of `template`")
    templates_file: str | None = option(None, "the same in a file: one a line, or a JSON list")
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
        return self._loaded(reporter, whole=False)

    @property
    def divided(self) -> bool:
        """Whether the folder has splits of its own."""
        root = user_path(self.path)
        return root.is_dir() and bool(split_folders(root))

    def whole(self, reporter: Reporter) -> Dataset:
        """All images, of all splits, as test; train and val are empty. Raises UserError as `load` does."""
        return self._loaded(reporter, whole=True)

    def check_there(self) -> None:
        """Raise UserError where the folder is not there."""
        self._root()

    def _root(self) -> Path:
        root = user_path(self.path).resolve()
        check_utf8(root.name, where=self.path)
        if not root.is_dir():
            raise UserError(
                "not a folder" if root.exists() else "no such folder", where=str(root), hint="check dataset.path"
            )
        return root

    def _loaded(self, reporter: Reporter, *, whole: bool) -> Dataset:
        self._checked_templates()
        check_megapixels(self.max_megapixels)
        root = self._root()
        found = scan(root, reporter.tell)
        if not any(files for classes in found.values() for files in classes.values()):
            if other := found_in(root):
                raise UserError(
                    f"it holds {other[0].what}, and no folders of images", where=str(root), hint=told(*other)
                )
        elif not whole:
            check_divided(root, found)
        return self.made(root, found, reporter, whole=whole, name=root.name)

    def made(self, root: Path, found: dict[str, Classes], reporter: Reporter, *, whole: bool, name: str) -> Dataset:
        """The dataset of images under `root`, by split and class; all as test where `whole`. Raises UserError as `load` does."""
        templates = self._checked_templates()
        check_megapixels(self.max_megapixels)
        if whole:
            found = {"": _together(found)}
        else:
            if "test" not in found and "val" in found:
                reporter.tell(f"{name} has no test folder: val is the test, and a share of train is val")
                found = {"train": found.get("train", {}), "test": found["val"]}
            self._check_shares(single="" in found)
        folders = self._check(root, found)
        names = self._names(folders, reporter)
        if inside := [folder for folder in folders if any(folder.startswith(f"{other}/") for other in folders)]:
            warnings.warn(
                f"{root}: {counted(inside, 'class', 'classes')} inside another class's folder: {first_names(inside)}; "
                "move the images up if they are of that one",
                stacklevel=2,
            )

        source, found = self._decodable(reporter, root, found)
        self._check(root, found)
        row = {file: i for i, file in enumerate(source.files)}
        parts = {"train": {}, "val": {}, "test": found[""]} if whole else self._parts(root, found)
        train, val, test = (_split(source, row, folders, parts[part]) for part in ("train", "val", "test"))
        shifts: dict[str, Split] = {}
        for given in self.shifts:
            shifted = user_path(given).resolve()
            check_utf8(shifted.name, where=given)
            if shifted.name in shifts or shifted.name in ("ID", root.name):
                raise UserError(f"two sets are called {shifted.name!r}", where="dataset.shifts", hint="rename a folder")
            shifts[shifted.name] = self._shift(reporter, shifted, folders)
        return Dataset(name, names, templates, train, val, test, shifts=shifts)

    def _shift(self, reporter: Reporter, root: Path, folders: Sequence[str]) -> Split:
        """All images of a folder of class folders, as test images of those of our classes that it shows."""
        if not root.is_dir():
            raise UserError("no such folder", where=str(root), hint="check dataset.shifts")
        found = {"": {folder: files for folder, files in classes_in(root, root).items() if files}}
        if not found[""]:
            raise UserError("no class folder holds an image", where=str(root), hint="check dataset.shifts")
        if alone := sorted(folder for folder in found[""] if folder not in folders):
            raise UserError(
                f"{counted(alone, 'class', 'classes')} that {self.path} does not have: {first_names(alone)}",
                where=str(root),
                hint="name the class folders as there, or leave these out",
            )
        source, found = self._decodable(reporter, root, found)
        return _split(source, {file: i for i, file in enumerate(source.files)}, folders, found[""])

    def _decodable(
        self, reporter: Reporter, root: Path, found: dict[str, Classes]
    ) -> tuple[FolderImages, dict[str, Classes]]:
        """The images that decode; the others are refused, or left out with a warning where `skip_corrupt`."""
        source, corrupt = verified(
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
                f"{counted(corrupt, 'image')} cannot be decoded: {first_names(corrupt)}",
                where=str(root),
                hint="remove it, or set dataset.skip_corrupt=true",
            )
        warnings.warn(
            f"{root}: skipped {counted(corrupt, 'image')} that cannot be decoded: {first_names(corrupt, 20)}",
            stacklevel=2,
        )
        return source, {
            split: {f: [x for x in files if x not in corrupt] for f, files in classes.items()}
            for split, classes in found.items()
        }

    def _checked_templates(self) -> tuple[str, ...]:
        templates = tuple(self.templates) or (self.template,)
        if self.templates_file is not None:
            templates = read_templates(user_path(self.templates_file))
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
                    f"{counted(empty, 'class folder')} without images: {first_names(empty)}",
                    where=where,
                    hint="fill or remove it",
                )
        train = found.get("train", found.get("", {}))
        for split, classes in found.items():
            if alone := sorted(folder for folder in classes if folder not in train):
                raise UserError(
                    f"{counted(alone, 'class', 'classes')} in {split} but not in train: {first_names(alone)}",
                    where=where,
                    hint="add it to train",
                )
            if split == "test" and (alone := sorted(folder for folder in train if folder not in classes)):
                raise UserError(
                    f"{counted(alone, 'class', 'classes')} in train but not in test: {first_names(alone)}",
                    where=where,
                    hint="add it to test",
                )
        if len(train) < 2:
            raise UserError(
                f"only one class, {next(iter(train))!r}", where=where, hint="at least two class folders are needed"
            )
        return sorted(train)

    def _names(self, folders: Sequence[str], reporter: Reporter) -> tuple[str, ...]:
        if self.classes_file is not None:
            where, hint = self.classes_file, "give each class a name of its own"
            found = read_names(user_path(self.classes_file), folders)
            names = for_folders(found, folders, where)
            if found.form != "one name a line":
                reporter.tell(f"{where}: {len(names)} class names ({found.form})")
        else:
            where, hint = self.path, "rename a folder, or name the classes in dataset.classes_file"
            ids = [folder.split("/")[-1] for folder in folders]
            wordnet = all(WORDNET.fullmatch(each) for each in ids)
            names = of_wordnet(ids, reporter.tell, reporter.warn) if wordnet else of_folders(folders)
        if twice := doubles(names):
            what = f"{counted(twice, 'class name')} used more than once: {first_names(twice)}"
            if not are_few(twice, names):
                raise UserError(what, where=where, hint=hint)
            reporter.warn(f"{where}: {what}; their images are told apart by chance")
        return names

    def _parts(self, root: Path, found: dict[str, Classes]) -> dict[str, Classes]:
        """train, val and test, drawing those that have no folder."""
        if "val" in found:
            return found
        least, into = (3, "three") if "" in found else (2, "train and val")
        pool = found.get("", found.get("train", {}))
        if small := sorted(f"{folder} ({len(files)})" for folder, files in pool.items() if len(files) < least):
            raise UserError(
                f"{counted(small, 'class', 'classes')} with too few images to split in {into}: {first_names(small)}",
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


def _together(found: Mapping[str, Classes]) -> Classes:
    """The classes of all splits, each with the images of all; empty folders are left out where another split has images of the class."""
    classes: Classes = {}
    for each in found.values():
        for folder, files in each.items():
            classes.setdefault(folder, []).extend(files)
    return classes


def _split(source: FolderImages, row: dict[str, int], folders: Sequence[str], part: Classes) -> Split:
    pairs = sorted((row[file], label) for label, folder in enumerate(folders) for file in part.get(folder, ()))
    rows, labels = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return Split(source, rows.copy(), labels.copy())
