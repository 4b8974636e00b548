"""What people bring as data: names in any form, WordNet ids, split folders by any name, formats that are not read, wide pixels, a whole folder."""

import json
import warnings

import numpy as np
import pytest
from PIL import Image

from mergekit_vl.datasets.class_names import for_folders, in_order, read_names
from mergekit_vl.datasets.folder import Folder
from mergekit_vl.datasets.image_files import decode
from mergekit_vl.errors import UserError
from mergekit_vl.experiments.use import load_for


class Told:
    def __init__(self):
        self.told, self.warned = [], []

    def tell(self, text):
        self.told.append(text)

    def warn(self, text):
        self.warned.append(text)

    def progress(self, done, total, what):
        pass


def fill(root, names, n=4, ext="png"):
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.new("RGB", (4, 4), (i, 9, 9)).save(root / name / f"{i}.{ext}")


LISTS = {
    "lines": ("names.txt", "tench\ngoldfish\ngreat white shark\n"),
    "ids": ("names.txt", "n1 tench\nn2 goldfish\nn3 great white shark\n"),
    "ids in another order": ("names.txt", "n3 great white shark\nn1 tench\nn2 goldfish\n"),
    "ids with a comma": ("names.txt", "n1, tench\nn2, goldfish\nn3, great white shark\n"),
    "tabs": ("names.txt", "n1\ttench\nn2\tgoldfish\nn3\tgreat white shark\n"),
    "numbers": ("names.txt", "0 tench\n1 goldfish\n2 great white shark\n"),
    "numbers with a comma": ("names.txt", "0, tench\n1, goldfish\n2, great white shark\n"),
    "numbers from 1": ("names.txt", "1: tench\n2: goldfish\n3: great white shark\n"),
    "numbers in another order": ("names.txt", "2: great white shark\n0: tench\n1: goldfish\n"),
    "JSON list": ("n.json", json.dumps(["tench", "goldfish", "great white shark"])),
    "JSON without its ending": ("names.txt", json.dumps(["tench", "goldfish", "great white shark"])),
    "JSON by number": ("n.json", json.dumps({"0": "tench", "1": "goldfish", "2": "great white shark"})),
    "JSON by folder": ("n.json", json.dumps({"n2": "goldfish", "n1": "tench", "n3": "great white shark"})),
    "class_to_idx": ("n.json", json.dumps({"goldfish": 1, "tench": 0, "great white shark": 2})),
    "imagenet_class_index": ("n.json", json.dumps({"0": ["n1", "tench"], "1": ["n2", "goldfish"], "2": ["n3", "great_white_shark"]})),
    "id2label": ("config.json", json.dumps({"id2label": {"0": "tench", "1": "goldfish", "2": "great white shark"}})),
    "COCO": ("n.json", json.dumps({"categories": [{"id": 0, "name": "tench"}, {"id": 1, "name": "goldfish"}, {"id": 2, "name": "great white shark"}]})),
    "CSV": ("n.csv", "label,name\n0,tench\n1,goldfish\n2,great white shark\n"),
    "CSV by folder": ("n.csv", "folder,class_name\nn2,goldfish\nn1,tench\nn3,great white shark\n"),
    "CSV of one column": ("n.csv", "name\ntench\ngoldfish\ngreat white shark\n"),
    "CSV with a semicolon": ("n.csv", "id;name\nn1;tench\nn2;goldfish\nn3;great white shark\n"),
}  # fmt: skip


@pytest.mark.parametrize("form", LISTS)
def test_lists_of_names_in_the_forms_that_people_have(form, tmp_path):
    file, text = LISTS[form]
    (tmp_path / file).write_text(text)
    folders = ("n1", "n2", "n3")
    found = read_names(tmp_path / file, folders)
    assert for_folders(found, folders, "here") == ("tench", "goldfish", "great white shark")
    if "order" not in form and "by folder" not in form:
        assert in_order(found)[:2] == ("tench", "goldfish")


@pytest.mark.parametrize(
    "text, told",
    [("{}", "no list of class names"), ("[1, 2]", "no list of class names"), ('["a"', "Expecting"), ('{"a": 1.5}', "no list of class names")],
)  # fmt: skip
def test_lists_that_are_none(text, told, tmp_path):
    (tmp_path / "n.json").write_text(text)
    with pytest.raises(UserError, match=told):
        read_names(tmp_path / "n.json")


def test_years_and_numbers_in_names_stay(tmp_path):
    (tmp_path / "n.txt").write_text("2012 Tesla\n2007 Audi\n1 euro\n")
    assert read_names(tmp_path / "n.txt").names == ("2012 Tesla", "2007 Audi", "1 euro")


def test_wordnet_ids_get_imagenets_names(tmp_path):
    fill(tmp_path, ("n01440764", "n01443537", "n02084071", "n99999999"))
    told = Told()
    data = Folder(str(tmp_path)).load(told)
    assert data.classes == ("tench", "goldfish", "dog", "n99999999")
    assert "2 class folders are WordNet ids of ImageNet" in told.told[0]
    assert (
        "2 class folders called by a WordNet id that is not among ImageNet's 1,000: n02084071 as 'dog'"
        in told.warned[0]
    )


def test_imagenets_doubles_are_taken_and_told(tmp_path):
    names = tmp_path / "n.txt"
    names.write_text("\n".join([f"class number {i}." for i in range(199)] + ["class number 5."]))
    fill(tmp_path / "d", [f"{i:03d}" for i in range(200)], 1)
    told = Told()
    assert len(Folder(str(tmp_path / "d"), classes_file=str(names)).whole(told).classes) == 200
    assert "1 class name used more than once: class number 5." in told.warned[0]


def test_nested_folders_keep_their_whole_name(tmp_path):
    fill(tmp_path, ("all/fruit/apple", "all/fruit/orange_peel", "all/juice/apple"))
    assert Folder(str(tmp_path)).load().classes == ("fruit apple", "fruit orange peel", "juice apple")


@pytest.mark.parametrize(
    "splits", [("Train", "Val", "Test"), ("TRAIN", "VALID", "TEST"), ("training", "validation", "testing"), ("train", "dev", "test"), ("Training-Set", "Validation Set", "test_set")]
)  # fmt: skip
def test_split_folders_by_any_name(splits, tmp_path):
    for split, n in zip(splits, (4, 2, 3)):
        fill(tmp_path / split, ("cat", "dog"), n)
    told = Told()
    data = Folder(str(tmp_path)).load(told)
    assert data.classes == ("cat", "dog") and [len(data.train), len(data.val), len(data.test)] == [8, 4, 6]
    assert any(f"{splits[0]} is train" in line for line in told.told) == (splits[0] != "train" or splits[1] != "val")


def test_val_is_the_test_where_there_is_none(tmp_path):
    fill(tmp_path / "train", ("cat", "dog"), 10)
    fill(tmp_path / "val", ("cat", "dog"), 3)
    told = Told()
    data = Folder(str(tmp_path)).load(told)
    assert [len(data.train), len(data.val), len(data.test)] == [18, 2, 6]
    assert "no test folder: val is the test" in told.told[0]


def test_splits_are_never_classes(tmp_path):
    fill(tmp_path / "a", ("Train", "Test"))
    with pytest.raises(UserError, match="Test and Train hold images and no class folders"):
        Folder(str(tmp_path / "a")).load()
    for split in ("val", "valid", "train"):
        fill(tmp_path / "b" / split, ("cat", "dog"))
    with pytest.raises(UserError, match="val and valid are both names of val"):
        Folder(str(tmp_path / "b")).load()
    fill(tmp_path / "c" / "Validation", ("cat", "dog"))
    with pytest.raises(UserError, match="a val folder but no train folder"):
        Folder(str(tmp_path / "c")).load()


def test_eval_of_a_folder_takes_all_of_it(tmp_path):
    fill(tmp_path / "one", ("cat", "dog", "elk"), 1)
    told = Told()
    data, split = load_for(Folder(str(tmp_path / "one")), None, told)
    assert split == "all" and len(data.test) == 3 and "all images are scored" in told.told[0]
    fill(tmp_path / "many", ("cat", "dog"), 10)
    assert len(load_for(Folder(str(tmp_path / "many")), "all", told)[0].test) == 20
    data, split = load_for(Folder(str(tmp_path / "many")), "test", told)
    assert split == "test" and len(data.test) == 6
    assert load_for(Folder(str(tmp_path / "many")), None, told, of_run=True)[1] == "test"
    for part, n in (("train", 4), ("test", 3)):
        fill(tmp_path / "split" / part, ("cat", "dog"), n)
    assert load_for(Folder(str(tmp_path / "split")), None, told)[1] == "test"
    assert len(load_for(Folder(str(tmp_path / "split")), "all", told)[0].test) == 14


def test_formats_that_are_left_out_are_counted(tmp_path):
    fill(tmp_path, ("cat", "dog"))
    for name in ("a.HEIC", "b.heic", "c.svg", "d.CR2", "e.txt"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"left out that cannot be read here: .*1 \.cr2.*2 \.heic .*heic\].*1 \.svg"):
        Folder(str(tmp_path)).load()


def test_heic_with_its_extra(tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(tmp_path / "a.heic")
    assert decode(tmp_path / "a.heic").size == (8, 8)


def wide(tmp_path, values, name="w.tiff"):
    Image.fromarray(values).save(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(decode(tmp_path / name))[0, :, 0].tolist()


def test_wide_pixels_are_scaled_by_their_range(tmp_path):
    assert wide(tmp_path, np.array([[0, 0x8000, 0xFFFF]], np.uint16)) == [0, 128, 255]
    assert wide(tmp_path, np.array([[0, 0x8000, 0xFFFF]], np.uint16), "w.png") == [0, 128, 255]
    assert wide(tmp_path, np.array([[0, 2**30, 2**31 - 1]], np.int32)) == [0, 64, 127]
    assert wide(tmp_path, np.array([[0, 0.5, 1]], np.float32)) == [0, 128, 255]
    assert wide(tmp_path, np.array([[0, 128, 255]], np.float32)) == [0, 128, 255]
    assert wide(tmp_path, np.array([[-1, 0, 1]], np.float32)) == [0, 128, 255]


@pytest.mark.parametrize("text", ["a photo of a {}.\na {c}, drawn.\n", '["a photo of a {}.", "a {c}, drawn."]'])
def test_templates_from_a_file(text, tmp_path):
    fill(tmp_path / "d", ("cat", "dog"))
    (tmp_path / "t.txt").write_text(text)
    data = Folder(str(tmp_path / "d"), templates_file=str(tmp_path / "t.txt")).load()
    assert data.templates == ("a photo of a {}.", "a {c}, drawn.")


def test_templates_that_are_none(tmp_path):
    fill(tmp_path / "d", ("cat", "dog"))
    for text, told in (
        ('{"cat": ["a cat."]}', "sentences for each class are not there"),
        ("[]", "no templates in it"),
        ("a cat\n", "no {} in"),
    ):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(UserError, match=told):
            Folder(str(tmp_path / "d"), templates_file=str(tmp_path / "t.json")).load()
