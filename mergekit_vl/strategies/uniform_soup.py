"""The uniform soup (Wortsman et al. 2022, "Model soups", arXiv 2203.05482, section 2, table 2)."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk
from mergekit_vl.merging.task_vectors import weighted_sum
from mergekit_vl.strategies.closed_form import closed_form


@closed_form("uniform_soup", chunks="accumulating", averages=True, ignores_base=True)
@dataclass(frozen=True)
class UniformSoup:
    """The plain mean of the fine-tuned models; the base is not an ingredient (`linear` makes it one)."""

    def merge_chunk(self, chunk: Chunk, stats: object) -> Array:
        n = len(chunk.tuned)
        return weighted_sum(chunk.tuned, (1 / n,) * n)
