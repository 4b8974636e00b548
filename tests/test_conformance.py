"""Everything that is registered, plugins included, passes the kit that plugins are given; the kit finds what breaks a promise."""

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from mergekit_vl import Array, Dataset, Single, as_model, closed_form, endpoints, option, testing
from mergekit_vl.backbones.clip import Clip
from mergekit_vl.backbones.vision import Vision
from mergekit_vl.datasets.coop_layout import CoOpLayout
from mergekit_vl.datasets.folder import Folder
from mergekit_vl.datasets.table import Table
from mergekit_vl.registry.plugins import KINDS, load_plugins
from mergekit_vl.testing import Violation, world

ENTRIES = [entry for kind in KINDS for entry in load_plugins().entries[kind].values()]
SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"width": 32, "heads": 2, "layers": 1},
}


def folder(root):
    for part in ("train", "val", "test"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(2):
                pixels = np.random.default_rng([len(part), len(name), i, ord(name[0])]).integers(
                    0, 255, (8, 8, 3), "u1"
                )
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return Folder(path=str(root))


def table(root):
    """The same pictures, told by a table."""
    folder(root)
    rows = [f"{file.relative_to(root)},{file.parent.name},{file.parts[-3]}" for file in sorted(root.rglob("*.png"))]
    (root / "metadata.csv").write_text("\n".join(["path,label,split", *rows]))
    return Table(path=str(root / "metadata.csv"))


def coop_layout(root):
    images, split = root / "oxford_pets" / "images", {}
    images.mkdir(parents=True)
    for part in ("train", "val", "test"):
        split[part] = [[f"{name}_{part}.png", label, name] for label, name in enumerate(("boxer", "pug"))]
        for n, (file, _, _) in enumerate(split[part]):
            Image.new("RGB", (8, 8), (n, len(part), 0)).save(images / file)
    (root / "oxford_pets" / "split_zhou_OxfordPets.json").write_text(json.dumps(split))
    return CoOpLayout(str(root), "oxford_pets")


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Of what cannot be made without an option: small architectures and folders."""
    return {
        ("backbones", "clip"): Clip("small"),
        ("backbones", "vision"): Vision("test_resnet", batch=4),
        ("datasets", "folder"): folder(tmp_path_factory.mktemp("folder")),
        ("datasets", "table"): table(tmp_path_factory.mktemp("table")),
        ("datasets", "coop_layout"): coop_layout(tmp_path_factory.mktemp("coop")),
    }


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.kind}-{entry.name}")
def test_what_is_registered_keeps_its_promises(entry, examples, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", SMALL)
    testing.check_registered(entry, examples.get((entry.kind, entry.name)))


# what the kit finds


@closed_form("half", alone={"share": 1.0})
@dataclass(frozen=True)
class Half:
    """A share of the first model."""

    share: float = option(0.5, "of it")

    def merge_chunk(self, chunk, stats) -> Array:
        return chunk.tuned[0] * np.float32(self.share)


@closed_form("forgets")
@dataclass(frozen=True)
class Forgets:
    """Half of the first model, whatever is asked."""

    def merge_chunk(self, chunk, stats) -> Array:
        return chunk.tuned[0] * np.float32(0.5)


@closed_form("hoard")
@dataclass(frozen=True)
class Hoard:
    """The first model, held eighty times."""

    def merge_chunk(self, chunk, stats) -> Array:
        return np.mean([chunk.tuned[0] for _ in range(80)], axis=0, dtype=np.float32)


@closed_form("restless")
@dataclass(frozen=True)
class Restless:
    """The first model, and noise that no seed tells."""

    def merge_chunk(self, chunk, stats) -> Array:
        return chunk.tuned[0] + np.float32(1e-3) * np.random.default_rng().standard_normal(chunk.size, dtype=np.float32)


@closed_form("excused", alone="it does not want to")
@dataclass(frozen=True)
class Excused:
    """The first model, with an excuse that it does not need."""

    def merge_chunk(self, chunk, stats) -> Array:
        return chunk.tuned[0]


@dataclass(frozen=True)
class Overwrites:
    """Writes into the model that it is given."""

    def merge(self, inputs):
        base, tuned = endpoints(inputs)
        with torch.no_grad():
            for tensor in tuned[0].adapter.tensors.values():
                tensor += 1
        return as_model(base, dict(tuned[0].adapter.tensors), inputs)


@dataclass(frozen=True)
class Own:
    """A model that has no file, and logits of one class too few."""

    silent: int = 3

    def merge(self, inputs):
        return Few(inputs.tuned[0])


@dataclass(frozen=True)
class Few:
    one: Single
    parameters, forwards = 0, 1

    @property
    def encoders(self):
        return self.one.encoders

    def bind(self, classes):
        head = self.one.bind(classes)
        return lambda features: head(features)[:, 1:]


@dataclass(frozen=True)
class Honest:
    """The same, and it says so."""

    exempt: ClassVar = {
        "logits [B, K]": "one class too few, for this test",
        "late names": "as above",
        "saved and loaded": "its model is this test's own",
        "the base gives the base": "one class too few",
    }

    def merge(self, inputs):
        return Few(inputs.tuned[0])


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Half(), "the base gives the base: models that are all the base give another model"),
        (Forgets(), r"one model gives itself: one model alone \(1 times\) does not come back"),
        (Hoard(), "memory bound: .* bytes for chunks of 32768 elements of 1 models, .* are allowed"),
        (Restless(), "same seed, same bytes: a second merge has other bytes"),
        (Excused(), r"one model gives itself: exempt \(it does not want to\), but it is kept"),
    ],
)
def test_broken_promises_of_closed_forms_are_told(strategy, message):
    with pytest.raises(Violation, match=message):
        testing.check_closed_form(strategy)


def test_broken_promises_of_other_strategies_are_told():
    with pytest.raises(Violation, match="inputs unchanged: a model's tensors changed"):
        testing.check_strategy(Overwrites())
    with pytest.raises(Violation) as found:
        testing.check_strategy(Own())
    told = str(found.value)
    assert "documented: the option silent has no meaning: use option()" in told
    assert "logits [B, K]: logits are (6, 2) for 6 images and 3 classes" in told
    assert "saved and loaded: a Few has no file" in told
    testing.check_strategy(Honest())


@dataclass(frozen=True)
class Twice:
    """A dataset that tests what it trains on."""

    def load(self, reporter):
        given = world.dataset()
        return Dataset("twice", ("a", "a", "b"), ("no place",), given.train, given.val, given.train)


def test_broken_promises_of_datasets_are_told():
    with pytest.raises(Violation) as found:
        testing.check_dataset(Twice)
    assert "train and test share images" in str(found.value)
    assert "fewer than two classes, or one twice" in str(found.value)
