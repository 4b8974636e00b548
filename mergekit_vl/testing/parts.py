"""Backbones, datasets and protocols."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_vl.datasets.base import Dataset, named_by
from mergekit_vl.models.model import Classes
from mergekit_vl.protocols.base import Task, joint
from mergekit_vl.reporter import SILENT
from mergekit_vl.testing import world
from mergekit_vl.testing.promises import begun, quick, require

if TYPE_CHECKING:
    from mergekit_vl.backbones.base import BackboneOptions
    from mergekit_vl.datasets.base import DatasetOptions, Split
    from mergekit_vl.protocols.base import EvaluationProtocol


def check_backbone(options: BackboneOptions | type[BackboneOptions], **given: object) -> None:
    """Raise Violation unless a backbone keeps its promises: features [B, D], the same every time; frozen; texts [K, D] of late names."""
    import torch

    promises = begun(options, "backbones")
    built: Any = None
    with promises("builds"):
        options = quick(options, given, {}) if isinstance(options, type) else options
        built = options.build("cpu")
    if built is None:
        return promises.settle()
    size = built.preprocess["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(0))
    kept = images.clone()
    with promises("features [B, D]"):
        features = built.encode_image(images)
        require(features.ndim == 2 and len(features) == 3, f"features are {tuple(features.shape)} for 3 images")
        require(features.dtype == torch.float32 and bool(features.isfinite().all()), "features are not finite float32")
        require(
            built.width in (None, features.shape[1]), f"width is {built.width}, and features {tuple(features.shape)}"
        )
        require(torch.equal(built.encode_image(images), features), "the same images have other features the next time")
        require(torch.equal(images, kept), "the images changed")
    with promises("frozen"):
        require(not any(p.requires_grad for p in built.model.parameters()), "a parameter asks for a gradient")
        require(not built.model.training, "it is in training mode")
    with promises("texts [K, D] of late names"):
        if built.text is not None:
            texts = built.encode_texts([text for names in world.LATE.texts() for text in names])
            require(texts.shape == (2, features.shape[1]), f"text features are {tuple(texts.shape)}")
            require(bool(texts.isfinite().all()), "text features are not finite")
    with promises("identity of its weights"):
        require(options.build("cpu").key == built.key, "built twice, it has two keys")
    return promises.settle()


def check_dataset(options: DatasetOptions | type[DatasetOptions], **given: object) -> None:
    """Raise Violation unless a dataset keeps its promises: names, templates, labels and images that fit each other, the same every time."""
    promises = begun(options, "datasets")
    with promises("contract"):
        named = named_by(options)
        require(named is None or named in options.__dataclass_fields__, f"has no option {named}")
    data: Any = None
    with promises("loads"):
        options = quick(options, given, {}) if isinstance(options, type) else options
        data = options.load(SILENT)
        require(isinstance(data, Dataset), f"gives a {type(data).__name__}, not a Dataset")
    if not isinstance(data, Dataset):
        return promises.settle()
    splits = {"train": data.train, "val": data.val, "test": data.test, **data.shifts}
    with promises("classes"):
        require(
            len(data.classes) > 1 and len(set(data.classes)) == len(data.classes),
            "fewer than two classes, or one twice",
        )
        texts = Classes(data.classes, data.templates).texts()
        require(len(texts) == len(data.templates) > 0, "it has no template")
    for name, split in splits.items():
        with promises(f"split {name}"):
            _check_split(split, len(data.classes))
    with promises("test images of their own"):
        for name in ("train", "val"):
            require(not overlap(splits[name], data.test), f"{name} and test share images")
    with promises("the same every time"):
        again = options.load(SILENT)
        require([s.key for s in (again.train, again.val, again.test)] == [s.key for s in (data.train, data.val, data.test)],
                "loaded twice, a split has two keys")  # fmt: skip
    return promises.settle()


def _check_split(split: Split, classes: int) -> None:
    require(len(split.rows) == len(split.labels), "rows and labels are of different number")
    if not len(split):
        return
    require(0 <= split.rows.min() and split.rows.max() < len(split.source), "a row is outside of its source")
    require(0 <= split.labels.min() and split.labels.max() < classes, "a label is no class")
    image = split.source.load(int(split.rows[0]))
    require(image.mode == "RGB", f"an image is {image.mode}, not RGB")


def overlap(one: Split, other: Split) -> bool:
    """Whether two splits share an image."""
    return one.source.key == other.source.key and bool(np.isin(one.rows, other.rows).any())


def check_protocol(protocol: EvaluationProtocol | type[EvaluationProtocol], **given: object) -> None:
    """Raise Violation unless a protocol keeps its promises, on drawn datasets: nothing that is tuned on is tested, columns name tests."""
    promises = begun(protocol, "protocols")
    made: Any = None
    with promises("makes a task"):
        protocol = quick(protocol, given, {"shots": 1}) if isinstance(protocol, type) else protocol
        data = [_with_shift(world.dataset(f"drawn {i}", i)) for i in range(2)]
        before = [_keys(each) for each in data]
        asked: Any = data if joint(protocol) else data[0]
        made = protocol.task(asked, 1)
        require(isinstance(made, Task), f"gives a {type(made).__name__}, not a Task")
    if not isinstance(made, Task):
        return promises.settle()
    with promises("inputs unchanged"):
        require([_keys(each) for each in data] == before, "a dataset changed")
    with promises("nothing that is tuned on is tested"):
        parts = [part for each in made.data for part in (each.train, each.val) if part is not None]
        require(
            not any(overlap(part, test) for part in parts for _, _, test in made.tests),
            "a test shares images with what is tuned on",
        )
    with promises("labels are classes"):
        for each in made.data:
            _check_split(each.train, len(each.classes.names))
        for _, classes, test in made.tests:
            require(len(test) > 0, "a test has no images")
            _check_split(test, len(classes.names))
    with promises("metric"):
        names = [name for name, _, _ in made.tests]
        used = [test for tests in made.metric.columns.values() for test in tests]
        require(len(set(names)) == len(names) and set(used) <= set(names), f"columns name {used}, tests are {names}")
        require(
            abs(made.metric.headline_of(dict.fromkeys(names, 0.5)) - 0.5) < 1e-9,
            "its headline of 0.5 everywhere is not 0.5",
        )
    with promises("same seed, same images"):
        again = protocol.task(asked, 1)
        require([d.train.key for d in again.data] == [d.train.key for d in made.data], "drawn twice, other images come")
    return promises.settle()


def _with_shift(data: Dataset) -> Dataset:
    from dataclasses import replace

    return replace(data, shifts={"night": world.split(6, 50)})


def _keys(data: Dataset) -> list[str]:
    return [split.key for split in (data.train, data.val, data.test)]
