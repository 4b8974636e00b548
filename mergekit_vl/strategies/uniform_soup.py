"""The uniform soup (Wortsman et al. 2022, "Model soups", arXiv 2203.05482, section 2, table 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models
from mergekit_vl.merging.task_vectors import weighted_sum
from mergekit_vl.strategies.in_memory import merge_adapters


@dataclass(frozen=True)
class UniformSoup:
    """The plain mean of the fine-tuned models; the base is not an ingredient (`linear` makes it one)."""

    form, averages = "accumulating", True

    def held(self, n: int) -> int:
        return 3

    def ignores_base(self, n: int) -> bool:
        return True

    def check(self, models: Models) -> None:
        models.check_count("strategy uniform_soup")

    merge = merge_adapters

    def merge_chunk(self, chunk: Chunk, stats: Any) -> Array:
        n = len(chunk.models.tuned)
        return weighted_sum((chunk.tuned(i) for i in range(n)), (1 / n,) * n)
