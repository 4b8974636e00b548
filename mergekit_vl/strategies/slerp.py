"""Spherical linear interpolation (Shoemake 1985, "Animating rotation with quaternion curves", section 3.3), tensor by tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import UserError
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.merging.coefficients import Coefficient, coefficient
from mergekit_vl.merging.method import MethodInfo
from mergekit_vl.merging.prepass import products
from mergekit_vl.merging.task_vectors import weighted_sum
from mergekit_vl.options import check, option
from mergekit_vl.strategies.closed_form import closed_form

if TYPE_CHECKING:
    from jaxtyping import Float

FLAT = 1e-7
"""Angles in radians (and distances from pi) below which the straight line is taken: it is the same to 1e-14, or undetermined."""


@closed_form("slerp", chunks="accumulating", at_most=2, passes=1)
@dataclass(frozen=True)
class Slerp:
    """(sin((1-t) o) a + sin(t o) b) / sin o, with o the angle between the flattened tensors a and b.

    From the base to one tuned model, or between two tuned models (a base then only gives the integer tensors). Departure: the
    lengths are kept as they are, so tensors of different length swing along a spiral.
    mergekit's variant: line_above=0.9995, which makes it a straight line for nearly all tensors of models tuned from one start.
    """

    t: Coefficient = coefficient(0.5, "0 is the first model, 1 the second")
    line_above: float = option(1.0, "the straight line where |cosine| exceeds this")

    grid = {"t": (0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)}

    info: ClassVar[MethodInfo]

    def describe(self, n: int) -> MethodInfo:
        return replace(self.info, ignores_base=n == 2)

    def check(self, models: Models) -> None:
        ends = 2 - len(models.tuned) if models.base is not None else 2
        models.check_count("strategy slerp", at_least=max(1, ends), at_most=2)
        check(self, where="strategy slerp", line_above=(0 <= self.line_above <= 1, "it lies in 0 .. 1"))

    def prepass(self, models: Models, run: Run, chunk_size: int) -> dict[str, Array]:
        return products(models, _ends, run, chunk_size)

    def merge_chunk(self, chunk: Chunk, stats: dict[str, Array]) -> Array:
        coefficients = slerp_coefficients(stats[chunk.tensor.name], chunk.at(self.t), self.line_above)
        return weighted_sum(_ends(chunk), coefficients)


def _ends(chunk: Chunk) -> list[Array]:
    return list(chunk.tuned if len(chunk.tuned) == 2 else chunk.members)


def slerp_coefficients(gram: Float[Array, "2 2"], t: float, line_above: float = 1.0) -> tuple[float, float]:
    """The factors of the two vectors whose products are `gram`."""
    norms = math.sqrt(gram[0, 0] * gram[1, 1])
    cosine = min(1.0, max(-1.0, gram[0, 1] / norms)) if norms > 0 else 1.0
    angle = math.acos(cosine)
    if abs(cosine) > line_above or angle < FLAT or math.pi - angle < FLAT:
        return 1 - t, t
    if not math.isfinite(t * angle):
        raise UserError(f"t={t:g}", where="strategy slerp", hint="0 is the first model, 1 the second")
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def slerp_rows(a: Float[Array, "*rows d"], b: Float[Array, "*rows d"], t: float) -> Float[Array, "*rows d"]:
    """Along the last axis, each vector by its own angle; in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.sqrt(np.vecdot(a, a) * np.vecdot(b, b))
    cosine = np.clip(np.vecdot(a, b) / np.where(norms > 0, norms, 1), -1, 1)
    angle = np.arccos(cosine)
    line = (norms == 0) | (angle < FLAT) | (np.pi - angle < FLAT)
    sine = np.where(line, 1, np.sin(angle))
    first = np.where(line, 1 - t, np.sin((1 - t) * angle) / sine)
    second = np.where(line, t, np.sin(t * angle) / sine)
    turned: Array = first[..., None] * a + second[..., None] * b
    return turned
