"""What a merge holds: measured for every registered closed form, and held against the bounds that --max-ram counts with."""

import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mergekit_vl.errors import UserError
from mergekit_vl.merge_files import memory, streaming
from mergekit_vl.merge_files.plan import MergePlan, open_plan
from mergekit_vl.merging.chunks import BLOCK, Models, Tensor
from mergekit_vl.merging.engine import SERIAL, apply
from mergekit_vl.merging.memory_bounds import flat_memory, prepass_memory, whole_arrays
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


class Drawn:
    """A model that holds nothing: what is read is drawn."""

    def __init__(self, seed):
        self.seed = seed

    def read(self, name, start, stop, wide):
        return np.random.default_rng((self.seed, start)).standard_normal(stop - start, dtype=wide)


def held(method, n, shape, chunk_size=CHUNK_SIZE, wide=np.float32):
    """The most bytes that a merge of n models of one tensor held, what stays beside the chunks (histograms, Gram matrices) included."""
    tensor = Tensor("w", shape, wide=np.dtype(wide))
    labels = tuple(f"m{i}" for i in range(n))
    given = Models(Drawn(0), tuple(map(Drawn, range(1, n + 1))), (tensor,), labels)
    tracemalloc.start()
    try:
        apply(method, given, lambda chunk, merged: None, SERIAL, chunk_size)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def fits(method, n):
    try:
        method.check(Models(Drawn(0), (Drawn(1),) * n, (), tuple("ABCDEFGH"[:n])))
    except UserError:
        return False
    return True


EVERY = [*(cls() for cls in CLASSES), *VARIANTS]


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_no_method_holds_more_than_the_bounds(method):
    for n in [n for n in (1, 2, 8) if fits(method, n)]:
        info, matrix = method.describe(n), Tensor("w", (256, 256))
        if info.chunks == "tensor" and method.whole(matrix, n):
            assert held(method, n, matrix.shape) <= whole_arrays(info, matrix) * 4 * matrix.size
            continue
        for chunk_size, row, wide in ((CHUNK_SIZE, 256, np.float32), (BLOCK, 256, np.float64), (BLOCK, 1, np.float32)):
            tensor = Tensor("w", (2 * chunk_size // row + 1, row), wide=np.dtype(wide))
            bound = flat_memory(info, tensor, n, chunk_size) + prepass_memory(info, [tensor], n)
            assert held(method, n, tensor.shape, chunk_size, wide) <= bound


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

    assert held(Hoard(), 2, (3, CHUNK_SIZE)) > flat_memory(
        Hoard().describe(2), Tensor("w", (3, CHUNK_SIZE)), 2, CHUNK_SIZE
    )
    assert peak_over_limit(Hoard(), files[:2]) > 0
