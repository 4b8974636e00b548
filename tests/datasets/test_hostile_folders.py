"""Folders of images from strangers: what is no regular file, links that multiply, pixels without end, names that are no text."""

import json
import os
import socket
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from mergekit_vl.checkpoints.reader import open_checkpoint
from mergekit_vl.datasets.coop_layout import CoOpLayout
from mergekit_vl.datasets.folder import Folder
from mergekit_vl.datasets.image_files import decode
from mergekit_vl.errors import UserError


def single(root: Path) -> Path:
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (6, 4), (i, 0, 0)).save(root / name / f"{i}.png")
    return root


def refused(dataset) -> str:
    with pytest.raises(UserError) as caught:
        dataset.load()
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    return str(caught.value)


def png(width: int, height: int) -> bytes:
    """Black pixels, one bit each: a thousandth of what they take in memory."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compressobj()
    data = b"".join(rows.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def fifo(file: Path) -> None:
    os.mkfifo(file)


def unix_socket(file: Path) -> None:
    here = os.getcwd()
    os.chdir(file.parent)  # its address is 108 bytes long at most
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(file.name)
    os.chdir(here)


def link(to: str):
    return lambda file: file.symlink_to(to)


@pytest.mark.parametrize(
    "make, what",
    [
        (fifo, "is a FIFO"),
        (unix_socket, "is a socket"),
        (link("/dev/zero"), "is a device"),
        (link("/proc/self/mem"), "cannot be decoded"),
        (link("nowhere.png"), "cannot be read: No such file or directory"),
        (link("x.png"), "cannot be read: Too many levels of symbolic links"),
    ],
)
def test_only_regular_files_are_read(tmp_path, make, what):
    make(single(tmp_path) / "a" / "x.png")
    assert what in refused(Folder(str(tmp_path)))
    with pytest.warns(UserWarning, match="skipped 1 image that cannot be decoded: a/x.png"):
        assert len(Folder(str(tmp_path), skip_corrupt=True).load().train.source) == 8


@pytest.mark.parametrize("make", [fifo, unix_socket, link("/dev/zero"), link("/proc/self/mem")])
def test_class_names_and_checkpoints_are_regular_files(tmp_path, make):
    file = tmp_path / "model.pt"
    make(file)
    refused(Folder(str(single(tmp_path / "images")), classes_file=str(file)))
    for given in (file, tmp_path):  # and the only one of a folder
        with pytest.raises(
            UserError, match="is a FIFO|is a socket|is a device|damaged|empty|which weights|cannot be read"
        ):
            open_checkpoint(str(given))


def test_pixels_are_counted_before_they_are_decoded(tmp_path):
    bomb = single(tmp_path) / "a" / "x.png"
    bomb.write_bytes(png(20_000, 20_000))  # 49 kB, 400 MB as numbers
    message = "a/x.png: it has more than 64 million pixels (leave it out, or raise max_megapixels if you trust it)"
    assert refused(Folder(str(tmp_path))).endswith(message)
    bomb.write_bytes(png(30, 10))
    assert "more than 0.000299 million" in refused(Folder(str(tmp_path), max_megapixels=0.000299))
    assert len(Folder(str(tmp_path), max_megapixels=0.0003).load().train.source) == 9
    assert "max_megapixels=nan" in refused(Folder(str(tmp_path), max_megapixels=float("nan")))


def test_pixels_of_an_image_in_an_image_are_counted(tmp_path):
    inner = png(9000, 9000)
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 1, len(inner), 22) + inner
    with pytest.raises(UserError, match="more than 64 million pixels"):
        decode(icon)


def test_no_program_is_started_for_an_image():
    with pytest.raises(Exception, match="cannot identify image file"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


def test_a_folder_is_visited_once(tmp_path):
    at = single(tmp_path)
    for _ in range(40):  # 2^40 ways to the last one
        (at / "next").mkdir()
        for name in ("left", "right"):
            (at / name).symlink_to("next")
        at = at / "next"
    for i in range(4):
        Image.new("RGB", (6, 4)).save(at / f"{i}.png")
    (at / "up").symlink_to(tmp_path.parent)  # brings nothing, so nothing is said
    with pytest.warns(UserWarning, match="80 folders left out that links show again: left, next/left, "):
        data = Folder(str(tmp_path)).load()
    assert len(data.train.source) == 12 and f"{'next/' * 40}0.png" in data.train.source.files
    assert data.classes == ("a", "b", " ".join(["next"] * 40))


def test_folders_without_end(tmp_path):
    single(tmp_path)
    here = os.getcwd()
    os.chdir(tmp_path / "a")
    for _ in range(25):  # deeper than a path can tell
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    os.chdir(here)
    assert "cannot be listed: File name too long" in refused(Folder(str(tmp_path)))


@pytest.mark.parametrize("name", [b"caf\xe9", b"caf\xe9.png"])
def test_names_that_are_not_utf8(tmp_path, name):
    at = os.fsencode(single(tmp_path) / "a") + b"/" + name
    if name.endswith(b".png"):
        os.rename(tmp_path / "a" / "0.png", at)
    else:
        os.rename(tmp_path / "b", at)
    assert r"caf\xe9" in (told := refused(Folder(str(tmp_path)))) and "not UTF-8 (rename it)" in told


def test_a_root_that_is_not_utf8(tmp_path):
    root = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    single(Path(root))
    assert "not UTF-8 (rename it)" in refused(Folder(root))


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "~nobody-of-this-name/x", "a/" * 3000, "\ud800"])
def test_paths_that_no_file_can_have(path):
    refused(Folder(path))
    refused(CoOpLayout(path, "oxford_pets"))
    with pytest.raises(UserError):
        open_checkpoint(path)


GOOD = [["a.jpg", 0, "cat"], ["b.jpg", 1, "dog"]]


@pytest.fixture
def split(tmp_path):
    """Writes what it is given as the training split, or as the whole file where it is text."""
    folder = tmp_path / "tree" / "pets"
    folder.mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "../out.jpg"):
        Image.new("RGB", (6, 4)).save(folder / name)

    def write(train) -> CoOpLayout:
        text = train if isinstance(train, str) else json.dumps({"train": GOOD + train, "val": GOOD, "test": GOOD})
        (folder / "split_zhou_pets.json").write_text(text)
        return CoOpLayout(str(tmp_path / "tree"), "pets")

    return write


@pytest.mark.parametrize("label", [-1, 2**70, 7, 1.0, float("inf"), float("nan"), None, True, "1", [1], {}])
def test_labels_of_a_split_are_counted_from_0(split, label):
    assert "pets.json: train.2: " in (told := refused(split([["a.jpg", label, "cat"]])))
    assert "is no label (a whole number from 0, below the 7 entries)" in told


@pytest.mark.parametrize(
    "path, what",
    [
        ("../out.jpg", "leaves the folder"),
        ("x/../../out.jpg", "leaves the folder"),
        ("/etc/passwd", "leaves the folder"),
        ("", "leaves the folder"),
        ("a\0.jpg", "NUL"),
        ("a" * 5000, "longer than a path can be"),
        ("b/" * 2500 + "a", "longer than a path can be"),
        ("c" * 300 + "/a", "longer than a path can be"),
        ("\ud800.jpg", "not UTF-8"),
        (None, "is no entry"),
        (["a.jpg"], "is no entry"),
    ],
)
def test_paths_of_a_split_stay_in_its_folder(split, path, what):
    assert what in refused(split([[path, 0, "cat"]]))


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"train": ' * 3000, "{}", "[]", "null", '{"train": [], "val": [], "test": []}', "\ufeff{}"]
    + ['{"train": 1, "val": 1, "test": 1}', '{"train": "abc", "val": "", "test": ""}', "9" * 5000, '{"train": [[]]}']
    + [json.dumps({"train": [["a.jpg", 0, "\udce9"]], "val": [], "test": []}), json.dumps({"train": {"a": 1}})],
)
def test_split_files_that_are_none(split, text):
    refused(split(text))


def test_images_of_a_split_are_regular_files(split, tmp_path):
    os.mkfifo(tmp_path / "tree" / "pets" / "c.jpg")
    assert "c.jpg: is a FIFO" in refused(split([["c.jpg", 0, "cat"]]))
    (tmp_path / "tree" / "pets" / "d.jpg").write_bytes(png(20_000, 20_000))
    source = split([["d.jpg", 0, "cat"]]).load().train.source
    with pytest.raises(UserError, match="more than 64 million pixels"):
        source.load(source.files.index("d.jpg"))
