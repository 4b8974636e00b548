"""Closed-form methods on numbers worked by hand."""

import numpy as np
import pytest

from mergekit_vl.closed_form import SERIAL, apply, workers
from mergekit_vl.coefficients import depths
from mergekit_vl.dtypes import narrow, widen
from mergekit_vl.errors import UserError
from mergekit_vl.pieces import BLOCK, Arrays, Models, Tensor
from mergekit_vl.strategies.linear import Linear
from mergekit_vl.strategies.task_arithmetic import TaskArithmetic
from mergekit_vl.strategies.wise_ft import WiseFT


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


def merged(method, given, *, run=SERIAL, chunk=BLOCK):
    out = {t.name: np.full(t.size, np.nan, np.float32) for t in given.tensors}

    def write(piece, values):
        out[piece.tensor.name][piece.start : piece.stop] = values

    apply(method, given, write, run, chunk)
    out = {t.name: out[t.name].reshape(t.shape) for t in given.tensors}
    return out if len(out) > 1 else out["w"] if "w" in out else out


@pytest.mark.parametrize(
    ("method", "base", "tuned", "expected"),
    [
        (Linear(), None, [[0, 1], [4, 5]], [2, 3]),
        (Linear(), [1, 1], [[0, 1], [5, 4]], [2, 2]),
        (Linear((1.0, 3.0)), None, [[0, 1], [4, 5]], [3, 4]),
        (Linear((1.0, 3.0), normalise=False), None, [[0, 1], [4, 5]], [12, 16]),
        (WiseFT(0.25), [4, 8], [[0, 4]], [3, 7]),
        (TaskArithmetic(0.5), [1, 0], [[2, 0], [1, 4]], [1.5, 2]),
        (TaskArithmetic(-1.0), [1, 2], [[2, 4]], [0, 0]),  # negation
        (TaskArithmetic(scales=(-1.0, 1.0, 1.0)), [1, 1], [[2, 1], [1, 3], [4, 1]], [3, 3]),  # analogy
    ],
)
def test_by_hand(method, base, tuned, expected):
    np.testing.assert_allclose(merged(method, models(*tuned, base=base)), expected, rtol=1e-6, atol=1e-6)


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
