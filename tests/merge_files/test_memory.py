"""What a merge holds: measured for every registered closed form, and held against the bounds that --max-ram counts with."""

import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mergekit_vl.merge_files import memory, streaming
from mergekit_vl.merge_files.plan import MergePlan, open_plan
from mergekit_vl.merging.chunks import Tensor
from mergekit_vl.merging.memory_bounds import flat_memory
from mergekit_vl.merging.method import info_of
from mergekit_vl.registry.plugins import load_plugins
from mergekit_vl.strategies.breadcrumbs_ties import BreadcrumbsTies
from mergekit_vl.strategies.closed_form import closed_form
from mergekit_vl.strategies.consensus import Consensus
from mergekit_vl.strategies.dare_linear import DareLinear
from mergekit_vl.strategies.dare_ties import DareTies
from mergekit_vl.strategies.della import Della
from mergekit_vl.strategies.della_linear import DellaLinear
from mergekit_vl.strategies.emr import Emr
from mergekit_vl.strategies.iso_c import IsoC
from mergekit_vl.strategies.model_stock import ModelStock
from mergekit_vl.strategies.multislerp import MultiSlerp
from mergekit_vl.strategies.nuslerp import NuSlerp
from mergekit_vl.strategies.pcb import Pcb
from mergekit_vl.strategies.sce import Sce
from mergekit_vl.strategies.tall_mask import TallMask
from mergekit_vl.strategies.ties import Ties
from mergekit_vl.strategies.tsv_m import TsvM
from mergekit_vl.testing import check_memory, held
from mergekit_vl.testing.weights import fits

CHUNK_SIZE = 1 << 17
CLASSES = [cls for entry in load_plugins().entries["strategies"].values() if info_of(cls := entry.resolve())]
VARIANTS = (
    *(Ties(trim="tensor"), BreadcrumbsTies(elect="weighted"), DareLinear(rescale="l1"), DareTies(rescale="l1")),
    *(Della(rescale="l1"), DellaLinear(rescale="l1"), Consensus(vector="ties"), TallMask(0, vector="ties"), Emr(0)),
    *(Sce(share_of="varying", merged="all", mean=True), Pcb(inter="pairs"), MultiSlerp(task_vectors=True)),
    *(
        NuSlerp(along="last"),
        NuSlerp(along="first"),
        NuSlerp(task_vectors=True),
        NuSlerp(along="last", task_vectors=True),
    ),
    *(NuSlerp(along="first", task_vectors=True), ModelStock("row"), TsvM(rank=1.0), IsoC(averaged=("*",))),
)
"""Options that take another way through the code."""


EVERY = [*(cls() for cls in CLASSES), *VARIANTS]


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_no_method_holds_more_than_the_bounds(method):
    check_memory(method, chunk_size=CHUNK_SIZE)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """ZS and A to D, a tensor of three chunks and a matrix each; memory that is counted from nothing, and little to spare."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "anonymous_memory", lambda: 0)
    monkeypatch.setattr(memory, "SPARE", 1 << 20)
    draw = np.random.default_rng(0)
    for name in ("ZS", "A", "B", "C", "D"):
        shapes = {"w": (5 * CHUNK_SIZE // 2, 1), "m": (300, 300)}
        save_file({k: draw.standard_normal(shape, np.float32) for k, shape in shapes.items()}, f"{name}.safetensors")
    return tuple(f"{name}.safetensors" for name in "ABCD")


def peak_over_limit(method, models):
    """Bytes that a merge of files took above the least --max-ram that leaves it its usual chunks."""
    info = method.describe(len(models))
    plan = MergePlan(info.name, method, models, "ZS.safetensors")
    opened = open_plan(plan)
    opened.close()
    limit = memory.chunk_memory(opened, 2, CHUNK_SIZE) + memory.SPARE
    tracemalloc.start()
    try:
        streaming.merge(plan, Path("out"), force=True, threads=2, max_ram=limit)
        return tracemalloc.get_traced_memory()[1] - limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_max_ram_is_kept_by_every_method(method, files):
    assert peak_over_limit(method, files[: max(n for n in (1, 2, 4) if fits(method, n))]) <= 0


def test_a_method_that_holds_more_than_the_bounds_is_seen(files):
    @closed_form("hoard")
    @dataclass(frozen=True)
    class Hoard:
        def merge_chunk(self, chunk, stats):
            return np.mean([chunk.tuned[0] for _ in range(80)], axis=0)

    assert held(Hoard(), 2, (3, CHUNK_SIZE), CHUNK_SIZE) > flat_memory(
        Hoard().describe(2), Tensor("w", (3, CHUNK_SIZE)), 2, CHUNK_SIZE
    )
    assert peak_over_limit(Hoard(), files[:2]) > 0
