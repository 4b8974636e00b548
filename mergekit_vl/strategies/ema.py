"""An exponential moving average over the checkpoints of one run (Polyak & Juditsky 1992; as weights, Tarvainen & Valpola 2017,
arXiv 1703.01780, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models
from mergekit_vl.merging.coefficients import Coefficient
from mergekit_vl.options import option
from mergekit_vl.strategies.in_memory import merge_adapters


@dataclass(frozen=True)
class Ema:
    """ema_1 = theta_1; ema_t = decay * ema_(t-1) + (1 - decay) * theta_t. Models in the order of training; the base takes no part.

    Departure: the recurrence runs over the checkpoints that were saved, not over every step, so `decay` is per checkpoint.
    """

    decay: Coefficient = option(0.9, "weight of the past at each checkpoint: 0 is the last one alone")

    grid = {"decay": (0.3, 0.5, 0.7, 0.8, 0.95, 0.99)}

    form, averages = "accumulating", True

    def held(self, n: int) -> int:
        return 3

    def ignores_base(self, n: int) -> bool:
        return True

    def check(self, models: Models) -> None:
        models.check_count("strategy ema", at_least=2)
        models.check_coefficient("strategy ema", self.decay, "decay", 0, 1)

    merge = merge_adapters

    def merge_chunk(self, chunk: Chunk, stats: Any) -> Array:
        decay = chunk.at(self.decay)
        average = chunk.tuned(0)
        for i in range(1, len(chunk.models.tuned)):
            average *= average.dtype.type(decay)
            later = chunk.tuned(i)
            later *= later.dtype.type(1 - decay)
            average += later
        return average
