"""The photographs that ship with the package."""

import zipfile
from importlib.resources import files

import numpy as np

from mergekit_vl.datasets.clothing import Clothing


def test_forty_pictures_of_each_of_ten_kinds():
    data = Clothing().load()
    assert data.classes[:4] == ("dress", "hat", "long sleeve", "outerwear") and len(data.classes) == 10
    for split, count in ((data.train, 20), (data.val, 8), (data.test, 12)):
        assert np.bincount(split.labels).tolist() == [count] * 10
        image = split.source.load(int(split.rows[0]))
        assert image.mode == "RGB" and max(image.size) <= 160 and not image.getexif()
        row = int(split.rows[-1])
        assert split.source.files[row].split("/")[1] == "t-shirt" and split.labels[-1] == 9
    rows = [set(split.rows.tolist()) for split in (data.train, data.val, data.test)]
    assert sum(map(len, rows)) == len(set.union(*rows)) == len(data.train.source) == 400
    assert Clothing().load().train.key == data.train.key != data.test.key


def test_the_licence_comes_with_them():
    file = files("mergekit_vl") / "assets" / "clothing.zip"
    with file.open("rb") as content, zipfile.ZipFile(content) as archive:
        assert b"CC0 1.0 Universal" in archive.read("LICENSE")
    assert len(file.read_bytes()) < 2_000_000
