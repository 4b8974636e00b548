"""Data sets in forms that are not folders of classes: recognised by their files, with the exact step that makes them readable."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergekit_vl.datasets.class_folders import entries_of

READ = (
    ("one folder of class folders", "folders that hold images", "of `eval`, that all images are scored"),
    ("folders of splits", "Train, training, train_set; val, valid, validation, dev; test, testing, in any case", "which is which, where names are not train, val, test"),
    ("train and val without test", "no folder of the names of test", "that val is the test"),
    ("class folders called by WordNet ids", "n01440764", "that they get ImageNet's names; ids beyond its 1,000"),
    ("nested class folders", "folders in folders", "a class inside another class's folder"),
    ("a table of paths and labels (data set `table`)", ".csv, .tsv, .jsonl, .parquet with columns path or file_name, label or class, perhaps split", "columns that are not there, several labels an image"),
    ("a tree prepared for CoOp (data set `coop_layout`)", "split_zhou_*.json, or the lists of FGVCAircraft and ImageNet", "images that are missing"),
    ("templates in a file (`templates_file`)", "one a line, or a JSON list", "sentences for each class, which are not there"),
    ("HEIC", ".heic, .heif, with pip install 'mergekit-vl[heic]'", "how many are left out without it"),
    ("images of 16 and 32 bits, and of floats", "their modes", ""),
)  # fmt: skip
"""What is read, how it is recognised, what is told."""
MOST_FOLDERS = 50
"""Folders below the root that are looked at."""


@dataclass(frozen=True)
class Form:
    """A form of data by what it is called, how it is recognised, and what to write; `{}` stands for the file or folder."""

    what: str
    sign: str
    step: str
    is_one: Callable[[str], bool]
    """Of a file's name in lower case."""
    of_folder: bool = False
    """Whether `{}` is the folder that holds the file."""


def _matches(pattern: str) -> Callable[[str], bool]:
    return lambda name: re.search(pattern, name) is not None


IMAGES = "python -c \"import sys, pathlib, datasets as d; s = d.load_from_disk('{}') if pathlib.Path('{}/state.json').exists() or pathlib.Path('{}/dataset_dict.json').exists() else d.load_dataset('parquet', data_files='{}'); s = s if isinstance(s, dict) else {{'train': s}}; [(p := pathlib.Path('images', k, r.features['label'].int2str(x['label']))).mkdir(parents=True, exist_ok=True) or x['image'].convert('RGB').save(p / f'{{i}}.png') for k, r in s.items() for i, x in enumerate(r)]\", then path=images"
FORMS = (
    Form("a table of images", "a .csv, .tsv or .jsonl file with columns of paths and labels (metadata.csv)", "--dataset table path={}", _matches(r"\.(csv|tsv|jsonl)$")),
    Form("shards of WebDataset", "files .tar", "unpack them into class folders: python -c \"import tarfile, pathlib; [(lambda t, n: [(p := pathlib.Path('images', n[int(t.extractfile(m.name.rsplit('.', 1)[0] + '.cls').read())].strip())).mkdir(parents=True, exist_ok=True) or (p / pathlib.Path(m.name).name).write_bytes(t.extractfile(m).read()) for m in t if m.name.endswith(('.jpg', '.png', '.webp'))])(tarfile.open(f), open('classnames.txt').readlines()) for f in pathlib.Path('{}').rglob('*.tar')]\", then path=images", _matches(r"\.tar$"), of_folder=True),
    Form("a data set that Hugging Face's save_to_disk wrote", "dataset_info.json, state.json or .arrow files", IMAGES, _matches(r"^(dataset_dict|state)\.json$|\.arrow$"), of_folder=True),
    Form("Parquet files", "files .parquet", f"--dataset table path={{}} where it has a column of paths; of pictures in it: {IMAGES}", _matches(r"\.parquet$")),
    Form("CIFAR's batches", "data_batch_1, or train and meta", "python -c \"import torchvision as t, pathlib; d = t.datasets.CIFAR10('.'); [(p := pathlib.Path('images', d.classes[y])).mkdir(parents=True, exist_ok=True) or x.save(p / f'{{i}}.png') for i, (x, y) in enumerate(d)]\" in the folder above {} (CIFAR100 likewise), then path=images", _matches(r"^(data_batch_\d|test_batch|batches\.meta)$"), of_folder=True),
    Form("MNIST's files", "the ending -ubyte", "python -c \"import torchvision as t, pathlib; d = t.datasets.MNIST('.'); [(p := pathlib.Path('images', str(y))).mkdir(parents=True, exist_ok=True) or x.save(p / f'{{i}}.png') for i, (x, y) in enumerate(d)]\" in the folder above {}, then path=images", _matches(r"-u(byte)(\.gz)?$|-idx\d-ubyte"), of_folder=True),
    Form("TFRecords", "the ending .tfrecord", "write their pictures into a folder for each class, path/CLASS/IMAGE", _matches(r"\.tfrecords?(-\d+-of-\d+)?$")),
    Form("an LMDB", "data.mdb", "write its pictures into a folder for each class, path/CLASS/IMAGE", _matches(r"^data\.mdb$"), of_folder=True),
    Form("arrays of MATLAB or numpy", "the endings .mat, .npz, .npy", "write their pictures into a folder for each class, path/CLASS/IMAGE", _matches(r"\.(mat|npz|npy)$")),
    Form("an archive", "the endings .zip, .tar.gz, .tgz, .7z, .rar", "unpack it, and give the folder in it", _matches(r"\.(zip|tgz|tar\.gz|tar\.bz2|7z|rar)$")),
    Form("annotations of COCO, with several labels an image", "a .json file named instances_ or annotations", "several labels an image are not there: crop each object into a folder for its class, path/CLASS/IMAGE", _matches(r"^(instances|annotations?|captions|_annotations)[\w.-]*\.json$")),
    Form("annotations of YOLO or VOC, with several labels an image", "data.yaml, or .xml files", "several labels an image are not there: crop each object into a folder for its class, path/CLASS/IMAGE", _matches(r"^(data|dataset)\.ya?ml$|\.xml$")),
)  # fmt: skip


def found_in(root: Path) -> tuple[Form, Path] | None:
    """The first form whose files are in a folder or below, and the file or folder that its step names."""
    waiting, files = [root], list[Path]()
    for _ in range(MOST_FOLDERS):
        if not waiting:
            break
        here = waiting.pop(0)
        for name, is_folder in entries_of(here):
            (waiting if is_folder else files).append(here / name)
    for form in FORMS:
        if file := next((file for file in files if form.is_one(file.name.lower())), None):
            return form, file.parent if form.of_folder else file
    return None


def told(form: Form, place: Path) -> str:
    """The next step, for this file or folder."""
    return form.step.format(*[place] * 8)
