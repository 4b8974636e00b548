"""Names of classes: lists in the forms that people have, WordNet ids, and folders.

one name a line          tench                       JSON list    ["tench", "goldfish"]
id and name              n01440764 tench             JSON map     {"0": "tench"}, {"n01440764": "tench"}, {"tench": 0}
number and name          0, tench                    JSON pairs   {"0": ["n01440764", "tench"]}, a config with id2label
folder, tab, name        n01440764<TAB>tench         CSV          with a header: label,name
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_vl.errors import UserError, unknown
from mergekit_vl.printable import counted, first_names
from mergekit_vl.system.regular_files import parse_json, read_text

LISTS = (
    ("one name a line", "tench"),
    ("folder, tab, name", "n01440764<TAB>tench"),
    ("id and name", "n01440764 tench"),
    ("number and name", "0, tench"),
    ("CSV with a header", "label,name"),
    ("JSON list", '["tench", "goldfish"]'),
    ("JSON by number, folder or name", '{"0": "tench"}, {"n01440764": "tench"}, {"tench": 0}'),
    ("JSON of ImageNet's index", '{"0": ["n01440764", "tench"]}'),
    ("a config with id2label, label_names or categories", '{"id2label": {"0": "tench"}}'),
)
"""The forms of a list of names, and an example of each."""
WORDNET = re.compile(r"n\d{8}")
NUMBERED = re.compile(r"(\d+)\s*[,;:.)\t ]\s*(\S.*)")
IDENTIFIED = re.compile(r"(n\d{8})\s*[,;:\t ]\s*(\S.*)")
NAME_COLUMNS = (
    "name",
    "class_name",
    "classname",
    "class name",
    "label_name",
    "category",
    "category_name",
    "text",
    "class",
    "label",
)
"""What the column of names is called, best first."""
KEY_COLUMNS = (
    "folder",
    "wnid",
    "synset",
    "id",
    "class_id",
    "label_id",
    "index",
    "class_index",
    "idx",
    "label",
    "class",
)
DOUBLES = 100
"""One name in so many may be there twice: ImageNet's 1,000 have two."""


@dataclass(frozen=True)
class Names:
    """Class names in the order of a file, each with its key where the file has keys."""

    names: tuple[str, ...]
    keys: tuple[str, ...] = ()
    """Folders, WordNet ids or numbers; empty, or one for each name."""
    form: str = "one name a line"


def read_names(file: Path, folders: Sequence[str] = ()) -> Names:
    """The class names of a file in any of the forms above; lines that begin with one of `folders` are folder and name.

    Raises UserError for a file that is none of them.
    """
    where, text = str(file), read_text(file)
    if file.suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{"):
        return _of_json(
            parse_json(text, where=where, hint="write a list of names, or names by number or folder"), where
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError("no class names in it", where=where, hint="write one name a line")
    if found := _of_table(text, lines, file.suffix.lower(), where):
        return found
    if any("\t" in line for line in lines):
        return _tabbed(lines, where)
    first = {folder.split("/")[-1] for folder in folders} | set(folders)
    for form, pattern in (("WordNet id and name", IDENTIFIED), ("number and name", NUMBERED)):
        matches = [pattern.fullmatch(line) for line in lines]
        if all(matches) and len(lines) > 1:
            keys = tuple(m[1] for m in matches if m)
            if pattern is IDENTIFIED or _numbers(keys):
                return Names(tuple(m[2].strip("\"' ") for m in matches if m), keys, form)
    pairs = [re.split(r"[,;:\s]\s*", line, maxsplit=1) for line in lines]
    if first and all(len(pair) == 2 and pair[0] in first and pair[1].strip() for pair in pairs):
        return Names(tuple(pair[1].strip() for pair in pairs), tuple(pair[0] for pair in pairs), "folder and name")
    return Names(tuple(lines))


def read_templates(file: Path) -> tuple[str, ...]:
    """Prompts around class names: one a line, or a JSON list. Raises UserError for sentences per class, which are not there, and for none."""
    where, text = str(file), read_text(file)
    if text.lstrip()[:1] not in ("[", "{"):
        found: object = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        found = parse_json(text, where=where, hint="write a list of templates")
    if isinstance(found, Mapping):
        hint = 'write templates that hold for every class: ["a photo of a {}."]'
        raise UserError("sentences for each class are not there", where=where, hint=hint)
    if not isinstance(found, list) or not found or not all(isinstance(each, str) for each in found):
        raise UserError("no templates in it", where=where, hint="write one a line, with {} where the class name goes")
    return tuple(found)


def _numbers(keys: Sequence[str]) -> bool:
    """Whether keys count from 0 or 1, in any order."""
    found = sorted(int(key) for key in keys if key.isdigit())
    return (
        len(found) == len(keys)
        and bool(found)
        and found[0] in (0, 1)
        and found == list(range(found[0], found[0] + len(found)))
    )


def _of_json(found: object, where: str) -> Names:
    hint = 'write ["cat", "dog"], {"0": "cat"} or {"folder": "cat"}'
    if isinstance(found, Mapping):
        for key in (
            "id2label",
            "label_names",
            "classes",
            "class_names",
            "categories",
            "names",
            "class_to_idx",
            "label2id",
        ):
            if isinstance(found.get(key), list | Mapping) and found[key]:
                return _of_json(found[key], where)
        if found and all(type(value) is int for value in found.values()):
            return Names(tuple(sorted(map(str, found), key=lambda name: int(found[name]))), (), "JSON, number by name")
        pairs = list(found.items())
        if pairs and all(isinstance(v, list) and len(v) == 2 and all(isinstance(t, str) for t in v) for _, v in pairs):
            if _numbers([str(key) for key, _ in pairs]):
                pairs.sort(key=lambda pair: int(pair[0]))
            return Names(
                tuple(v[1].replace("_", " ") for _, v in pairs),
                tuple(v[0] for _, v in pairs),
                "JSON, id and name by number",
            )
        if pairs and all(isinstance(value, str) and value.strip() for _, value in pairs):
            return Names(tuple(value.strip() for _, value in pairs), tuple(map(str, found)), "JSON, name by key")
    if isinstance(found, list) and found:
        if all(isinstance(each, str) and each.strip() for each in found):
            return Names(tuple(each.strip() for each in found), (), "JSON list")
        if all(isinstance(each, Mapping) and isinstance(each.get("name"), str) for each in found):
            keys = tuple(str(each["id"]) for each in found if "id" in each)
            return Names(
                tuple(each["name"] for each in found),
                keys if len(keys) == len(found) else (),
                "JSON list of names with ids",
            )
    raise UserError("JSON, but no list of class names", where=where, hint=hint)


def _of_table(text: str, lines: Sequence[str], suffix: str, where: str) -> Names | None:
    """A CSV or TSV with a header; None where it has none."""
    head = lines[0].lower()
    mark = next((m for m in ("\t", ",", ";") if m in head), "" if suffix == ".csv" else None)
    if mark is None or len(lines) < 2:
        return None
    columns = [column.strip().strip("\"'") for column in (head.split(mark) if mark else [head])]
    name = next((column for column in NAME_COLUMNS if column in columns), None)
    if (
        name is None
        or len(set(columns)) < len(columns)
        or not set(columns) <= {*NAME_COLUMNS, *KEY_COLUMNS, "description", "count", "n", "split"}
    ):
        return None
    key = next((column for column in KEY_COLUMNS if column in columns and column != name), None)
    try:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=mark or ",") if any(map(str.strip, row))][1:]
    except csv.Error as error:
        raise UserError(f"not a CSV of class names: {error}", where=where, hint="write one name a line") from None
    if any(len(row) != len(columns) for row in rows):
        raise UserError(
            f"a CSV whose header has {len(columns)} columns, and not every line",
            where=where, hint="put names that hold a comma between quotes",
        )  # fmt: skip
    at = columns.index(name)
    names = tuple(row[at].strip() for row in rows)
    if "" in names:
        raise UserError(f"an empty {name}", where=where, hint="fill it in, or remove the line")
    keys = () if key is None else tuple(row[columns.index(key)].strip() for row in rows)
    return Names(names, keys, f"CSV, column {name}")


def _tabbed(lines: Sequence[str], where: str) -> Names:
    pairs = [tuple(part.strip() for part in line.partition("\t")) for line in lines]
    for line, (given, _, name) in zip(lines, pairs):
        if not (given and name):
            raise UserError(
                f"no tab in {line!r}", where=where, hint="either every line is 'folder<TAB>name' or none is"
            )
    return Names(tuple(name for _, _, name in pairs), tuple(given for given, _, _ in pairs), "folder, tab, name")


def in_order(found: Names) -> tuple[str, ...]:
    """The names in the order of their numbers, where they are numbered; else in the order of the file."""
    if not found.keys or not _numbers(found.keys):
        return found.names
    return tuple(name for _, name in sorted(zip(map(int, found.keys), found.names)))


def for_folders(found: Names, folders: Sequence[str], where: str) -> tuple[str, ...]:
    """A name for each class folder; raises UserError where one has none."""
    last = Counter(folder.split("/")[-1] for folder in folders)
    known = {f.split("/")[-1]: f for f in folders if last[f.split("/")[-1]] == 1} | {f: f for f in folders}
    by_folder = found.form in ("folder, tab, name", "folder and name")
    if found.keys and not by_folder:
        by_folder = not known.keys().isdisjoint(found.keys) and not (
            _numbers(found.keys) and len(found.keys) == len(folders) and not set(found.keys) <= known.keys()
        )
    if by_folder:
        return _by_folder(found, folders, known, where)
    names = in_order(found)
    ids = [folder.split("/")[-1] for folder in folders]
    if len(names) == 1000 and len(folders) < 1000 and all(WORDNET.fullmatch(i) for i in ids):
        numbers = imagenet_ids()
        if all(i in numbers for i in ids):
            return tuple(names[numbers[i]] for i in ids)
    if len(names) != len(folders):
        raise UserError(
            f"{len(names)} names for {len(folders)} class folders", where=where, hint="one per folder, in sorted order"
        )
    return names


def _by_folder(found: Names, folders: Sequence[str], known: Mapping[str, str], where: str) -> tuple[str, ...]:
    named: dict[str, str] = {}
    more = len(found.keys) > len(folders)  # a list of all ids, and the folders of some
    for given, name in zip(found.keys, found.names):
        if given not in known and more:
            continue
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


def imagenet_ids() -> dict[str, int]:
    """The WordNet ids of ImageNet's 1,000 classes, and their numbers."""
    from timm.data import ImageNetInfo

    return {name: i for i, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def of_wordnet(ids: Sequence[str], tell: Callable[[str], object], warn: Callable[[str], object]) -> tuple[str, ...]:
    """Names for WordNet ids: those of ImageNet's 1,000 classes in prompts (CLIP's list), else WordNet's own word, with a warning."""
    import open_clip
    from timm.data import ImageNetInfo

    numbers, words = imagenet_ids(), ImageNetInfo("imagenet-22k")
    all_words = set(words.label_names())
    names, others = [], []
    for each in ids:
        if each in numbers:
            names.append(open_clip.IMAGENET_CLASSNAMES[numbers[each]])
            continue
        word = words.label_name_to_description(each, detailed=False).split(",")[0] if each in all_words else each
        others.append(f"{each} as {word!r}")
        names.append(word)
    if len(others) < len(ids):
        what = f"{len(ids) - len(others)} class folders are WordNet ids of ImageNet"
        tell(f"{what}: they get its class names, {first_names(names)}")
    if others:
        warn(
            f"{counted(others, 'class folder')} called by a WordNet id that is not among ImageNet's 1,000: {first_names(others)}; "
            "dataset.classes_file gives them names of your own"
        )
    return tuple(names)


def of_folders(folders: Sequence[str]) -> tuple[str, ...]:
    """Folders as names: the whole path, without the folders that all share."""
    parts = [folder.split("/") for folder in folders]
    shared = 0
    while len(parts) > 1 and all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return tuple(" ".join(p[shared:]).replace("_", " ") for p in parts)


def doubles(names: Sequence[str]) -> list[str]:
    """Names that are there more than once, sorted."""
    return sorted(name for name, n in Counter(names).items() if n > 1)


def are_few(twice: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a list may have these doubles, as ImageNet's does."""
    return len(twice) * DOUBLES <= len(names)
