"""A `$DATA` tree prepared for CoOp (its DATASETS.md), used unchanged: same splits, same few-shot choice, same templates.

    $DATA/oxford_pets/images/*.jpg
    $DATA/oxford_pets/split_zhou_OxfordPets.json     {"train": [[path, label, class name], ...], "val": ..., "test": ...}

Two of CoOp's data sets have no split file: FGVCAircraft (`images_variant_{train,val,test}.txt`) and ImageNet (`classnames.txt` and
`images/{train,val}/<wordnet id>`, its val being val and test). Any other folder with one `split_zhou_*.json` is read like the rest.

The few-shot choice is CoOp's for the same seed: `random.seed(seed)`, then `random.sample` class by class in the order in which the
classes appear in the split file, a class with fewer images giving all; train first, then val from where train left off; then the
classes are cut to base. CoOp reads ImageNet's folders in the order of the file system; here it is sorted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergekit_vl.datasets.base import Dataset, Split
from mergekit_vl.datasets.class_folders import entries_of
from mergekit_vl.datasets.image_files import MEGAPIXELS_HELP, MOST_MEGAPIXELS, FolderImages, check_megapixels
from mergekit_vl.errors import UserError, unknown
from mergekit_vl.options import option
from mergekit_vl.printable import first_names, shown
from mergekit_vl.reporter import SILENT, Reporter
from mergekit_vl.system.regular_files import check_regular, check_utf8, read_regular, read_text, user_path

Items = list[tuple[str, int, str]]
"""(path relative to the image folder, label, class name)."""
PLAIN = "a photo of a {}."
MOST_SPLIT = 32 * 2**20
"""Bytes of a split file."""


@dataclass(frozen=True)
class Layout:
    """Where CoOp keeps a data set's images, and the template of its zero-shot classifier."""

    images: str
    template: str = PLAIN


KNOWN = {
    "caltech-101": Layout("101_ObjectCategories"),
    "oxford_pets": Layout("images", "a photo of a {}, a type of pet."),
    "stanford_cars": Layout("."),
    "oxford_flowers": Layout("jpg", "a photo of a {}, a type of flower."),
    "food-101": Layout("images", "a photo of {}, a type of food."),
    "fgvc_aircraft": Layout("images", "a photo of a {}, a type of aircraft."),
    "sun397": Layout("SUN397"),
    "dtd": Layout("images", "{} texture."),
    "eurosat": Layout("2750", "a centered satellite photo of {}."),
    "ucf101": Layout("UCF-101-midframes", "a photo of a person doing {}."),
    "imagenet": Layout("images"),
}


@dataclass(frozen=True)
class CoOpLayout:
    """One data set of a tree prepared for CoOp, unchanged: its splits, its few-shot choice, its template."""

    root: str = option(help="the tree that holds the data sets' folders (CoOp's $DATA)")
    dataset: str = option(help="the data set's folder: " + ", ".join(KNOWN))
    template: str | None = option(None, "the prompt around a class name; none: CoOp's for this data set")
    templates: tuple[str, ...] = option((), "several prompts, instead of `template`")
    max_megapixels: float = option(MOST_MEGAPIXELS, MEGAPIXELS_HELP)

    named_by = "dataset"
    """The option that tells one dataset of this kind from another."""

    def load(self, reporter: Reporter = SILENT) -> Dataset:
        """The dataset; raises UserError for a wrong root, a missing split file or missing images."""
        check_megapixels(self.max_megapixels)
        root = user_path(self.root)
        _check_inside(self.dataset, where="dataset.dataset")
        folder = root / self.dataset
        if not root.is_dir():
            raise UserError("no such folder", where=str(root), hint="give CoOp's $DATA folder as dataset.root")
        if not folder.is_dir():
            there = [name for name, is_folder in entries_of(root) if is_folder]
            if self.dataset not in KNOWN:
                raise unknown("data set", self.dataset, {*KNOWN, *there}, where=str(root))
            raise UserError(
                f"no folder {self.dataset}: it holds {', '.join(sorted(there)[:5]) or 'no folders'}",
                where=str(root),
                hint="give the folder above the data sets as dataset.root, or prepare the data set as CoOp's DATASETS.md says",
            )
        layout = KNOWN.get(self.dataset, Layout("."))
        reporter.progress(0, 0, f"reading the split of {self.dataset}")
        readers: dict[str, Callable[[Path], dict[str, Items]]] = {"fgvc_aircraft": _aircraft, "imagenet": _imagenet}
        parts = readers.get(self.dataset, _split_zhou)(folder)
        images = folder / layout.images
        if self.dataset not in KNOWN:
            images = _image_folder(folder, parts)
        names = _names(parts, folder)
        source = _source(images, parts, self.max_megapixels)
        row = {file: i for i, file in enumerate(source.files)}
        splits = {
            part: Split(source, np.array([row[i[0]] for i in items]), np.array([i[1] for i in items], dtype=np.int64))
            for part, items in parts.items()
        }
        templates = self.templates or (self.template or layout.template,)
        train, val, test = (splits[part] for part in PARTS)
        return Dataset(self.dataset, names, templates, train, val, test, few_give_all=True)


def _split_zhou(folder: Path) -> dict[str, Items]:
    files = sorted(folder.glob("split_zhou_*.json"))
    if len(files) != 1:
        what = "no split_zhou_*.json" if not files else f"{len(files)} split files: {', '.join(f.name for f in files)}"
        hint = "keep one" if files else "put CoOp's split file there (its DATASETS.md links to it)"
        raise UserError(what, where=str(folder), hint=hint)
    where = str(files[0])
    try:
        content = json.loads(read_regular(files[0], most=MOST_SPLIT))
        parts = {part: [tuple(item) for item in content[part]] for part in PARTS}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"not a split file: {error!r}", where=where, hint=FORM) from None
    most = sum(map(len, parts.values()))
    return {part: [_item(item, most, f"{where}: {part}.{i}") for i, item in enumerate(parts[part])] for part in PARTS}


def _item(given: tuple[object, ...], most: int, where: str) -> tuple[str, int, str]:
    """An entry of a split of `most` entries: labels count from 0 without gaps, so there are no more of them."""
    if len(given) != 3 or not isinstance(given[0], str) or type(given[2]) not in (str, int):
        raise UserError(f"{given!r} is no entry", where=where, hint=FORM)
    file, label, name = given[0], given[1], given[2]
    if type(label) is not int or not 0 <= label < most:
        raise UserError(f"{label!r} is no label", where=where, hint=f"a whole number from 0, below the {most} entries")
    _check_inside(file, where=where)
    check_utf8(str(name), where=where)
    return file, label, str(name)


def _check_inside(file: str, *, where: str) -> None:
    """Raise UserError for a path that leaves its folder, or that no file can have."""
    if not file or Path(file).is_absolute() or ".." in Path(file).parts:
        raise UserError(
            f"the path {file!r} leaves the folder", where=where, hint="paths are relative to it, without .."
        )
    check_utf8(file, where=where)
    try:
        user_path(f"./{file}")
    except UserError as error:
        raise UserError(f"{shown(file, 100)}: {error.what}", where=where, hint=error.hint) from None


FORM = 'it holds {"train": [[path, label, class name], ...], "val": ..., "test": ...}'
PARTS = ("train", "val", "test")


def _aircraft(folder: Path) -> dict[str, Items]:
    """FGVCAircraft's own lists: a line is an image's number and its variant."""
    labels = {name: i for i, name in enumerate(_lines(folder / "variants.txt"))}
    parts: dict[str, Items] = {}
    for part in PARTS:
        file = folder / f"images_variant_{part}.txt"
        parts[part] = []
        for line in _lines(file):
            image, _, name = line.partition(" ")
            if name not in labels:
                raise UserError(f"{name!r} is not in variants.txt", where=str(file), hint="copy the lists again")
            _check_inside(f"{image}.jpg", where=str(file))
            parts[part].append((f"{image}.jpg", labels[name], name))
    return parts


def _imagenet(folder: Path) -> dict[str, Items]:
    """ImageNet's folders, named by CoOp's classnames.txt; labels are the positions of the sorted folders."""
    names = {line.split(" ", 1)[0]: line.split(" ", 1)[-1] for line in _lines(folder / "classnames.txt")}
    parts: dict[str, Items] = {}
    for part, inside in (("train", "train"), ("val", "val")):
        above = folder / "images" / inside
        if not above.is_dir():
            raise UserError(f"no images/{inside}", where=str(folder), hint="prepare it as CoOp's DATASETS.md says")
        ids = [name for name, is_folder in entries_of(above) if is_folder]
        if nameless := [i for i in ids if i not in names]:
            raise UserError(f"classnames.txt has no line for {nameless[0]}", where=str(folder), hint="copy it again")
        parts[part] = [
            (f"{inside}/{i}/{file}", label, names[i])
            for label, i in enumerate(ids)
            for file, is_folder in entries_of(above / i)
            if not is_folder
        ]
    return parts | {"test": parts["val"]}


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in read_text(file).splitlines() if line.strip()]
    except UserError as error:
        raise UserError(error.what, where=error.where, hint="prepare it as CoOp's DATASETS.md says") from None


def _image_folder(folder: Path, parts: dict[str, Items]) -> Path:
    """Of a data set that CoOp does not know: the folder below (or the data set's own) under which the first image is."""
    first = next((items[0][0] for items in parts.values() if items), "")
    below = [folder / name for name, is_folder in entries_of(folder) if is_folder]
    return next((path for path in (folder, *below) if os.path.isfile(path / first)), folder)


def _names(parts: dict[str, Items], folder: Path) -> tuple[str, ...]:
    """Class names by label, `_` read as a space; every label from 0 on has one."""
    names: dict[int, str] = {}
    for items in parts.values():
        for file, label, name in items:
            name = name.replace("_", " ")
            if names.setdefault(label, name) != name:
                raise UserError(
                    f"label {label} is {names[label]!r} and, at {file}, {name!r}",
                    where=str(folder),
                    hint="take CoOp's split file again",
                )
    if missing := [label for label in range(max(names, default=-1) + 1) if label not in names]:
        raise UserError(f"no image has label {missing[0]}", where=str(folder), hint="labels count from 0 without gaps")
    if len(names) < 2:
        raise UserError(f"{len(names)} classes", where=str(folder), hint="at least two are needed")
    return tuple(names[label] for label in range(len(names)))


def _source(folder: Path, parts: dict[str, Items], megapixels: float) -> FolderImages:
    """The images of all splits, known by path and size; raises UserError where some are not there."""
    files = sorted({item[0] for items in parts.values() for item in items})
    digest, missing = hashlib.sha256(), []
    for file in files:
        check_utf8(file, where=str(folder))
        if os.path.exists(folder / file):
            digest.update(f"{file}\0{check_regular(folder / file)}\n".encode())
        else:
            missing.append(file)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(files)} images are missing: {first_names(missing)}",
            where=str(folder),
            hint="prepare the images as CoOp's DATASETS.md says",
        )
    return FolderImages(folder, tuple(files), digest.hexdigest(), megapixels)
