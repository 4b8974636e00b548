"""Intervals for differences: paired bootstraps, over tasks or over images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
LEAST = 5
"""Clusters that an interval across them takes: a bootstrap of fewer shows little more than their range."""
NO_INTERVAL = f"no interval is given across fewer than {LEAST} tasks"


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95% interval (none: `low` and `high` are None), in the unit of what was given."""

    mean: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """ "above" and "below" only where the interval excludes 0."""
        if self.low is None or self.high is None:
            return "no interval"
        return "above" if self.low > 0 else "below" if self.high < 0 else "not significant"


def clustered(differences: Sequence[float], clusters: Sequence[str], *, seed: int = 0) -> Difference:
    """Bootstrap of the mean of paired differences that resamples whole clusters (tasks), so that seeds of a task count together.

    Fewer than `LEAST` clusters have no interval.
    """
    names = list(dict.fromkeys(clusters))
    values = np.asarray(differences, dtype=np.float64)
    if len(names) < LEAST:
        return Difference(float(values.mean()), None, None)
    sums = np.array([values[[c == name for c in clusters]].sum() for name in names])
    counts = np.array([sum(c == name for c in clusters) for name in names])
    draws = np.random.default_rng(seed).integers(0, len(names), (DRAWS, len(names)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(values.mean()), float(low), float(high))


def over_images(
    rows: Sequence[Sequence[Sequence[np.ndarray]]],
    score: Callable[[Sequence[np.ndarray]], np.ndarray],
    *,
    seed: int = 0,
) -> Difference:
    """Bootstrap over test images of the difference in `score` of two rows: rows[row][cell][test] is a 0/1 array, paired by image,
    and `score` makes one number of the accuracies of the tests. Cells (the seeds of one task) share images, so their intervals
    are averaged, not narrowed.
    """
    rng = np.random.default_rng(seed)
    cells = []
    for ours, theirs in zip(*rows):
        rates = []
        for a, b in zip(ours, theirs):
            # only four kinds of image matter (ours right, theirs right, both, none): draw their counts, not the images
            kinds = np.bincount(2 * a.astype(int) + b.astype(int), minlength=4)
            counts = rng.multinomial(len(a), kinds / len(a), size=DRAWS) / len(a)
            rates.append((counts[:, 2] + counts[:, 3], counts[:, 1] + counts[:, 3]))
        low, high = np.quantile(score([r[0] for r in rates]) - score([r[1] for r in rates]), [0.025, 0.975])
        cells.append((score([a.mean() for a in ours]) - score([b.mean() for b in theirs]), low, high))
    return Difference(*(float(x) for x in np.mean(cells, 0)))


def ranks(scores: Sequence[float]) -> list[float]:
    """1 for the highest; equal ones share the mean of their places."""
    values = np.asarray(scores, dtype=np.float64)
    return [float((values > v).sum() + ((values == v).sum() + 1) / 2) for v in values]
