"""Closed-form methods on numbers worked by hand."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

from mergekit_vl.checkpoints.dtypes import narrow, widen
from mergekit_vl.errors import UserError
from mergekit_vl.merging import task_vectors
from mergekit_vl.merging.chunks import BLOCK, Arrays, Models, Tensor
from mergekit_vl.merging.coefficients import depths
from mergekit_vl.merging.engine import SERIAL, apply, workers
from mergekit_vl.merging.method import info_of
from mergekit_vl.registry.plugins import DEFAULT_PLUGINS, load_plugins
from mergekit_vl.strategies import della
from mergekit_vl.strategies.breadcrumbs import Breadcrumbs
from mergekit_vl.strategies.breadcrumbs_ties import BreadcrumbsTies
from mergekit_vl.strategies.consensus import Consensus
from mergekit_vl.strategies.dare_linear import DareLinear
from mergekit_vl.strategies.dare_ties import DareTies
from mergekit_vl.strategies.della import Della
from mergekit_vl.strategies.della_linear import DellaLinear
from mergekit_vl.strategies.ema import Ema
from mergekit_vl.strategies.emr import Emr
from mergekit_vl.strategies.iso_c import IsoC
from mergekit_vl.strategies.iso_cts import IsoCTS
from mergekit_vl.strategies.karcher import Karcher
from mergekit_vl.strategies.linear import Linear
from mergekit_vl.strategies.lines import Lines
from mergekit_vl.strategies.model_stock import ModelStock
from mergekit_vl.strategies.monosoup import MonoSoup
from mergekit_vl.strategies.multislerp import MultiSlerp
from mergekit_vl.strategies.nuslerp import NuSlerp
from mergekit_vl.strategies.pcb import Pcb
from mergekit_vl.strategies.sce import Sce
from mergekit_vl.strategies.slerp import Slerp
from mergekit_vl.strategies.tall_mask import TallMask
from mergekit_vl.strategies.task_arithmetic import TaskArithmetic
from mergekit_vl.strategies.ties import Ties
from mergekit_vl.strategies.tsv_m import TsvM
from mergekit_vl.strategies.uniform_soup import UniformSoup
from mergekit_vl.strategies.wise_ft import WiseFT

DRAWN = [1717815503, 684245806, 2316997498]  # Philox 4x64 keyed by SHA-256 of [7, "w", 1]

DEVICES = ["cpu", "cpu:0"]
"""numpy; torch, as on a GPU, whose own tests are in test_gpu.py."""


def models(*tuned, base=None, seed=0):
    """Models of one tensor `w`, or of the tensors of dicts."""
    named = [m if isinstance(m, dict) else {"w": m} for m in tuned]
    named_base = base if base is None or isinstance(base, dict) else {"w": base}

    def source(model):
        return Arrays({k: (np.asarray(v, np.float32), "F32") for k, v in model.items()})

    deep = depths(named[0])
    tensors = tuple(Tensor(k, np.asarray(v).shape, deep[k]) for k, v in named[0].items())
    labels = tuple("ABCDEFGH"[: len(named)]) if len(named) < 9 else tuple(f"m{i}" for i in range(len(named)))
    return Models(source(named_base) if named_base else None, tuple(map(source, named)), tensors, labels, seed)


def merged(method, given, *, run=SERIAL, chunk_size=BLOCK):
    out = {t.name: np.full(t.size, np.nan, np.float32) for t in given.tensors}

    def write(chunk, values):
        out[chunk.tensor.name][chunk.start : chunk.stop] = values

    apply(method, given, write, run, chunk_size)
    out = {t.name: out[t.name].reshape(t.shape) for t in given.tensors}
    return out if len(out) > 1 else out["w"] if "w" in out else out


EVERY = (
    *(Linear(), Linear((1.0, 2.0, 3.0)), UniformSoup(), Ema(0.7), Slerp(0.3), NuSlerp((1.0, 2.0))),
    *(NuSlerp(along="last"), NuSlerp(along="first", task_vectors=True), MultiSlerp(), MultiSlerp(task_vectors=True)),
    *(
        Karcher(),
        Karcher((1.0, 2.0)),
        ModelStock(),
        ModelStock("row"),
        TaskArithmetic(0.7),
        TaskArithmetic(scales=(1.0, -0.5)),
    ),
    *(
        Ties(),
        Ties(0.3, trim="tensor", elect="weighted", weights=(1.0, 0.5)),
        DareLinear(0.4),
        DareLinear(rescale="l1"),
    ),
    *(
        DareTies(0.4),
        DareTies(0.4, rescale="l1", mean=False),
        Della(),
        Della(rescale="l1"),
        DellaLinear(rescale="none"),
    ),
    *(Breadcrumbs(), BreadcrumbsTies(0.3)),
    *(Lines(), Lines(0.2, 0.6, combine="mean", outside="depth")),
    *(Sce(), Sce(0.4, share_of="varying", mean=True), Sce(0.4, merged="all"), Sce(1.0)),
    *(Consensus(), Consensus(lambdas=(0.3, 0.8), vector="ties"), Consensus(k=1, scale=1.0)),
    *(Emr(), Emr(0), Emr(1, norm="tensors"), TallMask(), TallMask(1, vector="ties")),
    *(Pcb(), Pcb(0.4, weights=(1.2, 0.9), inter="pairs"), Pcb(1.0)),
    *(TsvM(), TsvM(0.5, rank=0.8), IsoC(), IsoC(0.5, averaged=("*",)), IsoCTS(), IsoCTS(0.5)),
)
"""At least every closed form, and the variants that take another way through the code; for a base and two tuned models."""


def test_every_closed_form_is_tested():
    registered = {e.resolve() for e in load_plugins().entries["strategies"].values() if e.owner in DEFAULT_PLUGINS}
    assert {cls for cls in registered if info_of(cls)} == {type(m) for m in EVERY} | {MonoSoup, WiseFT}


@pytest.mark.parametrize(
    ("method", "base", "tuned", "expected"),
    [
        (Linear(), None, [[0, 1], [4, 5]], [2, 3]),
        (Linear(), [1, 1], [[0, 1], [5, 4]], [2, 2]),
        (Linear((1.0, 3.0)), None, [[0, 1], [4, 5]], [3, 4]),
        (Linear((1.0, 3.0), normalise=False), None, [[0, 1], [4, 5]], [12, 16]),
        (WiseFT(0.25), [4, 8], [[0, 4]], [3, 7]),
        (UniformSoup(), [9, 9], [[0, 1], [4, 5]], [2, 3]),
        (Ema(0.5), None, [[0], [4], [8]], [5]),  # (0 + 4) / 2 = 2, (2 + 8) / 2
        (Ema(0.0), None, [[0], [4], [8]], [8]),
        (Ema(0.25), None, [[4], [8], [0]], [1.75]),  # 1 + 6 = 7, then a quarter of it
        (Slerp(1 / 3), None, [[1, 0], [0, 1]], [0.8660254, 0.5]),
        (Slerp(0.5), [2, 0], [[0, 4]], [1.4142136, 2.8284271]),
        (
            Slerp(0.25),
            None,
            [[2, 0], [-1.5, 2.5980762]],
            [1.4433757, 1.5],
        ),  # 120 degrees: (2 sin 90 + 3 sin 30) / sin 120
        (Slerp(0.5), None, [[1, 1], [2, 2]], [1.5, 1.5]),  # parallel: the line
        (Slerp(0.25), None, [[1, 0], [-3, 0]], [0, 0]),  # opposite: the line
        (Slerp(0.5, line_above=0.5), None, [[1, 0], [0.6, 0.8]], [0.8, 0.4]),  # cosine 0.6
        (NuSlerp((1.0, 3.0)), None, [[1, 0], [0, 1]], [0.3826834, 0.9238795]),  # sin and cos of 22.5 degrees
        (NuSlerp(along="last"), None, [[[1, 0], [0, 2]], [[0, 1], [2, 0]]], [[0.7071068] * 2, [1.4142136] * 2]),
        (NuSlerp(along="first"), None, [[[1, 0], [0, 2]], [[0, 2], [1, 0]]], [[0.7071068, 1.4142136]] * 2),
        # at a quarter of 120 and of 60 degrees: the points at 30 degrees of length 1, and at 15 of length 2
        (
            NuSlerp((3.0, 1.0), along="last"),
            None,
            [[[1, 0], [2, 0]], [[-0.5, 0.8660254], [1, 1.7320508]]],
            [[0.8660254, 0.5], [1.9318517, 0.5176381]],
        ),
        (
            NuSlerp((3.0, 1.0), along="first"),
            None,
            [[[1, 2], [0, 0]], [[-0.5, 1], [0.8660254, 1.7320508]]],
            [[0.8660254, 1.9318517], [0.5, 0.5176381]],
        ),
        (
            NuSlerp(along="last"),
            None,
            [[[1, 0], [0, 0]], [[-3, 0], [2, 4]]],
            [[-1, 0], [1, 2]],
        ),  # opposite, and zero: the line
        (NuSlerp(task_vectors=True), [1, 1], [[2, 1], [1, 2]], [1.7071068, 1.7071068]),
        (
            NuSlerp((3.0, 1.0), along="last", task_vectors=True),
            [[1, 2]],
            [[[2, 2]], [[0.5, 2.8660254]]],
            [[1.8660254, 2.5]],
        ),
        (MultiSlerp(), None, [[2, 0], [0, 4]], [2.1213203, 2.1213203]),  # length 3 at 45 degrees
        (MultiSlerp((3.0, 1.0)), None, [[1, 0], [0, 1]], [0.9486833, 0.3162278]),  # (3, 1) / sqrt(10)
        (MultiSlerp((3.0, 1.0), normalise=False), None, [[1, 0], [0, 1]], [3.7947332, 1.2649111]),  # four times as long
        (MultiSlerp(), None, [[2, 0], [2, 3.4641016]], [2.5980762, 1.5]),  # 2 at 0 and 4 at 60 degrees: 3 at 30
        (MultiSlerp(task_vectors=True), [1, 1], [[4, 1], [1, 4]], [3.1213203, 3.1213203]),
        (MultiSlerp(), None, [[1, 0], [-3, 0]], [-1, 0]),  # opposite: the line
        (Karcher(), None, [[1, 0], [0.8660254, 0.5], [0.5, 0.8660254]], [0.8660254, 0.5]),  # 0, 30, 60 degrees
        (Karcher((1.0, 3.0)), None, [[1, 0], [0.1736482, 0.9848078]], [0.5, 0.8660254]),  # 0 and 80: at 60
        (Karcher(), None, [[1, 0], [0, 3]], [1.4142136, 1.4142136]),  # length 2 at 45 degrees
        (Karcher((3.0, 1.0)), None, [[0, 0], [6, 8]], [1.5, 2]),  # a quarter of 10 long; zero has no direction
        (Karcher(), None, [[1, 0], [-3, 0]], [-1, 0]),  # opposite: the mean
        (ModelStock(), [0, 0], [[1, 0], [0, 1]], [0, 0]),  # a right angle: the base
        (ModelStock(), [0, 0], [[1, 0], [1, 1]], [0.8284271, 0.4142136]),  # t = 2 c / (1 + c), c = cos 45
        (ModelStock(), [1, 1], [[2, 1], [2, 1], [2, 1]], [2, 1]),  # no angle: the mean
        (ModelStock(), [1, 2], [[3, 2], [0, 2]], [1, 2]),  # opposite: the base
        # three of 60 degrees: t = 3/2 / (1 + 2/2), of a mean of 2/3
        (ModelStock(), [1, 1, 1], [[2, 2, 1], [2, 1, 2], [1, 2, 2]], [1.5, 1.5, 1.5]),
        (ModelStock("row"), [[1, 1, 1]], [[[2, 2, 1]], [[2, 1, 2]], [[1, 2, 2]]], [[1.5, 1.5, 1.5]]),
        (ModelStock("row"), [[0, 0], [0, 0]], [[[1, 0], [1, 0]], [[0, 1], [1, 1]]], [[0, 0], [0.8284271, 0.4142136]]),
        (Ties(2 / 3), [1, 1, 1], [[5, 2, -1], [-2, 3, 1.5]], [5, 3, -1]),  # trimmed (4, 0, -2) and (-3, 2, 0)
        (Ties(2 / 3, weights=(1.0, 2.0)), [0] * 3, [[4, 1, -2], [-3, 2, 0.5]], [4, 2, -2]),
        (Ties(2 / 3, weights=(1.0, 2.0), elect="weighted"), [0] * 3, [[4, 1, -2], [-3, 2, 0.5]], [-3, 2, -2]),
        (Ties(2 / 3, weights=(1.0, 2.0), mean=False), [0] * 3, [[4, 1, -2], [-3, 2, 0.5]], [4, 4, -2]),
        (Ties(1.0, weights=(1.0, 2.0)), [0, 1], [[1, 1], [4, 2]], [3, 2]),  # (1 + 2 * 4) / 3; zero has no part
        (Ties(1.0, trim="tensor", scale=0.5), [2, 2], [[3, 2], [5, 4]], [3, 3]),
        (Ties(0.0), [1, 2], [[3, 5]], [1, 2]),
        (Ties(1.0, scale=0.5), [0, 0], [[1, 2], [3, -4]], [1, -2]),  # mean of 1 and 3; -4 outweighs 2
        (Ties(1.0), [0, 0], [[1, 2], [-1, 4]], [0, 3]),  # a sum of zero elects nobody
        (Ties(densities=(0.5, 1.0)), [0, 0], [[1, 4], [2, 2]], [2, 3]),
        (Ties(0.5), [0] * 4, [[1, -1, 1, 0]], [1, -1, 1, 0]),  # equal magnitudes stay together
        (DareLinear(1.0, scale=0.5), [1, 0], [[2, 0], [1, 4]], [1.5, 2]),
        (DareLinear(1 - 1e-11, scale=1.0, weights=(1.0, 2.0)), [1], [[2], [4]], [8]),
        (DareTies(1.0), [0, 0], [[1, 2], [3, -4]], [2, -4]),
        (DareTies(1.0, weights=(1.0, 2.0), scale=0.5), [2, 2], [[3, 3], [6, 0]], [3.5, 1]),  # 9 / 3; -2 outweighs 1
        (DareTies(1.0, weights=(1.0, 3.0), elect="weighted", mean=False), [0], [[-2], [1]], [3]),
        (Breadcrumbs(0.5, gamma=0.2, scale=1.0), [0] * 10, [range(1, 11)], [0, 0, 0, 4, 5, 6, 7, 8, 0, 0]),
        (Breadcrumbs(1.0, gamma=0.0, weights=(1.0, 2.0), scale=0.5), [2], [[3], [6]], [6.5]),
        (Breadcrumbs(0.5, gamma=0.25, scale=1.0), [2] * 4, [[3, 4, -1, 6]], [2, 4, -1, 2]),
        (BreadcrumbsTies(1.0, gamma=0.0, weights=(1.0, 2.0), scale=0.5), [2], [[3], [6]], [3.5]),
        (BreadcrumbsTies(0.5, gamma=0.25), [0] * 4, [[1, 2, 3, 4], [4, -3, 2, 1]], [0, -3, 2.5, 0]),
        (Lines(0.25), [4, 8], [[0, 4]], [3, 7]),  # in no block: alpha
        (Lines(), [0, 0], [[2, 0], [4, 2]], [3, 1]),  # half of the sum
        (Lines(0.5, combine="mean"), [0, 0], [[2, 0], [4, 2]], [1.5, 0.5]),
        (Lines(0.5, 0.25, outside="depth"), [0, 0], [[2, 0], [4, 2]], [4.5, 1.5]),  # behind the last block
        (Sce(0.5), [0] * 4, [[1, 4, 2, 3], [1, -2, 4, 3]], [0, 2, 3, 0]),  # variances 0, 9, 1, 0; both weigh 20 / 40
        (
            Sce(2 / 3),
            [1] * 3,
            [[2, 4, 3], [2, 0, -3]],
            [1, 2.3, -1.2666667],
        ),  # of (0, 3, 2) and (0, -1, -4): 13 / 30, 17 / 30
        (Sce(2 / 3, mean=True), [0] * 3, [[1, 3, 2], [1, -1, -4]], [0, 3, -4]),
        (Sce(2 / 3, mean=True, merged="all"), [0] * 3, [[1, 3, 2], [1, -1, -4]], [1, 3, -4]),
        (Sce(0.5, share_of="varying"), [0] * 3, [[1, 3, 2], [1, -1, -4]], [0, 0, -3.2]),  # one of two; 4 / 20, 16 / 20
        (Sce(0.4, share_of="varying"), [0] * 3, [[1, 3, 2], [1, -1, -4]], [0, 0, 0]),  # none of two
        (Sce(0.5), [0] * 3, [[1, 3, 2], [1, -1, -4]], [0, 0, -3.2]),  # one of three
        (Sce(1.0), [0, 0], [[1e-2, 0], [0, 2e-2]], [2e-3, 1.6e-2]),
        (Sce(1.0, equal_below=1e-3), [0, 0], [[1e-2, 0], [0, 2e-2]], [5e-3, 1e-2]),
        (Sce(0.1), [0] * 3, [[1, 3, 2]] * 3, [1, 3, 2]),  # no variance: equal to the threshold, all stay
        # tasks (4, 1, 3) and (2, -1, -1), their sum (6, 0, 2); the rest that each compares with is the other task's vector
        (Consensus(1.0, scale=0.5), [1, 1, 1], [[5, 2, 4], [3, 0, 0]], [1, 1, 1]),
        (Consensus(0.5, scale=0.5), [1, 1, 1], [[5, 2, 4], [3, 0, 0]], [4, 1, 1]),  # 2 >= 4 / 2, but 1 < 3 / 2
        (Consensus(1.0, k=1, scale=0.5), [1, 1, 1], [[5, 2, 4], [3, 0, 0]], [4, 1, 2]),
        (Consensus(9.0, k=0, scale=1.0), [1, 1, 1], [[5, 2, 4], [3, 0, 0]], [7, 1, 3]),  # task arithmetic
        (Consensus(lambdas=(1.0, 0.3), scale=1.0), [0] * 3, [[4, 1, 3], [2, -1, -1]], [6, 0, 2]),  # 1 >= 0.3 * 3
        (Consensus(9.0, k=1, scale=1.0), [0] * 3, [[4, 1, 3], [2, -1, -1]], [0, 0, 0]),  # catastrophic
        # trimmed (4, 0, 3) and (2, 0, -1): the disjoint sum (6, 0, 3); A uses its elements, B the first at 2 >= 0.5 * 4
        (Consensus(0.5, vector="ties", density=2 / 3, scale=1.0), [0] * 3, [[4, 1, 3], [2, -0.5, -1]], [6, 0, 0]),
        (Consensus(0.5, k=1, vector="ties", density=2 / 3, scale=1.0), [0] * 3, [[4, 1, 3], [2, -0.5, -1]], [6, 0, 3]),
        (Consensus(1.0, scale=0.5), [1, 1], [[2, 4]] * 2, [2, 4]),  # the same task twice uses all of itself
        # (4, 1, -2, 0) and (2, -3, -1, 1): signs + - - +, largest 4, 3, 2, 1
        (Emr(), [1] * 4, [[5, 2, -1, 1], [3, -2, 0, 2]], [5, -2, -1, 2]),
        (Emr("A"), [0] * 4, [[4, 1, -2, 0], [2, -3, -1, 1]], [14 / 3, 0, -7 / 3, 0]),  # 7 over 6
        (Emr(1), [0] * 4, [[4, 1, -2, 0], [2, -3, -1, 1]], [2.8, -2.1, -1.4, 0.7]),  # 7 over 10
        (Emr(0), [0, 0], [[1, 2], [-1, 2]], [0, 3]),  # a sum of zero elects nobody
        (Emr(1), [0, 0], [[3, -3], [-1, 1]], [0, 0]),  # outvoted everywhere
        (Emr(0), [0, 0, 0], [[1, -2, 3]], [1, -2, 3]),  # one model is itself
        (Emr(1), [0, 0, 0], [[1, -2, 3]] * 3, [1, -2, 3]),
        (TallMask(0, 1.0), [1] * 3, [[5, 2, 4], [3, 0, 0]], [7, 1, 3]),
        (TallMask("B", 0.5), [1] * 3, [[5, 2, 4], [3, 0, 0]], [7, 1, 1]),  # 2 >= 4 / 2, but 1 < 3 / 2
        (TallMask(1, lambdas=(0.1, 1.0)), [1] * 3, [[5, 2, 4], [3, 0, 0]], [1, 1, 1]),
        (TallMask(scale=0.5), [1] * 3, [[5, 2, 4], [3, 0, 0]], [4, 1, 2]),
        (TallMask(0, vector="ties", density=2 / 3), [0] * 3, [[4, 1, 3], [2, -0.5, -1]], [6, 0, 3]),
        # (2, 1, 0) and (0, 3, 1) have the places (1, 1/2, 0) and (0, 1, 1/3) and the sum (2, 4, 1): balances e^2 tanh 4, e^0.5 tanh 4, 0
        # and 0, e^2 tanh 12, e^(2/9) tanh 1, so that the second element weighs e^-1.5 and 1
        (Pcb(1.0, clip=0.0), [0] * 3, [[2, 1, 0], [0, 3, 1]], [2, 2.6351489, 1]),
        (Pcb(1.0, clip=0.0, scale=0.5), [1] * 3, [[3, 2, 1], [1, 4, 2]], [2, 2.3175745, 1.5]),
        (Pcb(1.0, weights=(1.0, 2.0), clip=0.0), [0] * 3, [[2, 1, 0], [0, 3, 1]], [2, 5.0878720, 2]),
        (Pcb(2 / 3, clip=0.0), [0] * 3, [[2, 1, 0], [0, 3, 1]], [2, 3, 0]),  # the second of two weighs nothing
        # against the sum (2, -2, 1) the second element of (2, 1, 0) has a negative balance; the third then weighs 0.1771227 and 0.1287212
        (Pcb(1.0, clip=0.0), [0] * 3, [[2, 1, 0], [0, -3, 1]], [2, -3, 0.4208722]),
        # e^2 tanh 1 and e^0.5 (tanh 1/4 + tanh 1/2): the second element weighs 0.2071457 and 1
        (Pcb(1.0, clip=0.0, inter="pairs"), [0] * 3, [[2, 1, 0], [0, 3, 1]], [2, 2.6568009, 1]),
        (Pcb(1.0, clip=0.1), [0] * 10, [range(1, 11)] * 2, [0, 2, 3, 4, 5, 6, 7, 8, 9, 9]),
        (Pcb(1.0, clip=0.0), [0] * 3, [[2, 1, 0], [0, 0, 0]], [2, 1, 0]),  # the base takes no part
        (Pcb(0.0), [1] * 3, [[2, 1, 0], [0, 3, 1]], [1] * 3),
        (Pcb(0.5, clip=0.0), [0] * 2, [[3, 3], [1, 1]], [2, 2]),  # one balance for all: each weighs 1
        # for a 2 x 2 matrix the mean of the singular values times U V^T is (M +- its cofactors) / 2, with the sign of det M
        (IsoC(), [[0, 0], [0, 0]], [[[3, 0], [4, 5]]], [[4, -2], [2, 4]]),
        (IsoC(), [[1, 0], [0, 0]], [[[3, 2], [0, -1]], [[1, 2], [0, -2]]], [[3.5, 2], [2, -2.5]]),  # M = 2 4 / 0 -3
        (IsoC(0.5), [[0] * 3] * 2, [[[3, 0, 0], [4, 5, 0]]], [[2, -1, 0], [1, 2, 0]]),
        (IsoC(), [[0, 0], [0, 0]], [[[3, 4], [0, 0]]], [[3, 4], [0, 0]]),  # one singular value, which is its own mean
        (IsoC(0.5), [0, 0], [[2, 4], [4, 8]], [1.5, 3]),  # no matrix: half of the mean
        (IsoC(0.5), [1, 1], [[2, 4], [4, 8]], [2, 3.5]),
        (TsvM(0.5), [1, 1], [[2, 4], [4, 8]], [2, 3.5]),
        (IsoCTS(scale=0.5), [1, 1], [[2, 4], [4, 8]], [2, 3.5]),
        (IsoC(averaged=("w",)), [[0, 0], [0, 0]], [[[3, 0], [4, 5]]], [[3, 0], [4, 5]]),
        (IsoC(), [[[0]] * 2] * 2, [[[[3], [0]], [[4], [5]]]], [[[3], [0]], [[4], [5]]]),  # three axes
        # the entropy of (4, 1) / 5 is 0.5004 and exp of it 1.65, so both directions are high, and the update stays
        (MonoSoup(), np.eye(2), [[[5, 0], [0, 2]]], [[5, 0], [0, 2]]),
        # (8, 1, 0.5) / 9.5: exp of the entropy 0.5367 is 1.71, so k = 2; rho = 1/256, 1 - P = 1/261, w = rho + 255/256 / root of 261
        (MonoSoup(), np.zeros((3, 3)), [np.diag([8, 1, 0.5])], np.diag([7.4754968, 0.9344371, 0.0327815])),
        # k = 1 holds 16/17: rho = 1/16, 1 - P = 1/17, w = 1/16 + 15/16 / root of 17
        (MonoSoup(0.8), np.eye(2), [[[5, 0], [0, 2]]], [[1 + 4 * 0.7101229, 0], [0, 1.2898771]]),
        (
            MonoSoup(0.8),
            [[[[0]], [[0]]]] * 2,
            [[[[[4]], [[0]]], [[[0]], [[1]]]]],
            [[[[2.8404914]], [[0]]], [[[0]], [[0.2898771]]]],
        ),
        (MonoSoup(0.8, averaged=("w",)), np.eye(2), [[[5, 0], [0, 2]]], [[5, 0], [0, 2]]),
        (MonoSoup(), [1, 2], [[3, 5]], [3, 5]),  # a vector is the tuned model's
        (MonoSoup(), np.ones((2, 2)), [np.ones((2, 2))], np.ones((2, 2))),
        (TsvM(), np.zeros((2, 2)), [np.diag([3, 1]), np.diag([1, 2])], np.diag([3, 2])),
        # (1, 0) and (0.6, 0.8) made orthonormal: (3, -1) and (1, 3), over the root of 10
        (
            TsvM(),
            np.zeros((2, 2)),
            [[[2, 0], [0, 0]], [[0, 0.6], [0, 0.8]]],
            [[1.8973666, 0.3162278], [-0.6324555, 0.9486833]],
        ),
        (
            TsvM(0.5),
            np.ones((2, 2)),
            [[[3, 1], [1, 1]], [[1, 1.6], [1, 1.8]]],
            [[1.9486833, 1.1581139], [0.6837722, 1.4743416]],
        ),
        (TsvM(), np.zeros((2, 2)), [np.diag([3, 1])] * 2, np.diag([3, 0])),  # the same vectors twice: their mean
        (TsvM(rank=1.0), np.zeros((2, 2)), [np.diag([3, 1])] * 2, np.diag([3, 1])),
        (TsvM(), [[0, 0]], [[[2, 4]], [[4, 8]]], [[3, 6]]),  # one singular value for two tasks: averaged
        (IsoCTS(0.4), np.zeros((3, 3)), [np.diag([4, 2, 0]), np.diag([4, -1, 3])], np.eye(3) * 13 / 3),  # of 8; 2; 3
        (IsoCTS(1.0), np.zeros((3, 3)), [np.diag([4, 2, 0]), np.diag([4, -1, 3])], np.eye(3) * 4),  # of 8, 1, 3: Iso-C
        (
            IsoCTS(0.0),
            np.zeros((2, 2)),
            [np.diag([3, 1]), [[0, 0.6], [0, 0.8]]],
            [[1.8973666, 0.6324555], [-0.6324555, 1.8973666]],
        ),
        (TaskArithmetic(0.5), [1, 0], [[2, 0], [1, 4]], [1.5, 2]),
        (TaskArithmetic(-1.0), [1, 2], [[2, 4]], [0, 0]),  # negation
        (TaskArithmetic(scales=(-1.0, 1.0, 1.0)), [1, 1], [[2, 1], [1, 3], [4, 1]], [3, 3]),  # analogy
    ],
)
def test_by_hand(method, base, tuned, expected):
    for device in DEVICES if method.info.chunks == "tensor" else ("cpu",):
        given = replace(models(*tuned, base=base), device=device)
        np.testing.assert_allclose(merged(method, given), expected, rtol=1e-6, atol=1e-6)


def test_lines_scales_each_tower_from_its_first_block_to_its_last():
    names = ["conv1", "visual.blocks.0.w", "visual.blocks.1.w", "visual.blocks.2.w", "h.0.w", "h.1.w", "visual.proj"]
    zeros = {name: [0.0] for name in names}
    ones, threes = ({name: [value] for name in names} for value in (1.0, 3.0))

    def factors(method, *tuned):
        return [round(float(v[0]), 6) for v in merged(method, models(*tuned, base=zeros)).values()]

    assert factors(Lines(0.2, 0.6), ones) == [0.2, 0.2, 0.5, 0.8, 0.2, 0.8, 0.2]
    assert factors(Lines(0.2, 0.6, outside="depth"), ones) == [0.2, 0.2, 0.5, 0.8, 0.2, 0.8, 0.8]
    assert factors(Lines(0.2), ones) == [0.2, 0.2, 0.6, 1.0, 0.2, 1.0, 0.2]
    assert factors(Lines(), ones, threes) == [2, 2, 3, 4, 2, 4, 2]  # from the mean to the sum
    assert factors(Lines(combine="mean"), ones, threes) == [1, 1, 1.5, 2, 1, 2, 1]


@settings(deadline=None, max_examples=10, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 4))
def test_singular_methods_by_another_way(seed, n):
    """The nearest orthonormal matrix to C is C (C^T C)^-1/2, here by eigenvalues; the singular vectors by those of D^T D."""
    base, tuned = random_models(seed, n=n)
    name, given = "visual.blocks.0.w", models(*tuned, base=base)
    start = np.float32(base[name])
    tasks = [(np.float32(t[name]) - start).astype(np.float64) for t in tuned]

    def rows_made_orthonormal(rows):
        values, vectors = np.linalg.eigh(rows @ rows.T)
        return (vectors * values**-0.5) @ vectors.T @ rows

    def first(matrix, count):
        values, vectors = np.linalg.eigh(matrix @ matrix.T)
        left = vectors[:, ::-1][:, :count]
        values = np.sqrt(values[::-1][:count])
        return left, values, left.T @ matrix / values[:, None]

    def put_together(parts):
        u, s, vt = (np.concatenate(each, axis) for each, axis in zip(zip(*parts), (1, 0, 0)))
        return rows_made_orthonormal(u.T).T, s, rows_made_orthonormal(vt)

    total = sum(tasks)
    singular = np.sqrt(np.linalg.eigvalsh(total @ total.T))
    iso_c = singular.mean() * rows_made_orthonormal(total)
    u, s, vt = put_together([first(task, 12 // n) for task in tasks])
    tsv_m = (u * s) @ vt
    own = round(6 / n)
    common = first(total, 12 - n * own)
    apart = [task - common[0] @ (common[0].T @ task) for task in tasks]
    u, s, vt = put_together([first(task, own) for task in apart] + [common])
    iso_cts = s.mean() * u @ vt
    for method, expected in ((IsoC(), iso_c), (TsvM(), tsv_m), (IsoCTS(0.5), iso_cts)):
        for device in DEVICES:
            found = merged(method, replace(given, device=device))[name]
            np.testing.assert_allclose(found, start + expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [TsvM(), IsoC(), IsoCTS()], ids=str)
def test_an_svd_has_one_thread_so_that_its_bits_are_the_same_on_any_machine(method, monkeypatch):
    seen, plain = [], np.linalg.svd

    def svd(*given, **options):
        seen.extend(lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas")
        return plain(*given, **options)

    monkeypatch.setattr(np.linalg, "svd", svd)
    base, tuned = random_models(1, n=2)
    with threadpool_limits(2, user_api="blas"):
        merged(method, models(*tuned, base=base))
        assert {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"} == {2}
    assert seen and set(seen) == {1}


def test_bfloat16_rounds_to_nearest_even():
    values = np.array([1.0, 1.00390625, 1.01171875, 1.004, -1.00390625, np.inf, np.nan, 3.4e38], np.float32)
    stored = narrow(values, "BF16")
    # 1 + 2^-8 lies between 1 (even) and 1 + 2^-7; 1 + 3 * 2^-8 between 1 + 2^-7 and 1 + 2^-6 (even)
    assert [hex(x) for x in stored] == ["0x3f80", "0x3f80", "0x3f82", "0x3f81", "0xbf80", "0x7f80", "0x7fc0", "0x7f80"]
    back = widen(stored, "BF16", np.dtype(np.float32))
    np.testing.assert_array_equal(back[:4], [1, 1, 1.015625, 1.0078125])
    half = narrow(np.array([1.00048828125, 1.00146484375], np.float32), "F16")  # 1 + 2^-11, 1 + 3 * 2^-11
    np.testing.assert_array_equal(half.astype(np.float32), [1.0, 1.001953125])


def test_coefficients_over_depth_and_by_name():
    names = [f"visual.transformer.resblocks.{i}.attn.in_proj_weight" for i in range(3)]
    names += ["visual.conv1.weight", "visual.proj", "transformer.resblocks.0.mlp.c_fc.weight", "token_embedding.weight"]
    ones = {name: [1.0] for name in names}
    given = models(ones, base={name: [0.0] for name in names})
    out = merged(WiseFT((0.0, 0.5, 1.0)), given)
    assert [float(out[n][0]) for n in names] == [0.0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.0]
    out = merged(WiseFT((0.0, 1.0, 4.0, 16.0)), given)  # the middle block lies halfway from 1 to 4
    assert [float(out[n][0]) for n in names] == [0.0, 2.5, 16.0, 0.0, 16.0, 0.0, 0.0]
    out = merged(WiseFT({"attn": (0.2, 0.4), "visual": 0.5, "text": 1.0}), given)
    assert [float(out[n][0]) for n in names] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.5, 1.0, 1.0])
    out = merged(WiseFT({"*.resblocks.0.*": 0.25, "*": 0.75}), given)
    assert [float(out[n][0]) for n in names] == [0.25, 0.75, 0.75, 0.75, 0.75, 0.25, 0.75]
    with pytest.raises(UserError, match="no filter covers visual.conv1.weight"):
        merged(WiseFT({"attn": 0.5}), given)
    with pytest.raises(UserError, match="the filter 'vizual' covers no tensor"):
        merged(WiseFT({"vizual": 0.5, "*": 0}), given)


def test_an_error_of_a_thread_stops_the_rest():
    done = []

    def job(i):
        done.append(i)
        if i == 3:
            raise UserError("three")

    with pytest.raises(UserError, match="three"):
        workers(2)(job, range(100_000))
    assert len(done) < 100_000
    assert workers(3)(lambda i: i * i, range(50)) == [i * i for i in range(50)]


def random_models(seed, *, scale=0.05, n=2, size=1):
    """A base and n tuned models near it: a matrix, a vector and a scalar, of more than one block each where size > 1."""
    rng = np.random.default_rng(seed)
    shapes = {"visual.blocks.0.w": (12 * size, 70), "visual.blocks.1.b": (90 * size,), "logit_scale": ()}
    base = {k: rng.standard_normal(s) for k, s in shapes.items()}
    tuned = [{k: v + scale * rng.standard_normal(v.shape) for k, v in base.items()} for _ in range(n)]
    return base, tuned


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_pieces_and_threads_do_not_matter(method):
    base, tuned = random_models(1, size=200)
    given = models(*tuned, base=base, seed=3)
    first = merged(method, given, chunk_size=BLOCK)
    for run, chunk_size in ((SERIAL, 4 * BLOCK), (workers(3), 2 * BLOCK)):
        again = merged(method, given, run=run, chunk_size=chunk_size)
        for name in first:
            assert first[name].tobytes() == again[name].tobytes(), name


@pytest.mark.parametrize("method", [m for m in EVERY if getattr(m, "inter", None) != "sum"], ids=str)
@settings(deadline=None, max_examples=5, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), power=st.sampled_from([-6, -1, 3, 10]))
def test_scaling_every_model_scales_the_merge(method, seed, power):
    base, tuned = random_models(seed)
    by = 2.0**power
    plain = merged(method, models(*tuned, base=base))
    scaled = merged(
        method, models(*({k: by * v for k, v in t.items()} for t in tuned), base={k: by * v for k, v in base.items()})
    )
    for name in plain:
        np.testing.assert_allclose(scaled[name], by * plain[name], rtol=1e-6)


SYMMETRIC = [
    Linear(),
    UniformSoup(),
    MultiSlerp(),
    Karcher(),
    ModelStock(),
    ModelStock("row"),
    TaskArithmetic(0.7),
    Ties(),
]
SYMMETRIC += [Consensus(), Consensus(vector="ties", k=3)]
SYMMETRIC += [Emr(), TallMask()]
SYMMETRIC += [Pcb(0.5), Pcb(0.5, inter="pairs")]
SYMMETRIC += [Lines(0.2), Sce(0.3), Sce(0.3, share_of="varying", mean=True), TsvM(), IsoC(), IsoCTS()]
SYMMETRIC += [Ties(0.3, trim="tensor"), DareTies(1.0), DareLinear(1.0), Breadcrumbs(), BreadcrumbsTies(0.3)]


@pytest.mark.parametrize("method", SYMMETRIC, ids=str)
@settings(deadline=None, max_examples=5, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), order=st.permutations(range(4)))
def test_the_order_of_the_models_does_not_matter(method, seed, order):
    base, tuned = random_models(seed, n=4)
    first = merged(method, models(*tuned, base=base))
    again = merged(method, models(*(tuned[i] for i in order), base=base))
    for name in first:
        np.testing.assert_allclose(first[name], again[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [m for m in EVERY if getattr(m, "normalise", None) is not False], ids=str)
@settings(deadline=None, max_examples=3, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_identical_models_give_themselves_back(method, seed):
    base, _ = random_models(seed)
    out = merged(method, models(base, base, base=base))
    for name, value in base.items():
        np.testing.assert_allclose(out[name], np.float32(value), rtol=1e-6)


@settings(deadline=None, max_examples=10, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_endpoints_are_exact(seed):
    base, (tuned,) = random_models(seed, n=1)
    start = [
        (WiseFT(0.0), 0),
        (WiseFT(1.0), 1),
        (Slerp(0.0), 0),
        (Slerp(1.0), 1),
        (Linear((1.0, 0.0)), 0),
        (Linear((0.0, 2.0)), 1),
    ]
    start += [(TaskArithmetic(0.0), 0), (TaskArithmetic(1.0), 1), (Ties(scale=0.0), 0), (DareTies(scale=0.0), 0)]
    for method, end in start:
        out = merged(method, models(tuned, base=base))
        for name in base:
            np.testing.assert_array_equal(out[name], np.float32((base, tuned)[end][name]), err_msg=str(method))


@pytest.mark.parametrize(
    "method",
    [
        Lines(0.0, 0.0),
        Sce(scale=0.0),
        Sce(0.0),
        Consensus(scale=0.0),
        Pcb(scale=0.0),
        TsvM(0.0),
        IsoC(0.0),
        IsoCTS(scale=0.0),
    ],
    ids=str,
)
def test_the_coefficient_zero_gives_the_base(method):
    base, tuned = random_models(2)
    for name, values in merged(method, models(*tuned, base=base)).items():
        np.testing.assert_array_equal(values, np.float32(base[name]))


def test_lines_by_depth_is_a_gradient():
    names = [f"visual.blocks.{i}.w" for i in range(4)] + ["conv1", "proj"]
    rng = np.random.default_rng(4)
    base, *tuned = ({name: rng.standard_normal(9) for name in names} for _ in range(3))
    ours = merged(Lines(0.2, 0.7, outside="depth"), models(*tuned, base=base))
    same = merged(TaskArithmetic((0.2, 0.9)), models(*tuned, base=base))
    for name in names:
        np.testing.assert_allclose(ours[name], same[name], rtol=1e-6, atol=1e-6)


def test_emrs_rescaler_is_of_the_whole_model_or_of_its_tensors_means():
    base = {"u": [0.0], "v": [0.0, 0.0]}
    tuned = {"u": [1.0], "v": [2.0, 4.0]}, {"u": [-3.0], "v": [2.0, 0.0]}
    whole, means = (merged(Emr(0, norm), models(*tuned, base=base)) for norm in ("model", "tensors"))
    assert whole["u"].tolist() == means["u"].tolist() == [0]  # outvoted by -3
    np.testing.assert_allclose(whole["v"], [14 / 6, 28 / 6], rtol=1e-6)  # 1 + 6 over 6
    np.testing.assert_allclose(means["v"], [8 / 3, 16 / 3], rtol=1e-6)  # 1 + 3 over 3


def test_iso_cts_without_subspaces_of_the_tasks_is_iso_c():
    base, tuned = random_models(5, n=3)
    given = models(*tuned, base=base)
    ours, same = merged(IsoCTS(1.0, 0.4), given), merged(IsoC(0.4), given)
    for name in base:
        np.testing.assert_allclose(ours[name], same[name], rtol=1e-6)


def test_the_elements_that_vary_most_are_the_exact_order_statistic():
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((3, 3000)).astype(np.float32)
    out = merged(Sce(0.1), models(*vectors, base=np.zeros(3000)))
    expected = np.argsort(vectors.astype(np.float64).var(0))[-300:]
    assert sorted(expected) == np.flatnonzero(out).tolist()


@settings(deadline=None, max_examples=10, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 8), density=st.floats(0.05, 1), small=st.booleans())
def test_pcb_on_whole_vectors_in_float64(seed, n, density, small):
    """The steps of the paper one after the other on sorted vectors; three tensors here are one vector there."""
    base, tuned = random_models(seed, n=n, scale=1e-3 if small else 0.5)
    start = {name: np.float32(values) for name, values in base.items()}
    flat = np.array([np.concatenate([(np.float32(t[k]) - start[k]).ravel() for k in start]) for t in tuned], np.float64)
    d = flat.shape[1]

    def clipped(rows, low, high):
        rising = np.sort(rows, 1)
        return np.clip(rows, rising[:, [low]], rising[:, [high]])

    def from_0_to_1(rows):
        low = rows.min(1, keepdims=True)
        return (rows - low) / (rows.max(1, keepdims=True) - low)

    sizes = clipped(np.abs(flat), int(d * 0.01), int(d * 0.99 - 1))
    balance = np.exp(n * from_0_to_1(sizes) ** 2) * np.tanh(flat * flat.sum(0))
    weights = from_0_to_1(clipped(balance, int((1 - density) * d), d - 1))
    expected = (np.sign(flat) * sizes * weights).sum(0) / np.maximum(weights.sum(0), 1e-12)
    out = merged(Pcb(density, clip=0.01), models(*tuned, base=base))
    ours = np.concatenate([(out[k] - start[k]).ravel() for k in start])
    certain = weights.sum(0) > 1e-4  # a weight that is all rounding decides between the models
    np.testing.assert_allclose(ours[certain], expected[certain], rtol=1e-3, atol=1e-6)
    assert np.all(ours[weights.sum(0) == 0] == 0)


def test_only_matrices_are_read_whole():
    base, tuned = random_models(1, size=200)
    given = models(*tuned, base=base)
    sizes = {p.tensor.name: p.size for p in given.chunks("tensor", BLOCK, whole=IsoC().whole)}
    assert sizes["visual.blocks.0.w"] == 2400 * 70 and sizes["visual.blocks.1.b"] == 90 * 200 - 2 * BLOCK
    assert all(p.size <= BLOCK for p in given.chunks("tensor", BLOCK, whole=IsoC(averaged=("*",)).whole))


def test_ties_trims_the_whole_model_or_each_tensor():
    base, tuned = {"u": [0.0, 0.0], "v": [0.0, 0.0]}, {"u": [1.0, 2.0], "v": [3.0, 4.0]}
    whole = merged(Ties(0.5), models(tuned, base=base))
    each = merged(Ties(0.5, trim="tensor"), models(tuned, base=base))
    assert whole["u"].tolist() == [0, 0] and whole["v"].tolist() == [3, 4]
    assert each["u"].tolist() == [0, 2] and each["v"].tolist() == [0, 4]


@settings(deadline=None, max_examples=20, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), density=st.floats(0.01, 1))
def test_the_trim_threshold_is_the_exact_order_statistic(seed, density):
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(3000) * 10.0 ** rng.integers(-12, 4, 3000)).astype(np.float32)
    kept = merged(Ties(density), models(values, base=np.zeros(3000)))
    k = max(1, int(density * 3000))
    expected = np.where(np.abs(values) >= np.sort(np.abs(values))[-k], values, 0)
    np.testing.assert_array_equal(kept, expected)


def test_draws_are_the_same_for_ever_and_for_any_piece():
    given = models(np.zeros(100_000), base=np.zeros(100_000), seed=7)
    chunks = list(given.chunks(chunk_size=BLOCK))
    whole = np.concatenate([task_vectors.draw(chunk, 1) for chunk in chunks])
    assert whole[:3].tolist() == DRAWN
    odd = replace(chunks[2], start=20_003, stop=20_013)
    assert task_vectors.draw(odd, 1).tolist() == whole[20_003:20_013].tolist()
    assert abs((whole < 2**32 * 0.1).mean() - 0.1) < 0.003
    assert not np.array_equal(task_vectors.draw(chunks[0], 0), task_vectors.draw(chunks[0], 1))


def test_dare_divides_by_density_or_matches_the_norm():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(20_000)
    given = models(values, base=np.zeros(20_000))
    kept = merged(DareLinear(0.25, scale=1.0), given)
    mask = kept != 0
    assert abs(mask.mean() - 0.25) < 0.01
    np.testing.assert_allclose(kept[mask], 4 * values[mask], rtol=1e-6)
    matched = merged(DareLinear(0.25, scale=1.0, rescale="l1"), given)
    assert np.array_equal(matched != 0, mask)
    assert np.abs(matched).sum() == pytest.approx(np.abs(values).sum(), rel=1e-6)
    assert not np.array_equal(merged(DareLinear(0.25, scale=1.0), replace(given, seed=1)) != 0, mask)


def test_della_keeps_large_magnitudes_more_often(monkeypatch):
    # a row of 1, -3, 2 at density 0.5 and epsilon 0.4 is kept with probabilities 0.3, 0.7, 0.5
    given = models([[1, -3, 2], [6, 6, 5]], base=np.zeros((2, 3)))
    monkeypatch.setattr(della, "draw", lambda chunk, i: np.zeros(chunk.size, np.uint32))
    out = merged(Della(0.5, epsilon=0.4), given)
    np.testing.assert_allclose(out, [[1 / 0.3, -3 / 0.7, 2 / 0.5], [6 / 0.5, 6 / 0.7, 5 / 0.3]], rtol=1e-6)
    # rows of two have the ends of the window, 0.3 and 0.7; rows of one its middle
    out = merged(Della(0.5, epsilon=0.4), models([[1, -3], [6, 5]], base=np.zeros((2, 2))))
    np.testing.assert_allclose(out, [[1 / 0.3, -3 / 0.7], [6 / 0.7, 5 / 0.3]], rtol=1e-6)
    out = merged(DellaLinear(0.5, epsilon=0.4, scale=1.0), models([[1], [-3]], base=np.zeros((2, 1))))
    np.testing.assert_allclose(out, [[2], [-6]], rtol=1e-6)
    monkeypatch.setattr(della, "draw", lambda chunk, i: np.full(chunk.size, round(0.4 * 2**32), np.uint32))
    out = merged(DellaLinear(0.5, epsilon=0.4, scale=1.0, rescale="none"), given)
    np.testing.assert_allclose(out, [[0, -3, 2], [6, 6, 0]])
    # the L1 norm of the whole tensor is 23, of what is kept 17
    for method in (DellaLinear, Della):
        out = merged(method(0.5, epsilon=0.4, scale=1.0, rescale="l1"), given)
        np.testing.assert_allclose(out, 23 / 17 * np.array([[0, -3, 2], [6, 6, 0]]), rtol=1e-6)


def test_batch_norm_statistics_take_the_mean_where_a_method_is_no_average():
    base = {"bn.running_var": [1.0, 1.0], "w": [0.0, 0.0]}
    tuned = [{"bn.running_var": [0.1, 2.0], "w": [1.0, 1.0]}, {"bn.running_var": [0.1, 4.0], "w": [1.0, 1.0]}]
    out = merged(TaskArithmetic(1.0), models(*tuned, base=base))
    np.testing.assert_allclose(out["bn.running_var"], [0.1, 3.0], rtol=1e-6)  # not -0.8, which is no variance
    out = merged(Linear((0.5, 0.25, 0.25)), models(*tuned, base=base))
    np.testing.assert_allclose(out["bn.running_var"], [0.55, 2.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "n", "base", "message"),
    [
        (Ties(), 1, False, "strategy ties: needs the model that the others were tuned from (give it with --base)"),
        (Slerp(), 1, False, "strategy slerp: 2 tuned models, not 1 (name more models)"),
        (Slerp(), 3, True, "strategy slerp: 2 tuned models, not 3 (use linear for several)"),
        (NuSlerp(), 1, True, "strategy nuslerp: 2 tuned models, not 1"),
        (ModelStock(), 1, True, "strategy model_stock: at least 2 tuned models, not 1"),
        (Ema(), 1, False, "strategy ema: at least 2 tuned models, not 1"),
        (WiseFT(), 2, True, "strategy wise_ft: 1 tuned model, not 2 (use linear for several)"),
        (Ties(1.5), 1, True, "strategy ties: density=1.5 (it lies in 0 .. 1)"),
        (DareTies(float("nan")), 1, True, "strategy dare_ties: density=nan (it lies in 0 .. 1)"),
        (DareLinear(-0.1), 1, True, "strategy dare_linear: density=-0.1"),
        (Della(0.05), 1, True, "density +- epsilon/2 leaves 0 .. 1 at epsilon=0.2"),
        (Breadcrumbs(0.995), 1, True, "density + gamma exceed 1 at gamma=0.01"),
        (
            Ties((0.1, 0.5)),
            1,
            True,
            "strategy ties: one density for the whole model (give a number, or set trim=tensor)",
        ),
        (Ties(densities=(0.1,)), 2, True, "1 densities for 2 tuned models (one each: A, B)"),
        (Ties(weights=(0.1,)), 2, True, "1 weights for 2 tuned models (one each: A, B)"),
        (Linear((1.0, -1.0)), 2, False, "the weights sum to zero"),
        (MultiSlerp((1.0, -1.0)), 2, False, "the weights sum to zero"),
        (NuSlerp((1.0, -1.0)), 2, False, "the weights sum to zero"),
        (Karcher((1.0, -2.0)), 2, False, "are not a mixture"),
        (Ema(1.5), 2, False, "decay=1.5 (it lies in 0 .. 1)"),
        (Lines(), 1, False, "strategy lines: needs the model that the others were tuned from (give it with --base)"),
        (Lines(float("nan")), 1, True, "strategy lines: alpha=nan"),
        (Sce(), 1, True, "strategy sce: at least 2 tuned models, not 1 (name more models)"),
        (Sce(1.5), 2, True, "strategy sce: density=1.5 (it lies in 0 .. 1)"),
        (Sce(equal_below=-1.0), 2, True, "strategy sce: equal_below=-1.0 (a number from 0)"),
        (Consensus(), 1, True, "strategy consensus: at least 2 tuned models, not 1 (name more models)"),
        (Consensus(), 2, False, "strategy consensus: needs the model that the others were tuned from"),
        (Consensus(k=3), 2, True, "strategy consensus: k=3 of 2 tasks (from 0 to their number)"),
        (Consensus(-1.0), 2, True, "strategy consensus: lambda=-1 (it lies in 0 .. inf)"),
        (Consensus(lambdas=(0.4,)), 2, True, "strategy consensus: 1 lambdas for 2 tuned models (one each: A, B)"),
        (Consensus(density=2.0), 2, True, "strategy consensus: density=2 (it lies in 0 .. 1)"),
        (Emr(), 1, False, "strategy emr: needs the model that the others were tuned from"),
        (Emr("C"), 2, True, "strategy emr: unknown task 'C' (known: 0, 1, A, B)"),
        (Emr(-1), 2, True, "strategy emr: unknown task -1"),
        (TallMask(2), 2, True, "strategy tall_mask: unknown task 2 (known: 0, 1, A, B)"),
        (TallMask(), 1, True, "strategy tall_mask: at least 2 tuned models, not 1"),
        (Pcb(), 1, True, "strategy pcb: at least 2 tuned models, not 1 (name more models)"),
        (Pcb(), 2, False, "strategy pcb: needs the model that the others were tuned from"),
        (Pcb(1.5), 2, True, "strategy pcb: density=1.5 (it lies in 0 .. 1)"),
        (Pcb(clip=0.6), 2, True, "strategy pcb: clip=0.6 (it lies in 0 .. 0.5)"),
        (Pcb(weights=(0.4,)), 2, True, "strategy pcb: 1 weights for 2 tuned models (one each: A, B)"),
        (TsvM(), 1, True, "strategy tsv_m: at least 2 tuned models, not 1 (name more models)"),
        (TsvM(), 2, False, "strategy tsv_m: needs the model that the others were tuned from"),
        (TsvM(rank=0.0), 2, True, "strategy tsv_m: rank=0.0 (a share above 0, at most 1)"),
        (TsvM(rank=1.5), 2, True, "strategy tsv_m: rank=1.5 (a share above 0, at most 1)"),
        (TsvM(averaged=("tokens",)), 2, True, "strategy tsv_m: averaged: the filter 'tokens' covers no tensor"),
        (IsoC(), 1, False, "strategy iso_c: needs the model that the others were tuned from"),
        (IsoC({"attn": 1.0}), 1, True, "strategy iso_c: scale: the filter 'attn' covers no tensor"),
        (IsoCTS(), 1, True, "strategy iso_cts: at least 2 tuned models, not 1 (name more models)"),
        (IsoCTS(-0.1), 2, True, "strategy iso_cts: common=-0.1 (it lies in 0 .. 1)"),
    ],
)
def test_what_makes_no_sense_is_refused(method, n, base, message):
    given = models(*([[1.0, 2.0]] * n), base=[0.0, 0.0] if base else None)
    with pytest.raises(UserError) as refused:
        method.check(given)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "method",
    [Linear(), TaskArithmetic(), Ties(), DareTies(), Della(), Breadcrumbs(), Slerp(), ModelStock(), Consensus()]
    + [Pcb(), Emr(), Emr(0), TallMask(0)],
)
def test_values_that_are_not_finite_name_model_and_tensor(method):
    bad = np.ones(8)
    bad[3] = np.nan
    with pytest.raises(UserError, match="B.*values that are not finite"):
        merged(method, models(np.ones(8) * 2, bad, base=np.zeros(8)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", [Sce(), Lines(), TsvM(), IsoC(), IsoCTS()], ids=str)
def test_a_matrix_that_is_not_finite_names_model_and_tensor(method, device):
    good, bad = np.ones((3, 4)), np.ones((3, 4))
    bad[1, 2] = np.inf
    with pytest.raises(UserError, match="B: w has values that are not finite"):
        merged(method, replace(models(good * 2, bad, base=np.zeros((3, 4))), device=device))


def test_an_svd_that_does_not_converge_says_what_to_do(monkeypatch):
    def fails(*_, **__):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(np.linalg, "svd", fails)
    with pytest.raises(UserError, match=r"the SVD of w does not converge \(average it: averaged=\[w\]\)"):
        merged(IsoC(), models(np.ones((2, 2)), base=np.zeros((2, 2))))


def test_the_methods_in_the_docs_work():
    page = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
    names = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.S):
        if "@closed_form" in code:
            exec(code, names)
    median = names["Median"]()
    np.testing.assert_allclose(merged(median, models([1, 5], [2, 4], [9, 3])), [2, 4])
    with pytest.raises(UserError, match="at least 3 tuned models, not 1"):
        median.check(models([1]))
    total = names["SumOfTasks"]((0.0, 0.5))  # what is in no block lies behind the last
    np.testing.assert_allclose(merged(total, models([1, 5], [2, 4], base=[1, 3])), [1.5, 4.5])
    with pytest.raises(UserError, match="strategy sum_of_tasks: needs the model that the others were tuned from"):
        total.check(models([1]))
