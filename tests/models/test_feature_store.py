"""The feature store on disk: what is damaged, swapped or half there is computed again, and nothing else."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from mergekit_vl.backbones.backbone import Backbone
from mergekit_vl.datasets.base import Augment, Split
from mergekit_vl.models import features
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.models.model import ImageEncoder
from mergekit_vl.models.shards import Shards

PREPROCESS = {"image_size": 2, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


@dataclass
class Grey:
    """Image i is i / 255 everywhere; loading `broken` raises."""

    key: str = "greys"
    broken: int = -1

    def __len__(self):
        return 100

    def load(self, index):
        if index == self.broken:
            raise KeyboardInterrupt
        return Image.new("RGB", (2, 2), (index, index, index))


@pytest.fixture
def path(monkeypatch):
    """Features [N, 12] whose row i is i / 255, in blocks of 4 and shards of 8."""
    monkeypatch.setattr(features, "ROWS", 10)
    return ImageEncoder(Backbone(torch.nn.Flatten(), None, PREPROCESS, "flat", block=4))


def split(n=20, broken=-1):
    return Split(Grey(broken=broken), np.arange(n), np.zeros(n, dtype=np.int64))


def expected(n=20):
    return (torch.arange(n) / 255).unsqueeze(1).expand(n, 12)


def files(tmp_path):
    return sorted(tmp_path.glob("*/*"))


def test_shards_hold_key_place_shape_and_dtype(path, tmp_path):
    assert torch.equal(FeatureStore(tmp_path).features(path, split()), expected())
    heads = [json.loads(file.read_bytes().split(b"\n")[1]) for file in files(tmp_path)]
    assert [(h["start"], h["rows"], h["of"], h["width"], h["dtype"]) for h in heads] == [
        (0, 8, 20, 12, "float32"), (8, 8, 20, 12, "float32"), (16, 4, 20, 12, "float32"),
    ]  # fmt: skip
    assert all(json.loads(h["key"])[:2] == [path.key, split().key] for h in heads)


def damaged(how, tmp_path):
    first, second, _ = (file.read_bytes() for file in files(tmp_path))
    data = bytearray(second)
    if how == "zeroed":
        data[-96:] = bytes(96)
    elif how == "sign":
        data[-1] ^= 0x80
    elif how == "header":
        data[120] ^= 1
    elif how == "cut":
        data = data[:-48]
    elif how == "longer":
        data += bytes(48)
    elif how == "swapped":
        data = first
    elif how == "empty":
        data = b""
    files(tmp_path)[1].write_bytes(data)


@pytest.mark.parametrize("how", ["zeroed", "sign", "header", "cut", "longer", "swapped", "empty"])
def test_a_damaged_shard_is_computed_again_and_no_other(how, path, tmp_path):
    FeatureStore(tmp_path).features(path, split())
    whole = [file.read_bytes() for file in files(tmp_path)]
    damaged(how, tmp_path)
    store = FeatureStore(tmp_path)
    assert torch.equal(store.features(path, split()), expected()) and store.encoded == 8
    assert [file.read_bytes() for file in files(tmp_path)] == whole


def test_files_of_two_splits_that_changed_places_are_not_read(path, tmp_path):
    one, other = split(), replace(split(), rows=np.arange(20) + 30)
    store = FeatureStore(tmp_path)
    store.features(path, one)
    before = files(tmp_path)
    store.features(path, other)
    for mine, theirs in zip(before, [file for file in files(tmp_path) if file not in before]):
        data = mine.read_bytes()
        mine.write_bytes(theirs.read_bytes())
        theirs.write_bytes(data)
    store = FeatureStore(tmp_path)
    assert torch.equal(store.features(path, one), expected()) and store.encoded == 20
    assert torch.equal(store.features(path, other), expected() + 30 / 255) and store.encoded == 40


def test_what_is_interrupted_goes_on_at_the_last_whole_shard(path, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        FeatureStore(tmp_path).features(path, split(broken=18))
    assert len(files(tmp_path)) == 2
    store = FeatureStore(tmp_path)
    assert torch.equal(store.features(path, split()), expected()) and store.encoded == 4


def test_views_are_kept_epoch_by_epoch(path, tmp_path):
    drawn = dict(epochs=3, seed=1, augment=Augment())
    few = split(3)
    with pytest.raises(KeyboardInterrupt):
        FeatureStore(tmp_path).views(path, replace(few, source=Grey(broken=2)), **drawn)
    assert not files(tmp_path)  # image 2 is in every epoch
    store = FeatureStore(tmp_path)
    views = store.views(path, few, **drawn)
    assert torch.allclose(views, expected(3).expand(3, 3, 12)) and store.encoded == 9 and len(files(tmp_path)) == 3
    files(tmp_path)[1].unlink()
    store = FeatureStore(tmp_path)
    assert torch.equal(store.views(path, few, **drawn), views) and store.encoded == 3
    assert torch.equal(FeatureStore(None).views(path, few, **drawn), views)


def test_writing_holds_one_shard(tmp_path):
    """20,000 rows of 4 kB are 80 MB; the store's own share of a stream is a shard of them."""
    import tracemalloc

    shards = Shards(tmp_path, "key", 20_000, 1_000)
    tracemalloc.start()
    for start in shards.starts:
        shards.write(start, np.full((1_000, 1_000), start, dtype=np.float32))
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert shards.read(19_000)[-1, -1] == 19_000
    assert replace(shards, n=19_500).read(19_000) is None and replace(shards, key="other").read(0) is None


def test_the_command_tells_and_clears_files_old_and_new(path, tmp_path, monkeypatch, capsys):
    from mergekit_vl.commands import app

    def call(*words):
        monkeypatch.setattr("sys.argv", ["mergekit-vl", *words])
        with pytest.raises(SystemExit) as end:
            app.main()
        assert not end.value.code
        return capsys.readouterr().out

    monkeypatch.setenv("MERGEKIT_VL_CACHE", str(tmp_path))
    FeatureStore(tmp_path).features(path, split())
    old, cut = tmp_path / "ab" / f"{'ab' * 16}.safetensors", tmp_path / "ab" / ".x.features.partial"
    old.parent.mkdir(exist_ok=True)
    old.write_bytes(b"of 0.1.0")
    cut.write_bytes(b"a kill left it")
    told = call("cache")
    assert "files   3, " in told and "old     1 files of an earlier version" in told
    assert call("cache", "--clear").startswith("deleted 4 files") and not list(tmp_path.iterdir())
