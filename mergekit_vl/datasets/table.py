"""A table of images: CSV, TSV, JSON lines or Parquet with a column of paths and one of labels, perhaps one of splits (metadata.csv)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_vl.datasets.base import Dataset
from mergekit_vl.datasets.class_folders import SPLITS, Classes
from mergekit_vl.datasets.folder import Folder
from mergekit_vl.datasets.image_files import MEGAPIXELS_HELP, MOST_MEGAPIXELS
from mergekit_vl.errors import UserError
from mergekit_vl.options import option
from mergekit_vl.reporter import SILENT, Reporter
from mergekit_vl.system.regular_files import check_utf8, read_text, user_path

PATHS = (
    "path",
    "file_name",
    "filename",
    "filepath",
    "file_path",
    "image_path",
    "image",
    "img",
    "file",
    "id",
    "image_id",
)
LABELS = ("label", "class", "class_name", "label_name", "category", "target", "y", "breed", "species", "name")
PARTS = ("split", "subset", "set", "partition", "fold")
"""What the columns are called, best first."""
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MOST_ROWS = 2_000_000


@dataclass(frozen=True)
class Table:
    """Images by a table of paths and labels; a column `split` says train, val and test, else they are drawn as of a folder."""

    path: str = option(help="the table: .csv, .tsv, .jsonl, or .parquet (pip install 'mergekit-vl[parquet]')")
    images: str | None = option(None, "the folder that the paths start from; none: the table's own")
    image_column: str | None = option(None, "the column of paths; none: path, file_name, filename, image ...")
    label_column: str | None = option(None, "the column of labels; none: label, class, category ...")
    split_column: str | None = option(None, "the column of splits; none: split, subset ..., where there is one")
    classes_file: str | None = option(None, "names for the labels, in any form that the data set `folder` takes")
    template: str = option("a photo of a {}.", "the prompt around a class name")
    templates: tuple[str, ...] = option((), "several prompts, instead of `template`")
    templates_file: str | None = option(None, "the same in a file: one a line, or a JSON list")
    val_share: float = option(0.1, "share of each class that becomes val where no split says")
    test_share: float = option(0.3, "share of each class that becomes test where no split says")
    split_seed: int = option(0, "draws the shares")
    skip_corrupt: bool = option(False, "leave out images that cannot be decoded, with a warning, instead of stopping")
    max_megapixels: float = option(MOST_MEGAPIXELS, MEGAPIXELS_HELP)

    named_by = "path"
    """The option that tells one dataset of this kind from another."""

    def load(self, reporter: Reporter = SILENT) -> Dataset:
        """The dataset; raises UserError for a table without paths or labels, and as a folder of images does."""
        return self._made(reporter, whole=False)

    @property
    def divided(self) -> bool:
        """Whether the table says which images are test."""
        return user_path(self.path).is_file() and "" not in self._found()

    def whole(self, reporter: Reporter) -> Dataset:
        """All images as test."""
        return self._made(reporter, whole=True)

    def _made(self, reporter: Reporter, *, whole: bool) -> Dataset:
        folder = Folder(
            str(self._root()),
            self.classes_file,
            self.template,
            self.templates,
            val_share=self.val_share,
            test_share=self.test_share,
            split_seed=self.split_seed,
            templates_file=self.templates_file,
            skip_corrupt=self.skip_corrupt,
            max_megapixels=self.max_megapixels,
        )
        return folder.made(self._root(), self._found(), reporter, whole=whole, name=user_path(self.path).stem)

    def _root(self) -> Path:
        return (user_path(self.images) if self.images else user_path(self.path).parent).resolve()

    def _found(self) -> dict[str, Classes]:
        """Files by split and label, as `class_folders.scan` gives them."""
        file = user_path(self.path)
        columns, rows = _read(file)
        where = str(file)
        image = _column(columns, self.image_column, PATHS, "paths", where)
        label = _column(columns, self.label_column, [name for name in LABELS if name != image], "labels", where)
        part = self.split_column or next((name for name in columns if name.lower() in PARTS), None)
        found: dict[str, Classes] = {}
        for i, row in enumerate(rows, 2):
            name = str(row.get(label, "")).strip()
            if not name or any(mark in name for mark in ("|", ";")):
                what = f"line {i} has no label" if not name else f"line {i} has several labels, {name!r}"
                raise UserError(what, where=where, hint="one label an image: several are not there")
            split = _split(str(row.get(part, "")), where, i) if part else ""
            path = self._inside(str(row.get(image, "")).strip(), where, i)
            found.setdefault(split, {}).setdefault(name.replace("/", " "), []).append(path)
        if not found:
            raise UserError("no rows", where=where, hint="write a line for each image")
        return found

    def _inside(self, given: str, where: str, line: int) -> str:
        root = self._root()
        path = Path(given)
        if path.is_absolute() and path.is_relative_to(root):
            path = path.relative_to(root)
        if not given or path.is_absolute() or ".." in path.parts or "\0" in given:
            hint = "paths start from the table's folder, or from dataset.images=FOLDER"
            raise UserError(f"line {line}: the path {given!r} leaves {root}", where=where, hint=hint)
        check_utf8(given, where=where)
        if not path.suffix and not (root / path).exists():  # an id, as Kaggle's tables have them
            path = next((p for end in ENDINGS if (root / (p := path.with_name(path.name + end))).exists()), path)
        if not (root / path).is_file():
            hint = "set dataset.images to the folder that the paths start from"
            raise UserError(f"line {line}: no image {path}", where=where, hint=hint)
        return path.as_posix()


def _column(columns: Sequence[str], given: str | None, known: Sequence[str], what: str, where: str) -> str:
    if given is not None and given not in columns:
        raise UserError(f"no column {given!r}", where=where, hint=f"its columns are {', '.join(columns[:20])}")
    by = {column.lower().strip(): column for column in columns}
    found = given or next((by[name] for name in known if name in by), None)
    if found is None:
        key = "image_column" if what == "paths" else "label_column"
        hint = f"name it: dataset.{key}=..., of {', '.join(columns[:20])}"
        raise UserError(f"no column of {what}", where=where, hint=hint)
    return found


def _split(given: str, where: str, line: int) -> str:
    plain = given.strip().lower()
    found = next((split for split, names in SPLITS.items() if plain in names), None)
    if found is None:
        raise UserError(f"line {line}: {given!r} is no split", where=where, hint="train, val or test")
    return found


def _read(file: Path) -> tuple[list[str], list[Mapping[str, object]]]:
    """Columns and rows of a table."""
    where, ending = str(file), file.suffix.lower()
    if ending == ".parquet":
        return _parquet(file)
    text = read_text(file)
    if text.count("\n") > MOST_ROWS:
        raise UserError(f"more than {MOST_ROWS:,} lines", where=where, hint="split it into several tables")
    if ending in (".jsonl", ".ndjson"):
        rows: list[Mapping[str, object]] = []
        for i, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict):
                    raise UserError(f"line {i} is no JSON object", where=where, hint="write one object a line")
                rows.append(row)
        return list(dict.fromkeys(key for row in rows for key in row)), rows
    mark = "\t" if ending == ".tsv" else max(",;\t", key=text.partition("\n")[0].count)
    try:
        reader = csv.DictReader(io.StringIO(text), delimiter=mark)
        return list(reader.fieldnames or []), _whole_rows(reader, where)
    except csv.Error as error:
        raise UserError(f"not a table: {error}", where=where, hint="write a header and a line for each image") from None


def _whole_rows(reader: Iterable[Mapping[str | None, object]], where: str) -> list[Mapping[str, object]]:
    rows: list[Mapping[str, object]] = []
    for i, row in enumerate(reader, 2):
        if None in row or None in row.values():
            raise UserError(
                f"line {i} has another number of columns than the header", where=where, hint="mend the line"
            )
        rows.append({str(key): value for key, value in row.items()})
    return rows


def _parquet(file: Path) -> tuple[list[str], list[Mapping[str, object]]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        hint = "pip install 'mergekit-vl[parquet]'"
        raise UserError("Parquet is read by pyarrow, which is not installed", where=str(file), hint=hint) from None
    try:
        table = parquet.ParquetFile(file)
        plain = [
            field.name for field in table.schema_arrow if not str(field.type).startswith(("struct", "list", "binary"))
        ]
        rows: list[Mapping[str, object]] = table.read(plain).to_pylist()
        return plain, rows
    except Exception as error:  # pyarrow raises many kinds
        raise UserError(
            f"no Parquet that can be read: {str(error)[:200]}", where=str(file), hint="write it again"
        ) from None
