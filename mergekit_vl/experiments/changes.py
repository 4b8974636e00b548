"""What a merge gained and what it forgot in a cell: right answers by class, before and after, and pictures whose answer changed."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

import numpy as np

from mergekit_vl.datasets.base import HasFiles
from mergekit_vl.reports.results import ClassChange, Picture, TestChange

if TYPE_CHECKING:
    from mergekit_vl.datasets.base import ImageSource, Split
    from mergekit_vl.models.model import Classes
    from mergekit_vl.protocols.base import Task
    from mergekit_vl.reports.results import Row

PICTURES = 6
"""Shown of each test and each kind, at most: newly right, newly wrong."""
SIDE = 96
"""Pixels of the longer side of a small picture."""


def changes(task: Task, rows: Sequence[Row], main: str) -> tuple[TestChange, ...]:
    """From the first row, the base, to the row `main`; beside them the model that was tuned on the task of the test, or the first one."""
    before, after = rows[0], next(row for row in rows if row.row == main)
    tuned = [row for row in rows if row.kind == "tuned"]
    own = dict(zip((name for name, _, _ in task.tests), tuned)) if len(task.data) > 1 else {}
    return tuple(
        _of_test(name, classes, split, before, own.get(name, tuned[0]), after) for name, classes, split in task.tests
    )


def _of_test(test: str, classes: Classes, split: Split, before: Row, tuned: Row, after: Row) -> TestChange:
    old, new, own = (_right(row, test) for row in (before, after, tuned))
    labels = np.asarray(split.labels)
    counted = []
    for i, name in enumerate(classes.names):
        of = labels == i
        if of.any():
            b, a = old[of], new[of]
            right = [int(hits.sum()) for hits in (b, own[of], a, a & ~b, b & ~a)]
            counted.append(ClassChange(name, int(of.sum()), *right))
    pictures = [
        _picture(split, i, classes.names, before, after, test, right)
        for right, flipped in ((False, old & ~new), (True, new & ~old))
        for i in _spread(np.flatnonzero(flipped), labels)[:PICTURES]
    ]
    return TestChange(test, tuple(counted), tuple(pictures))


def _right(row: Row, test: str) -> np.ndarray:
    """[B], whether each image is right."""
    right: np.ndarray = np.frombuffer(row.right[test].encode(), dtype=np.uint8) == ord("1")
    return right


def _spread(images: np.ndarray, labels: np.ndarray) -> list[int]:
    """The images in an order that shows every class before it shows one twice."""
    by_class: dict[int, list[int]] = {}
    for i in images.tolist():
        by_class.setdefault(int(labels[i]), []).append(i)
    return [i for i in chain.from_iterable(zip_longest(*by_class.values())) if i is not None]


def _picture(split: Split, i: int, names: Sequence[str], before: Row, after: Row, test: str, right: bool) -> Picture:
    """Image i of a split."""
    source, row = split.source, int(split.rows[i])
    told = [names[row.answers[test][i]] if test in row.answers else "" for row in (before, after)]
    file = source.files[row] if isinstance(source, HasFiles) else ""
    return Picture(row, names[int(split.labels[i])], told[0], told[1], right, file, _drawn(source, row))


def _drawn(source: ImageSource, row: int) -> str:
    image = source.load(row).convert("RGB")
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
