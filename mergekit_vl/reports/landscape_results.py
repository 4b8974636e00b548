"""What lies between models, as frozen dataclasses: points of lines, barriers and the plane. Their fields are the keys of the JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit_vl.reports.results import IF_THERE, LinePoint, fields_of, read, renamed


@dataclass(frozen=True)
class Barrier:
    """How far the loss rises (nats) and accuracy falls (a fraction) from the straight line between a segment's ends."""

    space: str
    segment: str
    tests: Mapping[str, Mapping[str, float]]
    """nll and acc1 by test."""


@dataclass(frozen=True)
class Plane:
    """Scores on the plane through three models, in units of the distance from zero-shot to tuned."""

    space: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    corners: Mapping[str, tuple[float, float]]
    """The places of zero-shot, tuned and merged."""
    tests: Mapping[str, Mapping[str, tuple[tuple[float, ...], ...]]]
    """acc1 and nll by test, at xs[i], ys[j]."""


@dataclass(frozen=True)
class CellLandscape:
    """Lines and plane of one cell, with the model of a row between zero-shot and tuned, as a bench records it; without points where there is none."""

    row: str
    points: tuple[LinePoint, ...] = ()
    barriers: tuple[Barrier, ...] = ()
    plane: Plane | None = None
    made_of: Mapping[str, object] | None = field(default=None, metadata=IF_THERE)

    def to_json(self) -> dict[str, Any]:
        return fields_of(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> CellLandscape:
        return read(cls, current(found))


@dataclass(frozen=True)
class MeanLandscape:
    """The means over cells of the points and barriers, with the model of a row between zero-shot and tuned, and the plane of one cell."""

    row: str
    cells: int
    points: tuple[LinePoint, ...]
    barriers: tuple[Barrier, ...]
    plane: Plane | None
    plane_of: str
    """The cell that the plane is of."""

    def to_json(self) -> dict[str, Any]:
        return fields_of(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> MeanLandscape:
        return read(cls, current(found))


def current(found: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a landscape, that of 0.1.0 too, with keys as they are called now."""
    lists = {key: [renamed(each, segment="leg") for each in found.get(key, ())] for key in ("points", "barriers")}
    return {**found, **lists}
