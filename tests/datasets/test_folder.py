"""Image folders: layouts, splits, class names, and every error's text."""

import os
import random
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mergekit_vl.datasets.base import Dataset, few_shot
from mergekit_vl.datasets.folder import Folder
from mergekit_vl.errors import UserError
from mergekit_vl.options import build

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data"


def fill(folder: Path, n: int, ext: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.new("RGB", (6, 4), tuple(random.Random(f"{folder.name}{i}").randbytes(3))).save(folder / f"{i}.{ext}")


def three(root: Path, *, val: bool = True) -> Path:
    for split, n in (("train", 4), ("val", 2), ("test", 3)):
        if split != "val" or val:
            for name in ("red_kite", "t-shirt"):
                fill(root / split / name, n)
    return root


def single(root: Path, n: int = 10) -> Path:
    for name in ("a", "b", "c"):
        fill(root / name, n)
    return root


def files(data: Dataset, split: str) -> list[str]:
    part = getattr(data, split)
    return [part.source.files[row] for row in part.rows]


def refused(text: str, path: Path, **options: object) -> None:
    """Loading fails with exactly this one line."""
    with pytest.raises(UserError, match=f"^{re.escape(text)}$") as caught:
        build(Folder, {"path": str(path), **options}, where="dataset").load()
    assert "\n" not in str(caught.value)


def test_three_folders(tmp_path):
    data = Folder(str(three(tmp_path / "birds"))).load()
    assert (data.name, data.classes, data.templates) == ("birds", ("red kite", "t-shirt"), ("a photo of a {}.",))
    assert [len(s) for s in (data.train, data.val, data.test)] == [8, 4, 6]
    for split in ("train", "val", "test"):
        labels = getattr(data, split).labels
        assert [file.split("/")[:2] for file in files(data, split)] == [
            [split, ("red_kite", "t-shirt")[i]] for i in labels
        ]
    assert data.train.rows.dtype == data.train.labels.dtype == np.int64
    few_shot(data.train, 2, 1, name=data.name)


def test_val_may_lack_a_class(tmp_path):
    shutil.rmtree(three(tmp_path) / "val" / "t-shirt")
    assert set(Folder(str(tmp_path)).load().val.labels) == {0}


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_names_of_val(tmp_path, name):
    (three(tmp_path) / "val").rename(tmp_path / name)
    assert {file.split("/")[0] for file in files(Folder(str(tmp_path)).load(), "val")} == {name}


def test_val_from_train(tmp_path):
    data = Folder(str(three(tmp_path, val=False)), val_share=0.25).load()
    assert [np.bincount(s.labels).tolist() for s in (data.train, data.val, data.test)] == [[3, 3], [1, 1], [3, 3]]
    assert not set(files(data, "train")) & set(files(data, "val"))
    assert {file.split("/")[0] for file in files(data, "val")} == {"train"}


def test_single_folder(tmp_path):
    single(tmp_path)
    data = Folder(str(tmp_path)).load()
    assert [np.bincount(s.labels).tolist() for s in (data.train, data.val, data.test)] == [[6] * 3, [1] * 3, [3] * 3]
    parts = [files(data, split) for split in ("train", "val", "test")]
    assert sorted(sum(parts, [])) == sorted(data.train.source.files) and len(set(sum(parts, []))) == 30

    again = Folder(str(tmp_path)).load()
    assert [s.key for s in (again.train, again.val, again.test)] == [s.key for s in (data.train, data.val, data.test)]
    assert files(Folder(str(tmp_path), split_seed=1).load(), "test") != files(data, "test")
    fill(tmp_path / "aa", 5)
    assert [f for f in files(Folder(str(tmp_path)).load(), "test") if f[:3] != "aa/"] == files(data, "test")


def test_smallest_classes_reach_every_split(tmp_path):
    data = Folder(str(single(tmp_path, 3)), val_share=0.05, test_share=0.9).load()
    assert [np.bincount(s.labels).tolist() for s in (data.train, data.val, data.test)] == [[1] * 3] * 3


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path / "train", 3)
    fill(tmp_path / "bus", 3)
    assert Folder(str(tmp_path)).load().classes == ("bus", "train")


def test_nested_classes(tmp_path):
    for name in ("Fruit/Apple/Golden-Delicious", "Fruit/Orange", "Juice/Orange", "Juice/Pear_Nectar"):
        fill(tmp_path / name, 3)
    assert Folder(str(tmp_path)).load().classes == (
        "Fruit Apple Golden-Delicious",
        "Fruit Orange",
        "Juice Orange",
        "Juice Pear Nectar",
    )


def test_which_files_are_images(tmp_path):
    fill(tmp_path / "a", 3, "JPG")
    fill(tmp_path / "b", 3, "webp")
    (tmp_path / "LICENSE").write_text("x")
    for name in (".hidden.png", "notes.txt", "paper.pdf"):
        (tmp_path / "a" / name).write_text("x")
    fill(tmp_path / ".cache", 2)
    data = Folder(str(tmp_path)).load()
    assert data.train.source.files == ("a/0.JPG", "a/1.JPG", "a/2.JPG", "b/0.webp", "b/1.webp", "b/2.webp")


def test_link_loop(tmp_path):
    os.symlink(single(tmp_path), tmp_path / "a" / "up")
    assert Folder(str(tmp_path)).load().classes == ("a", "b", "c")


def test_images_come_as_upright_rgb(tmp_path):
    single(tmp_path, 3)
    fill(tmp_path / "modes", 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: 90 degrees
    Image.new("RGB", (6, 4)).save(tmp_path / "modes" / "exif.jpg", exif=exif)
    Image.new("P", (6, 4)).save(tmp_path / "modes" / "palette.png", transparency=b"\x00\x80")
    Image.new("RGBA", (6, 4), (9, 8, 7, 0)).save(tmp_path / "modes" / "rgba.png")
    Image.fromarray(np.full((4, 6), 0x8000, np.uint16)).save(tmp_path / "modes" / "sixteen.png")
    Image.new("L", (6, 4), 5).save(tmp_path / "modes" / "grey.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = Folder(str(tmp_path)).load().train.source
        images = {file: source.load(i) for i, file in enumerate(source.files)}
    assert len(source) == len(images) == 14 and {image.mode for image in images.values()} == {"RGB"}
    assert images["modes/exif.jpg"].size == (4, 6)
    assert images["modes/rgba.png"].getpixel((0, 0)) == (9, 8, 7)
    assert images["modes/sixteen.png"].getpixel((0, 0)) == (128, 128, 128)


def test_key_is_content_not_place(tmp_path):
    one = Folder(str(single(tmp_path / "one"))).load().train.source.key
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert Folder(str(tmp_path / "two")).load().train.source.key == one
    Image.new("RGB", (6, 4), (1, 2, 3)).save(tmp_path / "two" / "a" / "0.png")
    changed = Folder(str(tmp_path / "two")).load().train.source.key
    assert changed != one
    (tmp_path / "two" / "a" / "0.png").rename(tmp_path / "two" / "a" / "other.png")
    assert Folder(str(tmp_path / "two")).load().train.source.key not in (one, changed)


def test_home_and_templates(tmp_path, monkeypatch):
    single(tmp_path / "pets")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build(Folder, {"path": "~/pets", "template": "{}!"}, where="dataset").load().templates == ("{}!",)
    assert build(Folder, {"path": "~/pets", "templates": ["{}", "my {}"]}, where="dataset").load().templates == (
        "{}",
        "my {}",
    )
    refused(
        "dataset.template: no {} in 'a photo' (put {} or {c} where the class name goes)",
        tmp_path / "pets",
        template="a photo",
    )


def test_classes_file(tmp_path):
    single(tmp_path / "d")
    names = tmp_path / "names.txt"

    def classes(text: str) -> tuple[str, ...]:
        names.write_text(text)
        return Folder(str(tmp_path / "d"), classes_file=str(names)).load().classes

    assert classes("cat\nguinea_pig\n\ndog\n") == ("cat", "guinea_pig", "dog")
    assert classes("c\tdog\na\tcat\nb\tpig\n") == ("cat", "pig", "dog")


@pytest.mark.parametrize(
    "text, message",
    [
        ("x\ny\n", "2 names for 3 class folders (one per folder, in sorted order)"),
        ("a\tx\nbb\ty\nc\tz\n", "unknown class folder 'bb' (did you mean 'b'?)"),
        ("a\tx\nb\ty\n", "1 class folder without a name: c (add a line for it)"),
        ("a\tx\na\ty\nb\tz\n", "class folder 'a' twice (remove one of the lines)"),
        ("a\tx\nb y\nc\tz\n", "no tab in 'b y' (either every line is 'folder<TAB>name' or none is)"),
        ("x\ny\nx\n", "1 class name used more than once: x (give each class a name of its own)"),
        (b"\xff\n", "not UTF-8 (save it as UTF-8)"),
        (None, "cannot be read: No such file or directory (check the path)"),
    ],
)
def test_classes_file_errors(tmp_path, text, message):
    names = tmp_path / "names.txt"
    if text is not None:
        names.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(f"{names}: {message}", single(tmp_path / "d"), classes_file=str(names))


def test_names_that_cannot_be_told_apart(tmp_path):
    fill(tmp_path / "a_b", 3)
    fill(tmp_path / "a b", 3)
    hint = "rename a folder, or name the classes in dataset.classes_file"
    refused(f"{tmp_path}: 1 class name used more than once: a b ({hint})", tmp_path)


def test_folder_errors(tmp_path):
    refused(f"{tmp_path / 'no'}: no such folder (check dataset.path)", tmp_path / "no")
    (tmp_path / "file").write_text("x")
    refused(f"{tmp_path / 'file'}: not a folder (check dataset.path)", tmp_path / "file")
    empty = tmp_path / "empty"
    fill(empty, 0)
    refused(f"{empty}: no class folder holds an image (put the images into one folder per class)", empty)
    fill(empty, 2)
    refused(f"{empty}: no class folder holds an image (put the images into one folder per class)", empty)
    fill(empty / "only", 5)
    refused(f"{empty}: only one class, 'only' (at least two class folders are needed)", empty)


def test_empty_class_folders(tmp_path):
    fill(single(tmp_path / "one") / "d", 0)
    refused(f"{tmp_path / 'one'}: 1 class folder without images: d (fill or remove it)", tmp_path / "one")
    for name in "efg":
        fill(tmp_path / "one" / name, 0)
    refused(f"{tmp_path / 'one'}: 4 class folders without images: d, e, f, ... (fill or remove it)", tmp_path / "one")
    fill(three(tmp_path / "three") / "test" / "x", 0)
    refused(f"{tmp_path / 'three'}: 1 class folder without images: test/x (fill or remove it)", tmp_path / "three")


@pytest.mark.parametrize(
    "folder, message",
    [
        ("train/x", "1 class in train but not in test: x (add it to test)"),
        ("test/x", "1 class in test but not in train: x (add it to train)"),
        ("val/x", "1 class in val but not in train: x (add it to train)"),
    ],
)
def test_classes_in_one_split_only(tmp_path, folder, message):
    fill(three(tmp_path) / folder, 3)
    refused(f"{tmp_path}: {message}", tmp_path)


def test_half_of_the_split_folders(tmp_path):
    shutil.rmtree(three(tmp_path, val=False) / "test")
    refused(
        f"{tmp_path}: a train folder but no test folder (add test or val, or set dataset.path={tmp_path}/train to split that one)",
        tmp_path,
    )


def test_empty_val(tmp_path):
    fill(three(tmp_path, val=False) / "val", 0)
    refused(f"{tmp_path}: the val folder holds no images (fill it, or remove it to take a share of train)", tmp_path)


def test_shares(tmp_path):
    single(tmp_path)
    refused("dataset.val_share: val_share=0.0 (between 0 and 1, both excluded)", tmp_path, val_share=0)
    refused("dataset.test_share: test_share=1.5 (between 0 and 1, both excluded)", tmp_path, test_share=1.5)
    text = "dataset.val_share: val_share=0.5 and test_share=0.5 leave nothing to train on (their sum must be below 1)"
    refused(text, tmp_path, val_share=0.5, test_share=0.5)


def test_too_few_images(tmp_path):
    fill(single(tmp_path / "one") / "d", 2)
    text = "1 class with too few images to split in three: d (2) (at least 3 images per class)"
    refused(f"{tmp_path / 'one'}: {text}", tmp_path / "one")
    three(tmp_path / "two", val=False)
    for split in ("train", "test"):
        fill(tmp_path / "two" / split / "x", 1)
    text = "1 class with too few images to split in train and val: x (1) (at least 2 images per class)"
    refused(f"{tmp_path / 'two'}: {text}", tmp_path / "two")


def damage(root: Path) -> list[str]:
    """Truncated JPEG and PNG, bytes that are no image, an empty file."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.jpg", "cut.png"):
        noise.save(root / "b" / name)
        data = (root / "b" / name).read_bytes()
        (root / "b" / name).write_bytes(data[: len(data) // 2])
    (root / "b" / "text.gif").write_text("no image")
    (root / "b" / "void.jpg").write_bytes(b"")
    return ["b/cut.jpg", "b/cut.png", "b/text.gif", "b/void.jpg"]


def test_corrupt(tmp_path):
    bad = damage(single(tmp_path))
    hint = "remove it, or set dataset.skip_corrupt=true"
    refused(f"{tmp_path}: 4 images cannot be decoded: b/cut.jpg, b/cut.png, b/text.gif, ... ({hint})", tmp_path)
    text = f"{tmp_path}: skipped 4 images that cannot be decoded: {', '.join(bad)}"
    with pytest.warns(UserWarning, match=f"^{re.escape(text)}$"):
        data = Folder(str(tmp_path), skip_corrupt=True).load()
    assert len(data.train.source) == 30 and not set(bad) & set(data.train.source.files)
    for name in bad:
        (tmp_path / name).unlink()
    assert Folder(str(tmp_path)).load().train.key == data.train.key


def test_a_class_inside_another_is_warned_of(tmp_path):
    single(tmp_path)
    (tmp_path / "a" / "nested").mkdir()
    for image in list((tmp_path / "a").glob("*.*"))[:3]:
        (tmp_path / "a" / "nested" / image.name).write_bytes(image.read_bytes())
    with pytest.warns(UserWarning, match="1 class inside another class's folder: a/nested; move the images up if"):
        data = Folder(str(tmp_path)).load()
    assert "a nested" in data.classes


def test_one_corrupt(tmp_path):
    (three(tmp_path) / "test" / "red_kite" / "bad.png").write_bytes(b"")
    hint = "remove it, or set dataset.skip_corrupt=true"
    refused(f"{tmp_path}: 1 image cannot be decoded: test/red_kite/bad.png ({hint})", tmp_path)


def test_class_of_corrupt_images_only(tmp_path):
    fill(single(tmp_path) / "d", 0)
    (tmp_path / "d" / "x.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped 1 image that"):
        refused(f"{tmp_path}: 1 class folder without images: d (fill or remove it)", tmp_path, skip_corrupt=True)


def test_file_gone_after_loading(tmp_path):
    source = Folder(str(single(tmp_path))).load().train.source
    (tmp_path / "a" / "0.png").unlink()
    with pytest.raises(UserError, match=r"a/0.png: cannot be read: No such file or directory \(check the path\)$"):
        source.load(0)


@pytest.mark.parametrize("name, classes", [("grocery", 81), ("clothing", 10)])
def test_photographs(name, classes):
    root = PHOTOGRAPHS / name
    if not root.is_dir():
        pytest.skip(f"no photographs at {root}")
    data = Folder(str(root)).load()
    assert (data.name, len(data.classes)) == (name, classes)
    for split in ("train", "val", "test"):
        count = sum(1 for _ in (root / split).rglob("*.jpg"))
        assert len(getattr(data, split)) == count > 0
    assert set(data.train.labels) == set(data.test.labels) == set(range(classes))
    assert data.train.source.load(0).mode == "RGB"
