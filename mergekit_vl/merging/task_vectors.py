"""What the task-vector methods share: weighted sums, sign election, and reproducible random drops."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import unknown
from mergekit_vl.merging.chunks import Chunk, Models

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, UInt

DRAWS = 8
"""32-bit draws in one step of the counter of Philox 4x64; chunks start at multiples of it."""


def add_to_base(chunk: Chunk, merged: Float[Array, " n"], scale: float) -> Float[Array, " n"]:
    """base + scale * merged."""
    merged *= merged.dtype.type(scale)
    merged += chunk.base
    return merged


def weighted(vector: Float[Array, "*shape"], weight: float) -> Float[Array, "*shape"]:
    return vector if weight == 1 else vector * vector.dtype.type(weight)


def weighted_sum(vectors: Iterable[Array], weights: Sequence[float]) -> Array:
    """sum_i w_i * v_i, in the order given; overwrites the vectors."""
    total = None
    for vector, weight in zip(vectors, weights):
        if weight != 1:
            vector *= vector.dtype.type(weight)
        total = vector if total is None else np.add(total, vector, out=total)
    assert total is not None
    return total


def agreeing(vectors: Sequence[Array], weights: Sequence[float], *, elect: str, mean: bool) -> Array:
    """Sign election and the disjoint merge of TIES (sections 3.2 and 3.3 of its paper).

    The sign of an element is that of its sum over the models (`elect=raw`) or of its weighted sum (`weighted`); a sum of exactly
    zero elects no sign. Only non-zero elements of that sign count: their weighted sum, or with `mean` their weighted mean.
    """
    scaled = [weighted(vector, weight) for vector, weight in zip(vectors, weights)]
    voters = scaled if elect == "weighted" else vectors
    elected = voters[0].copy()
    for voter in voters[1:]:
        elected += voter
    up, down = elected > 0, elected < 0
    total = np.zeros_like(elected)
    share = np.zeros_like(elected) if mean else None
    for vector, voter, weight in zip(scaled, voters, weights):
        agrees = (voter > 0) & up
        agrees |= (voter < 0) & down
        total += vector * agrees
        if share is not None:
            share += weighted(agrees.astype(share.dtype), weight)
    if share is not None:
        share += share == 0  # nobody agrees: 0 / 1
        total /= share
    return total


def sign(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """-1, 0 or 1. numpy's own takes ten times as long on signs that no processor can foresee; NaN has none here."""
    return np.subtract(values > 0, values < 0, dtype=values.dtype)


def draw(chunk: Chunk, model: int) -> UInt[Array, " n"]:
    """A uniform 32-bit number for each element of the chunk, from (seed, tensor's name, model, position) and nothing else.

    Philox 4x64 (Salmon et al. 2011), keyed by a hash of the first three, its counter at the position: any chunk of any tensor is
    drawn alone, in any order and by any thread, with the same result.
    """
    name = chunk.tensor.tied_to or chunk.tensor.name
    key = hashlib.sha256(json.dumps([chunk.models.seed, name, model]).encode()).digest()[:16]
    first, rest = divmod(chunk.start, DRAWS)
    stream = np.random.Philox(key=np.frombuffer(key, "<u8"), counter=[first, 0, 0, 0])
    words = stream.random_raw(-(-(rest + chunk.size) // DRAWS) * 4)
    return words.astype("<u8", copy=False).view("<u4")[rest : rest + chunk.size]


def keep_at_random(chunk: Chunk, model: int, density: float) -> Bool[Array, " n"]:
    """True where an element is kept: with probability `density`, to within 2^-33."""
    if density >= 1:
        return np.ones(chunk.size, bool)
    return draw(chunk, model) < np.uint32(min(round(density * 2**32), 2**32 - 1))


def chosen_task(where: str, task: str | int | None, models: Models) -> int | None:
    """The number of the tuned model that `task` names by its label or number, None for none; raises UserError where there is no such."""
    if task is None:
        return None
    names = [*models.labels, *map(str, range(len(models.labels)))]
    if str(task) not in names:
        raise unknown("task", task, names, where=where)
    return names.index(str(task)) % len(models.labels)
