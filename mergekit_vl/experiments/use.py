"""A model at work: its scores on a dataset, and probabilities for any images. `eval`, `predict` and the Python API come here."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_vl.datasets.base import CanBeWhole
from mergekit_vl.errors import UserError, unknown
from mergekit_vl.models.model import Classes, image_encoders
from mergekit_vl.printable import counted, first_names
from mergekit_vl.reports.render import notebook_table
from mergekit_vl.reports.results import plain
from mergekit_vl.system.regular_files import user_path

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.datasets.base import Dataset, DatasetOptions, Split
    from mergekit_vl.models.evaluate import Scores
    from mergekit_vl.models.features import FeatureStore
    from mergekit_vl.models.model import ImageEncoder, Model
    from mergekit_vl.reporter import Reporter


@dataclass(frozen=True, repr=False)
class Evaluated:
    """A model's scores on a split of a dataset, against all of its class names."""

    model: str
    dataset: str
    split: str
    classes: int
    scores: Scores
    ms_per_sample: float
    """From features to logits."""
    pretrained: str = ""
    """Which weights the backbone was loaded with."""

    @property
    def accuracy(self) -> float:
        """A fraction; `scores` has the others."""
        return self.scores.acc1

    def to_json(self) -> dict[str, object]:
        """As CLIP_benchmark writes it, with ours beside."""
        told = plain(self.scores)
        return {
            "dataset": self.dataset,
            "split": self.split,
            "model": self.model,
            "pretrained": self.pretrained,  # `clip_benchmark build` names rows by model and pretrained
            "task": "zeroshot_classification",
            "language": "en",
            "classes": self.classes,
            "metrics": {key: told.pop(key) for key in ("acc1", "acc5", "mean_per_class_recall")},
            **told,
            "ms_per_sample": self.ms_per_sample,
        }

    def table(self) -> list[tuple[str, str]]:
        """(what, how much) as `eval` prints them."""
        s = self.scores
        return [
            ("accuracy", f"{100 * s.acc1:.1f}  (95% {100 * s.low:.1f} to {100 * s.high:.1f})"),
            ("top-5", f"{100 * s.acc5:.1f}"),
            ("mean per class", f"{100 * s.mean_per_class_recall:.1f}"),
            ("NLL, ECE", f"{s.nll:.3f}, {s.ece:.3f}"),
        ]

    @property
    def title(self) -> str:
        return f"{self.model} on {self.dataset} ({self.split}, {self.scores.n} images, {self.classes} classes)"

    def __repr__(self) -> str:
        return "\n".join([self.title, *(f"  {what:15s} {value}" for what, value in self.table())])

    def _repr_html_(self) -> str:
        return notebook_table(self.table(), title=self.title)


ALL = "all"
"""The split that is all images of a dataset."""


def load_for(
    dataset: DatasetOptions, split: str | None, reporter: Reporter, *, of_run: bool = False
) -> tuple[Dataset, str]:
    """The dataset, and the split that is scored: `split`, or where none is asked for its test; all images of a folder that is not divided.

    A run's own dataset (`of_run`) is divided as the run divided it.
    """
    if isinstance(dataset, CanBeWhole) and (split == ALL or (split is None and not of_run and not dataset.divided)):
        if split is None:
            reporter.tell(
                "no split folders: all images are scored; --split test scores the share that `run` would call test"
            )
        return dataset.whole(reporter), ALL
    return dataset.load(reporter), split or "test"


def _all_of(data: Dataset) -> Split:
    """All images of a dataset; raises UserError where its splits are of different sources."""
    splits = [part for part in (data.train, data.val, data.test) if len(part)]
    if len({part.source.key for part in splits}) > 1:
        raise UserError("its splits cannot be scored together", where=data.name, hint="--split test, val or train")
    pairs = sorted({(int(r), int(k)) for part in splits for r, k in zip(part.rows, part.labels)})
    rows, labels = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return dataclasses.replace(splits[0], rows=rows.copy(), labels=labels.copy())


def evaluate_on(model: Model, label: str, data: Dataset, split: str, store: FeatureStore) -> Evaluated:
    """`split` is test, val, train, all, or a shift of the dataset; of a shift, the classes that it shows count."""
    from mergekit_vl.models.evaluate import evaluate

    parts = {"test": data.test, "val": data.val, "train": data.train, **data.shifts}
    if split == ALL and split not in parts:
        parts[ALL] = _all_of(data)
    if split not in parts:
        raise unknown("split", split, parts, where=data.name)
    part = parts[split]
    shown = tuple(sorted(set(part.labels.tolist()))) if split in data.shifts else tuple(range(len(data.classes)))
    classes = Classes(data.classes, data.templates).subset(shown)
    found = evaluate(model, classes, part.of_classes(shown), store)
    weights = ", ".join(dict.fromkeys(path.backbone.pretrained for path in image_encoders(model, classes)))
    return Evaluated(label, data.name, split, len(classes.names), found.scores, 1000 * found.seconds, weights)


View = Callable[["ImageEncoder", int], "Tensor"]
"""(image encoder, i): the test view [3, H, W] of image i that this encoder reads."""


def probabilities(model: Model, classes: Classes, view: View, n: int, reporter: Reporter) -> Tensor:
    """[n, K] of n images, on the CPU."""
    import torch

    from mergekit_vl.models.views import prefetched

    head = model.bind(classes)
    encoders = image_encoders(model, classes)
    size = min(n, *(encoder.backbone.block for encoder in encoders))
    features: dict[str, list[Tensor]] = {}
    for encoder in encoders:
        features[encoder.key] = []
        for batch in prefetched(partial(view, encoder), n, size):
            features[encoder.key].append(encoder.encode(batch, block=size))
            reporter.progress(sum(map(len, features[encoder.key])), n, "images")
    with torch.no_grad():
        return head({key: torch.cat(parts) for key, parts in features.items()}).float().softmax(-1).cpu()


def best(probabilities: Tensor, names: tuple[str, ...], top: int) -> list[list[tuple[str, float]]]:
    """Of [N, K]: for each image the `top` likeliest names with their probabilities."""
    found = probabilities.topk(min(top, len(names)))
    return [
        [(names[i], p) for p, i in zip(values, indices)]
        for values, indices in zip(found.values.tolist(), found.indices.tolist())
    ]


def image_files(given: Sequence[str]) -> list[Path]:
    """Of image files and folders of them: the files."""
    from mergekit_vl.datasets.image_files import readable_suffixes

    kinds = readable_suffixes()
    files: list[Path] = []
    for name in given:
        if not name:  # which Path reads as this folder
            raise UserError("'' is no image", where="command line", hint="give image files or folders of them")
        path = user_path(name)
        if path.is_dir():
            files += _below(path, kinds)
        elif path.exists():
            files.append(path)
        else:
            raise UserError("no such image", where=str(path), hint="give image files or folders of them")
    if not files:
        raise UserError("no images", where=", ".join(given), hint="give image files or folders of them")
    return files


def _below(folder: Path, kinds: set[str]) -> list[Path]:
    """The images in a folder and the folders below, none that is hidden or that a link leads to."""
    from mergekit_vl.datasets.class_folders import entries_of

    found, waiting = [], [folder]
    while waiting:
        here = waiting.pop()
        for name, is_folder in entries_of(here):
            if is_folder and not (here / name).is_symlink():
                waiting.append(here / name)
            elif not is_folder and Path(name).suffix.lower() in kinds:
                found.append(here / name)
    return sorted(found)


def readable(files: Sequence[Path], given: Sequence[str], megapixels: float, reporter: Reporter) -> list[Path]:
    """Of files of which some were found in folders, those that decode; of the others each is told. Raises UserError for one that is named itself, and where none is left."""
    from mergekit_vl.datasets.image_files import decode

    named = {user_path(name) for name in given}
    good, bad = [], []
    for file in files:
        if file in named:  # it is read, or ends the command, later
            good.append(file)
            continue
        try:
            decode(file, megapixels=megapixels, draft=True)
        except MemoryError:
            raise
        except Exception as error:  # PIL's decoders raise nearly anything
            bad.append(f"{file}: {error.what if isinstance(error, UserError) else 'cannot be decoded'}")
        else:
            good.append(file)
    for line in bad[:20]:
        reporter.warn(f"{line}: left out")
    if len(bad) > 20:
        reporter.warn(f"{len(bad) - 20} more images left out")
    if not good:
        raise UserError(f"none of {len(bad)} images can be decoded", where=", ".join(given), hint="give images")
    return good


def named_classes(given: str, reporter: Reporter) -> tuple[str, ...]:
    """Class names from a file in any form that `datasets.class_names` reads, or with commas between them; raises UserError for fewer than two."""
    from mergekit_vl.datasets.class_names import doubles, in_order, read_names

    if os.path.exists(os.path.expanduser(given)):
        names = in_order(read_names(user_path(given)))
    else:
        names = tuple(name.strip() for name in given.split(",") if name.strip())
    if len(names) < 2:
        raise UserError(f"class names {given!r}", where="--classes", hint="at least two, each once")
    if twice := doubles(names):
        reporter.warn(f"--classes: {counted(twice, 'class name')} used more than once: {first_names(twice)}")
    return names


def from_files(files: Sequence[Path], megapixels: float) -> View:
    """The test views of image files of at most so many million pixels."""
    from mergekit_vl.datasets.image_files import decode
    from mergekit_vl.models.views import eval_view

    def load(i: int) -> Any:
        try:
            return decode(files[i], megapixels=megapixels)
        except UserError:
            raise
        except Exception as error:  # PIL's decoders raise nearly anything
            raise UserError(f"cannot be decoded: {error}", where=str(files[i]), hint="leave it out") from None

    return lambda encoder, i: eval_view(load(i), encoder)
