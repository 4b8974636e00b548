"""Tables of images, and data in forms that are named with the next step."""

import json

import numpy as np
import pytest
from PIL import Image

from mergekit_vl.datasets.folder import Folder
from mergekit_vl.datasets.foreign_data import FORMS, found_in
from mergekit_vl.datasets.table import Table
from mergekit_vl.errors import UserError

ROWS = [(f"{label}{i}", label) for label in ("cat", "dog") for i in range(6)]


@pytest.fixture
def images(tmp_path):
    (tmp_path / "pics").mkdir()
    for i, (name, _) in enumerate(ROWS):
        Image.new("RGB", (4, 4), (i, 9, 9)).save(tmp_path / "pics" / f"{name}.png")
    return tmp_path


TABLES = {
    "CSV": ("t.csv", "path,label\n" + "".join(f"pics/{n}.png,{c}\n" for n, c in ROWS)),
    "metadata.csv": ("metadata.csv", "file_name,category\n" + "".join(f"pics/{n}.png,{c}\n" for n, c in ROWS)),
    "TSV": ("t.tsv", "image\tclass\n" + "".join(f"pics/{n}.png\t{c}\n" for n, c in ROWS)),
    "semicolons": ("t.csv", "filename;label\n" + "".join(f"pics/{n}.png;{c}\n" for n, c in ROWS)),
    "ids": ("t.csv", "id,breed\n" + "".join(f"pics/{n},{c}\n" for n, c in ROWS)),
    "JSON lines": ("t.jsonl", "".join(json.dumps({"file_name": f"pics/{n}.png", "label": c}) + "\n" for n, c in ROWS)),
}


@pytest.mark.parametrize("form", TABLES)
def test_tables_in_the_forms_that_people_have(form, images):
    name, text = TABLES[form]
    (images / name).write_text(text)
    data = Table(str(images / name)).load()
    assert data.classes == ("cat", "dog") and [len(data.train), len(data.val), len(data.test)] == [6, 2, 4]
    assert (
        len(
            Table(str(images / name))
            .whole(type("R", (), {"tell": print, "warn": print, "progress": lambda *a: None}))
            .test
        )
        == 12
    )


def test_a_column_of_splits(images):
    parts = ["Train"] * 3 + ["valid"] + ["test"] * 2
    (images / "t.csv").write_text(
        "path,label,split\n" + "".join(f"pics/{n}.png,{c},{parts[i % 6]}\n" for i, (n, c) in enumerate(ROWS))
    )
    table = Table(str(images / "t.csv"))
    data = table.load()
    assert table.divided and [np.bincount(s.labels).tolist() for s in (data.train, data.val, data.test)] == [
        [3, 3],
        [1, 1],
        [2, 2],
    ]


def test_numbers_as_labels_get_names(images):
    (images / "t.csv").write_text("path,label\n" + "".join(f"pics/{n}.png,{int(c == 'dog')}\n" for n, c in ROWS))
    (images / "n.json").write_text(json.dumps(["cat", "dog"]))
    assert Table(str(images / "t.csv"), classes_file=str(images / "n.json")).load().classes == ("cat", "dog")


@pytest.mark.parametrize(
    "text, told",
    [
        ("a,b\n1,2\n", "no column of paths .name it: dataset.image_column="),
        ("path,b\n1,2\n", "no column of labels"),
        ("path,label\n../x.png,cat\n", "leaves"),
        ("path,label\n/etc/passwd,cat\n", "leaves"),
        ("path,label\ngone.png,cat\n", "line 2: no image gone.png"),
        ("path,label\npics/cat0.png,\n", "line 2 has no label"),
        ("path,label\npics/cat0.png,cat|dog\n", "several labels, 'cat|dog'"),
        ("path,label\npics/cat0.png\n", "another number of columns"),
        ("path,label,split\npics/cat0.png,cat,other\n", "'other' is no split"),
    ],
)  # fmt: skip
def test_tables_that_are_none(text, told, images):
    (images / "t.csv").write_text(text)
    with pytest.raises(UserError) as error:
        Table(str(images / "t.csv")).load()
    assert told.replace(" .", " (") in str(error.value)


def test_parquet_names_its_extra(images):
    (images / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="mergekit-vl.parquet|no Parquet that can be read"):
        Table(str(images / "t.parquet")).load()


def test_parquet_with_its_extra(images):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    columns = {"path": [f"pics/{n}.png" for n, _ in ROWS], "label": [c for _, c in ROWS]}
    parquet.write_table(pyarrow.table(columns), images / "t.parquet")
    assert Table(str(images / "t.parquet")).load().classes == ("cat", "dog")


FILES = {
    "test/0.tar": "WebDataset",
    "train/00000.tar": "WebDataset",
    "metadata.csv": "a table of images",
    "data/train-00000-of-00001.parquet": "Parquet",
    "state.json": "save_to_disk",
    "dataset_dict.json": "save_to_disk",
    "cifar-10-batches-py/data_batch_1": "CIFAR",
    "train-images-idx3-ubyte": "MNIST",
    "train.tfrecord": "TFRecords",
    "db/data.mdb": "LMDB",
    "train_32x32.mat": "MATLAB",
    "images.zip": "an archive",
    "annotations/instances_train2017.json": "several labels an image",
}


@pytest.mark.parametrize("file", FILES)
def test_other_forms_are_named_with_the_next_step(file, tmp_path):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(bytes(512))
    assert found_in(tmp_path)[0] in FORMS
    with pytest.raises(UserError, match=f"it holds .*{FILES[file]}.*and no folders of images") as error:
        Folder(str(tmp_path)).load()
    assert error.value.hint and "{" + "}" not in error.value.hint


def test_a_folder_that_is_not_there_is_told_by_check(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Folder(str(tmp_path / "gone")).check_there()
