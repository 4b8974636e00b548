"""Weight matching: permutations are found again, a shared start changes nothing, merges of files read the aligned model."""

import numpy as np
import pytest
from test_symmetries import MODELS, arrays, clip, randomised, shapes_of, shuffled

from mergekit_vl import rebasin
from mergekit_vl.pieces import Arrays
from mergekit_vl.symmetries import find

pytest.importorskip("scipy")
FLOAT = np.dtype(np.float32)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def source(tensors):
    return Arrays({name: (array, "F32") for name, array in tensors.items()})


def test_a_permuted_model_reads_the_same_in_any_pieces(monkeypatch):
    rng = np.random.default_rng(0)
    tensors = {"w": rng.standard_normal((6, 4, 2)).astype(np.float32), "v": np.arange(7, dtype=np.float32)}
    orders = {"w": {0: rng.permutation(6), 1: rng.permutation(4)}, "v": {0: rng.permutation(7)}}
    expected = {"w": tensors["w"][orders["w"][0]][:, orders["w"][1]], "v": tensors["v"][orders["v"][0]]}
    for chunk in (1 << 17, 8):  # whole tensors, and row by row
        monkeypatch.setattr(rebasin, "CHUNK", chunk)
        permuted = rebasin.Permuted(source(tensors), shapes_of(tensors), orders)
        for name, array in expected.items():
            flat = array.reshape(-1)
            for start in range(0, flat.size + 1):
                for stop in range(start, flat.size + 1):
                    assert np.array_equal(permuted.read(name, start, stop, FLOAT), flat[start:stop])


@pytest.mark.parametrize("name", MODELS)
def test_a_permuted_model_is_found_again_bit_by_bit(name):
    model, heads, _ = MODELS[name]()
    tensors = arrays(randomised(model))
    shapes, groups = shapes_of(tensors), find(shapes_of(tensors), heads).groups
    other = shuffled(tensors, groups)
    found = rebasin.align(source(tensors), source(other), shapes, groups)
    aligned = rebasin.Permuted(source(other), shapes, found.orders)
    for key, array in tensors.items():
        assert np.array_equal(aligned.read(key, 0, array.size, FLOAT), array.reshape(-1)), key
    assert found.moved and found.before < 0.9 and found.after == pytest.approx(1)


def test_models_of_one_start_stay_as_they_are():
    model, heads, _ = clip()
    tensors = arrays(randomised(model))
    tensors["transformer.resblocks.0.mlp.c_fc.bias"][:] = 0  # ties do not move anything either
    tensors["transformer.resblocks.0.mlp.c_fc.weight"][:5] = 0
    rng = np.random.default_rng(3)
    tuned = {k: (v + 0.1 * rng.standard_normal(v.shape) * v.std()).astype(np.float32) for k, v in tensors.items()}
    shapes = shapes_of(tensors)
    found = rebasin.align(source(tensors), source(tuned), shapes, find(shapes, heads).groups)
    assert found.orders == {} and found.moved == 0 and found.before == found.after
