"""An exponential moving average over the checkpoints of one run (Polyak & Juditsky 1992; as weights, Tarvainen & Valpola 2017,
arXiv 1703.01780, section 2)."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk
from mergekit_vl.merging.coefficients import Coefficient, coefficient
from mergekit_vl.strategies.closed_form import closed_form


@closed_form("ema", chunks="accumulating", averages=True, ignores_base=True, at_least=2)
@dataclass(frozen=True)
class Ema:
    """ema_1 = theta_1; ema_t = decay * ema_(t-1) + (1 - decay) * theta_t. Models in the order of training; the base is not used.

    Departure: the recurrence runs over the checkpoints that were saved, not over every step, so `decay` is per checkpoint.
    """

    decay: Coefficient = coefficient(
        0.9, "weight of the past at each checkpoint: 0 is the last one alone", low=0, high=1
    )

    grid = {"decay": (0.3, 0.5, 0.7, 0.8, 0.95, 0.99)}

    def merge_chunk(self, chunk: Chunk, stats: object) -> Array:
        decay = chunk.at(self.decay)
        models = iter(chunk.tuned)
        average = next(models)
        for later in models:
            average *= average.dtype.type(decay)
            later *= later.dtype.type(1 - decay)
            average += later
        return average
