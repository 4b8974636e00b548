"""Weight matching: permutations are found again, a shared start changes nothing, merges of files read the aligned model."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_merge import call
from test_symmetries import MODELS, TEXT, VISION, arrays, clip, randomised, shapes_of, shuffled

from mergekit_vl.alignment import rebasin
from mergekit_vl.alignment.permuted import Permuted
from mergekit_vl.alignment.symmetries import find
from mergekit_vl.commands.merge_request import ask
from mergekit_vl.errors import UserError
from mergekit_vl.merge_files import streaming
from mergekit_vl.merge_files.provenance import read_metadata
from mergekit_vl.merging.chunks import Arrays
from mergekit_vl.strategies.linear import Linear

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
    for chunk_size in (1 << 17, 8):  # whole tensors, and row by row
        monkeypatch.setattr(rebasin, "CHUNK_SIZE", chunk_size)
        permuted = Permuted(source(tensors), shapes_of(tensors), orders)
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
    aligned = Permuted(source(other), shapes, found.orders)
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


def two_folders(permute=True):
    """A, and B that is A in another order, as folders of open_clip; the model."""
    model, heads, _ = clip()
    tensors = arrays(randomised(model))
    groups = find(shapes_of(tensors), heads).groups
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}}
    for name, state in (("A", tensors), ("B", shuffled(tensors, groups) if permute else tensors)):
        Path(name).mkdir()
        save_file({k: v.copy() for k, v in state.items()}, f"{name}/open_clip_model.safetensors")
        Path(name, "open_clip_config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("strategy", ["linear", "karcher", "uniform_soup"])
def test_the_mean_of_a_model_and_its_permutation_is_the_model(monkeypatch, capsys, strategy):
    tensors = two_folders()
    words = ("merge", "A", "B", "--strategy", strategy, "-o")
    assert call(monkeypatch, capsys, *words, "plain")[0] == 0
    code, out, err = call(monkeypatch, capsys, *words, "out", "--rebasin")
    assert code == 0 and not err, err
    assert "rebasin: B matches A after 10 of 10 permutations, cosine 0." in out and "1.0000 now" in out
    plain, merged = load_file("plain/open_clip_model.safetensors"), load_file("out/open_clip_model.safetensors")
    exact = strategy != "karcher"
    for name, array in tensors.items():
        np.testing.assert_allclose(merged[name], array, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
    assert sum(not np.allclose(plain[name], array, atol=1e-3) for name, array in tensors.items()) > 40


def test_verify_and_check_and_recipes_know_of_it(monkeypatch, capsys):
    two_folders()
    Path("A").rename("ZS")
    save_file(load_file("ZS/open_clip_model.safetensors"), "A.safetensors")
    Path("merge.yaml").write_text("weights: {models: [A.safetensors, B], strategy: ties, base: ZS, rebasin: true}\n")
    assert call(monkeypatch, capsys, "merge", "merge.yaml", "-o", "out", "--threads", "1")[0] == 0
    metadata = read_metadata(Path("out"))[0]
    assert metadata["rebasin"] is True
    assert "every model is reordered to match `ZS`" in Path("out/README.md").read_text()
    assert "reproduced byte for byte, ties of ZS, A, B" in call(monkeypatch, capsys, "verify", "out")[1]
    first = Path("out/open_clip_model.safetensors").read_bytes()
    asked = ask(["merge.yaml"]).plan
    streaming.merge(asked, Path("again"), threads=3, chunk_size=64)
    assert Path("again/open_clip_model.safetensors").read_bytes() == first
    out = call(monkeypatch, capsys, "check", "merge.yaml")[1]
    assert "rebasin   to match ZS: 10 permutations, the largest of 96" in out
    assert "rebasin   to match ZS" in call(monkeypatch, capsys, "check", "B", "--base", "ZS", "--rebasin")[1]
    Path("merge.yaml").write_text("weights: {models: [ZS, B], strategy: linear, rebasin: 3}\n")
    assert "rebasin=3 (write rebasin: true)" in call(monkeypatch, capsys, "check", "merge.yaml")[2]


def test_models_of_one_start_merge_to_the_same_bytes_with_and_without():
    two_folders(permute=False)
    for name, rebased in (("plain", False), ("out", True)):
        streaming.merge(streaming.MergePlan("linear", Linear(), ("A", "B"), rebasin=rebased), Path(name))
    plain, merged = load_file("plain/open_clip_model.safetensors"), load_file("out/open_clip_model.safetensors")
    assert all(plain[name].tobytes() == merged[name].tobytes() for name in plain)


def test_a_kept_tensor_is_the_reference_s_and_need_not_fit(monkeypatch, capsys):
    tensors = two_folders()
    other = load_file("B/open_clip_model.safetensors")
    other["visual.proj"] = np.zeros((24, 5), np.float32)  # another head
    save_file(other, "B/open_clip_model.safetensors")
    words = ("merge", "A", "B", "--strategy", "linear", "-o", "out", "--rebasin", "--keep", "visual.proj")
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 0, err
    merged = load_file("out/open_clip_model.safetensors")
    assert [name for name, array in tensors.items() if not np.array_equal(merged[name], array)] == []


def test_what_cannot_be_aligned_is_told_before_anything_is_written(monkeypatch, capsys):
    for name in ("A", "B"):
        save_file({"encoder.w": np.ones((3, 3), np.float32)}, f"{name}.safetensors")
    words = ("merge", "A.safetensors", "B.safetensors", "--strategy", "linear", "-o", "out", "--rebasin")
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2 and len(err.splitlines()) == 1 and not Path("out").exists()
    assert "knows no permutation of this architecture, with tensors as encoder.w (known are open_clip's" in err
    two_folders()
    code, _, err = call(monkeypatch, capsys, "merge", "A", "--strategy", "linear", "-o", "out", "--rebasin")
    assert code == 2 and "--rebasin has one model and none that it is to match" in err
    words = ("merge", "A", "B", "--strategy", "linear", "-o", "out", "--rebasin", "--max-ram", "60M")
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2 and "--max-ram 60M is too little" in err and not Path("out").exists()
    broken = load_file("B/open_clip_model.safetensors")
    broken["visual.ln_post.bias"][0] = np.nan
    save_file(broken, "B/open_clip_model.safetensors")
    code, _, err = call(monkeypatch, capsys, *words[:-2])
    assert code == 2 and "values that are not finite" in err and not Path("out").exists()


def test_without_scipy_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UserError, match="--rebasin needs scipy"):
        rebasin._assign(np.eye(2))
