"""Weight matching (Ainsworth, Hayase & Srinivasa 2023, "Git Re-Basin", arXiv 2209.04836, section 3.2, algorithm 1).

Models trained from different starts have similar units in different orders, and their average works as neither. Of all models that are the same
network as B (`symmetries.py`), `align` finds one whose weights have a large inner product with A's, by coordinate descent: with all other
permutations fixed, the best one of a group is a linear assignment problem.

Departures: groups are taken in the network's order and not at random, so that the result is repeatable. The first sweep looks, for each
group, only at tensors whose other axes are settled; those are not noise. Heads are matched with the best order within each pair of
heads, which is still the exact best of the objective. BatchNorm's statistics are permuted but do not count. A permutation that gains
nothing over the one that is there is not taken, and neither is a result that is farther from A than B was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mergekit_vl.alignment.families import Shapes
from mergekit_vl.alignment.permuted import Orders, Permuted
from mergekit_vl.alignment.symmetries import Group, Place
from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import UserError
from mergekit_vl.merging.chunks import CHUNK_SIZE, Source
from mergekit_vl.merging.engine import BATCH_NORM

SWEEPS = 50
"""At most; a handful is usual."""
STRETCH = 1 << 20
"""Elements that are read at once where a tensor is contracted along its first axis."""
GAIN = 1e-10
"""Of the sum of all inner products: what a better permutation must gain, since sums have rounding errors."""
SOLVER = 64 << 20
"""Bytes that scipy itself takes."""
WIDE = np.dtype(np.float64)


@dataclass(frozen=True)
class Alignment:
    orders: Orders
    moved: int
    """Groups that are not in B's own order."""
    before: float
    """The cosine between A and B over all tensors that groups touch."""
    after: float


def align(reference: Source, other: Source, shapes: Shapes, groups: Sequence[Group]) -> Alignment:
    """The order of `other`'s axes in which it matches `reference`."""
    own: Orders = {place.tensor: {} for group in groups for place in group.places}
    for group in groups:
        for place in group.places:
            own[place.tensor][place.axis] = np.arange(shapes[place.tensor][place.axis])
    before = _cosine(reference, other, shapes, own)
    orders = {name: dict(axes) for name, axes in own.items()}
    touching: dict[str, set[str]] = {}
    for group in groups:
        for place in group.places:
            touching.setdefault(place.tensor, set()).add(group.name)
    settled: set[str] = set()
    for sweep in range(SWEEPS):
        changed = False
        for group in groups:
            known = settled | {group.name}
            chosen = {name for name in own if sweep or touching[name] <= known}
            found = _best(group, reference, Permuted(other, shapes, orders), shapes, chosen)
            settled.add(group.name)
            if found is not None:
                _reorder(orders, group, found)
                changed = True
        if sweep and not changed:
            break
    after = _cosine(reference, Permuted(other, shapes, orders), shapes, own)
    if after <= before:
        return Alignment({}, 0, before, before)
    differing = {
        name: {axis: order for axis, order in axes.items() if not np.array_equal(order, own[name][axis])}
        for name, axes in orders.items()
    }
    moved = sum(any(place.axis in differing[place.tensor] for place in group.places) for group in groups)
    return Alignment({name: axes for name, axes in differing.items() if axes}, moved, before, after)


def _best(group: Group, a: Source, b: Source, shapes: Shapes, chosen: set[str]) -> list[Array] | None:
    """For each part of the group the new order of units and dims, flattened; None where the present one is as good."""
    units, dims, _ = group.parts[0][0].positions.shape
    products = [
        sum((_products(a, b, place, shapes) for place in part if place.tensor in chosen), np.zeros((group.size,) * 2))
        for part in group.parts
    ]
    gains: Array
    inner: list[Array] | None
    if dims == 1:
        gains, inner = sum(products, np.zeros(())), None
    else:
        gains, inner = _heads(products, units, dims)
    rows, order = _assign(gains)
    gained = gains[rows, order].sum() - sum(np.trace(each) for each in products)
    if gained <= GAIN * sum(np.abs(each).sum(1).max() * len(each) for each in products):
        return None
    if inner is None:
        return [order] * len(products)
    return [(order[:, None] * dims + part[rows, order]).reshape(-1) for part in inner]


def _heads(products: Sequence[Array], units: int, dims: int) -> tuple[Array, list[Array]]:
    """[head of A, head of B]: the largest inner product, and for each part the order of dims that gives it."""
    gains = np.zeros((units, units))
    inner = [np.zeros((units, units, dims), np.int64) for _ in products]
    for part, found in zip(products, inner):
        blocks = part.reshape(units, dims, units, dims)
        for i in range(units):
            for j in range(units):
                rows, found[i, j] = _assign(blocks[i, :, j])
                gains[i, j] += blocks[i, rows, j, found[i, j]].sum()
    return gains, inner


def _assign(gains: Array) -> tuple[Array, Array]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UserError("--rebasin needs scipy, which is not installed", hint="pip install scipy") from None
    if not np.isfinite(gains).all():
        raise UserError(
            "a model has values that are not finite: it cannot be aligned", hint="it was damaged while training"
        )
    rows, order = linear_sum_assignment(gains, maximize=True)
    return rows, order


def _products(a: Source, b: Source, place: Place, shapes: Shapes) -> Array:
    """Inner products of A's units (and dims) with B's, in one tensor, summed over its other axes."""
    if BATCH_NORM.search(place.tensor):
        return np.zeros(())
    positions = place.positions.reshape(-1, place.positions.shape[-1])
    total = np.zeros((len(positions),) * 2)
    for start, stop, shape in _stretches(shapes[place.tensor], place.axis):
        x, y = (
            np.moveaxis(source.read(place.tensor, start, stop, WIDE).reshape(shape), place.axis, 0)[positions]
            for source in (a, b)
        )
        total += x.reshape(len(positions), -1) @ y.reshape(len(positions), -1).T
    return total


def _stretches(shape: tuple[int, ...], axis: int = 1) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """A tensor in stretches of rows along its first axis, where that is not the one that is matched."""
    length = int(np.prod(shape[1:]))
    step = max(1, shape[0] if axis == 0 else STRETCH // max(1, length))
    for first in range(0, shape[0], step):
        last = min(first + step, shape[0])
        yield first * length, last * length, (last - first, *shape[1:])


def _reorder(orders: Orders, group: Group, found: Sequence[Array]) -> None:
    for part, order in zip(group.parts, found):
        for place in part:
            axis = orders[place.tensor][place.axis]
            step = np.arange(len(axis))
            positions = place.positions.reshape(-1, place.positions.shape[-1])
            step[positions] = positions[order]
            orders[place.tensor][place.axis] = axis[step]


def _cosine(a: Source, b: Source, shapes: Shapes, names: Mapping[str, object]) -> float:
    sums = np.zeros(3)
    for name in names:
        if BATCH_NORM.search(name):
            continue
        for start, stop, _ in _stretches(shapes[name]):
            x, y = (source.read(name, start, stop, WIDE) for source in (a, b))
            sums += (x @ y, x @ x, y @ y)
    return float(sums[0] / np.sqrt(sums[1] * sums[2])) if sums[1] and sums[2] else 0.0


def reading(shapes: Shapes, groups: Sequence[Group], elements: int) -> int:
    """Elements that reading so many of a permuted model takes at most: whole rows, in three states."""
    longest = max(int(np.prod(shapes[place.tensor][1:])) for group in groups for place in group.places)
    return 3 * (max(elements, CHUNK_SIZE) + 2 * longest)


def memory(shapes: Shapes, groups: Sequence[Group]) -> int:
    """Bytes that `align` takes at most: four arrays of products, and a tensor of each model in three states."""
    most = 0
    for group in groups:
        largest = max(stop - start for p in group.places for start, stop, _ in _stretches(shapes[p.tensor], p.axis))
        most = max(most, WIDE.itemsize * (4 * len(group.parts) * group.size**2 + 6 * largest))
    return most + SOLVER
