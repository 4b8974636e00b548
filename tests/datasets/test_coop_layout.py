"""A tree prepared for CoOp is used unchanged: splits, names, templates, and the very images that CoOp would draw."""

import json
import random

import pytest
from PIL import Image

from mergekit_vl.datasets.base import few_shot
from mergekit_vl.datasets.coop_layout import CoOpLayout
from mergekit_vl.errors import UserError
from mergekit_vl.protocols.base_to_novel import BaseToNovel

COUNTS = {"great_pyrenees": 9, "pug": 5, "Egyptian_Mau": 7, "boxer": 3, "havanese": 8}
APPEAR = [3, 0, 4, 1, 2]
"""The order of the labels in the split file, as CoOp's shuffling of a source's own list leaves it."""


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "oxford_pets"
    (folder / "images").mkdir(parents=True)
    names, split = list(COUNTS), {"train": [], "val": [], "test": []}
    for part, of in (("train", 1.0), ("val", 0.6), ("test", 0.4)):
        for label in APPEAR:
            for i in range(round(COUNTS[names[label]] * of)):
                file = f"{names[label]}_{part}_{i}.jpg"
                Image.new("RGB", (8, 6), (label, i, 0)).save(folder / "images" / file)
                split[part].append([file, label, names[label]])
    random.Random(5).shuffle(split["test"])
    (folder / "split_zhou_OxfordPets.json").write_text(json.dumps(split))
    return tmp_path, split


def coops_choice(split, shots, seed):
    """What CoOp's data manager draws: the global generator seeded once, train then val, then the first half of the labels."""

    def generate(items, shots):
        tracker = {}
        for item in items:
            tracker.setdefault(item[1], []).append(item)
        out = []
        for of_label in tracker.values():
            out.extend(random.sample(of_label, shots) if len(of_label) >= shots else of_label)
        return out

    random.seed(seed)
    train = generate(split["train"], shots)
    val = generate(split["val"], min(shots, 4))
    return [[item[0] for item in items if item[1] < 3] for items in (train, val)]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shots", [2, 4])
def test_the_few_shots_are_coops(tree, shots, seed):
    root, split = tree
    dataset = CoOpLayout(str(root), "oxford_pets").load()
    task = BaseToNovel(shots).task(dataset, seed)
    ours = [[part.source.files[row] for row in part.rows] for part in (task.data[0].train, task.data[0].val)]
    assert ours == coops_choice(split, shots, seed)
    assert task.parts["base"] == task.data[0].classes.names and set(task.data[0].train.labels) == {0, 1, 2}


def test_splits_names_templates_and_images(tree):
    root, split = tree
    dataset = CoOpLayout(str(root), "oxford_pets").load()
    assert dataset.classes == ("great pyrenees", "pug", "Egyptian Mau", "boxer", "havanese")
    assert dataset.templates == ("a photo of a {}, a type of pet.",)
    for part in ("train", "val", "test"):
        got = getattr(dataset, part)
        assert [(got.source.files[r], label) for r, label in zip(got.rows, got.labels)] == [
            (file, label) for file, label, _ in split[part]
        ]
    assert dataset.train.source.load(int(dataset.train.rows[0])).size == (8, 6)
    assert CoOpLayout(str(root), "oxford_pets", template="a {}.").load().templates == ("a {}.",)


def test_a_class_with_fewer_images_gives_all_and_draws_nothing(tree):
    dataset = CoOpLayout(str(tree[0]), "oxford_pets").load()
    chosen = few_shot(dataset.train, 6, 1, name="x", at_most=True)
    assert [list(chosen.labels).count(label) for label in range(5)] == [6, 5, 6, 3, 6]


def test_the_key_tells_other_images_apart(tree):
    root, _ = tree
    key = CoOpLayout(str(root), "oxford_pets").load().train.source.key
    Image.new("RGB", (64, 48)).save(root / "oxford_pets" / "images" / "pug_train_0.jpg")
    assert CoOpLayout(str(root), "oxford_pets").load().train.source.key != key


def test_a_data_set_that_coop_does_not_know(tree):
    root, _ = tree
    (root / "oxford_pets").rename(root / "my_pets")
    dataset = CoOpLayout(str(root), "my_pets").load()
    assert dataset.templates == ("a photo of a {}.",) and dataset.train.source.root.name == "images"


def test_aircraft_and_imagenet_have_no_split_file(tmp_path):
    images = tmp_path / "fgvc_aircraft" / "images"
    images.mkdir(parents=True)
    (images.parent / "variants.txt").write_text("707-320\nA330-200\n")
    for i, part in enumerate(("train", "val", "test")):
        (images.parent / f"images_variant_{part}.txt").write_text(f"000{i} A330-200\n010{i} 707-320\n")
        for name in (f"000{i}", f"010{i}"):
            Image.new("RGB", (4, 4)).save(images / f"{name}.jpg")
    planes = CoOpLayout(str(tmp_path), "fgvc_aircraft").load()
    assert planes.classes == ("707-320", "A330-200") and planes.train.labels.tolist() == [1, 0]

    for part in ("train", "val"):
        for name in ("n02", "n01"):
            (tmp_path / "imagenet" / "images" / part / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / "imagenet" / "images" / part / name / "1.JPEG")
    (tmp_path / "imagenet" / "classnames.txt").write_text("n01 tench\nn02 great white shark\n")
    net = CoOpLayout(str(tmp_path), "imagenet").load()
    assert net.classes == ("tench", "great white shark")
    assert net.val.rows.tolist() == net.test.rows.tolist() and net.train.labels.tolist() == [0, 1]


def test_what_is_wrong_is_one_line(tree):
    root, split = tree

    def refused(dataset="oxford_pets", at=root):
        with pytest.raises(UserError) as error:
            CoOpLayout(str(at), dataset).load()
        assert "\n" not in str(error.value)
        return str(error.value)

    assert refused(at=root / "nowhere").endswith("nowhere: no such folder (give CoOp's $DATA folder as dataset.root)")
    assert "no folder dtd: it holds oxford_pets (give the folder above" in refused("dtd")
    assert "no folder oxford_pets: it holds images" in refused(at=root / "oxford_pets")
    assert "unknown data set 'oxford_pet' (did you mean 'oxford_pets'?)" in refused("oxford_pet")
    (root / "oxford_pets" / "images" / "boxer_test_0.jpg").unlink()
    assert "images: 1 of 64 images are missing: boxer_test_0.jpg (prepare" in refused()
    file = root / "oxford_pets" / "split_zhou_OxfordPets.json"
    split["val"][0][2] = "cat"
    file.write_text(json.dumps(split))
    assert "label 3 is 'boxer' and, at boxer_val_0.jpg, 'cat'" in refused()
    file.write_text(file.read_text()[:99])
    assert "split_zhou_OxfordPets.json: not a split file" in refused()
    file.unlink()
    assert "oxford_pets: no split_zhou_*.json (put CoOp's split file there" in refused()
