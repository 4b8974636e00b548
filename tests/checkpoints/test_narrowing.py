"""Every cast to a narrower float dtype: a finite number that does not fit is an error, never an infinity."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.checkpoints.torch_io import load_into
from mergekit_vl.commands import app
from mergekit_vl.errors import UserError
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.models.model import Single
from mergekit_vl.strategies.linear import Linear
from mergekit_vl.strategies.sce import Sce
from mergekit_vl.strategies.task_arithmetic import TaskArithmetic


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(name, dtype=torch.float32, **tensors):
    save_file({k: torch.tensor(v, dtype=dtype) for k, v in tensors.items()}, f"{name}.safetensors")


def merge(monkeypatch, capsys, *words):
    """Exit code and stderr of `merge`."""
    monkeypatch.setattr(sys, "argv", ["mergekit-vl", "merge", *words, "-o", "out", "--quiet"])
    with pytest.raises(SystemExit) as stop:
        app.main()
    return stop.value.code or 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("stored", "values", "dtype", "told"),
    [
        (torch.float64, [1e300, -2e300, 1.0], "float32", "float32: 2, the largest -2e+300; float64 holds all (use --dtype float64)"),
        (torch.float64, [1e39, 1.0], "bfloat16", "bfloat16: 1, the largest 1e+39; float64 holds all (use --dtype float64)"),
        (torch.float32, [3.4e38, 3.39e38], "bfloat16", "bfloat16: 1, the largest 3.4e+38; float32 holds all (use --dtype float32)"),
        (torch.float32, [65520.0, 65519.0], "float16", "float16: 1, the largest 65520; bfloat16 holds all (use --dtype bfloat16)"),
        (torch.float32, [-3.4e38, 7e4], "float16", "float16: 2, the largest -3.4e+38; float32 holds all (use --dtype float32)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_output_is_told_and_nothing_is_written(stored, values, dtype, told, monkeypatch, capsys):
    save("A", stored, w=values)
    code, err = merge(monkeypatch, capsys, "A.safetensors", "--strategy", "linear", "--dtype", dtype)
    assert code == 2 and err == f"error: w has values too large for {told}\n"
    assert not Path("out").exists()


def test_a_base_of_narrower_tensors_narrows_the_merge(monkeypatch, capsys):
    save("base", torch.float16, u=[1.0], v=[0.0], w=[3e4, 0.0])
    save("A", torch.float32, u=[1e5], v=[1.0], w=[1e5, -9e4])
    words = ("A.safetensors", "--base", "base.safetensors", "--strategy", "task_arithmetic", "scale=1")
    code, err = merge(monkeypatch, capsys, *words)
    told = "u has values too large for float16: 1, the largest 100000 (1 other tensor has some too); bfloat16 holds all"
    assert code == 2 and told in err
    assert merge(monkeypatch, capsys, *words, "--dtype", "float32") == (0, "")
    assert load_file("out/model.safetensors")["w"].tolist() == [1e5, -9e4]


def test_pieces_and_threads_count_together(monkeypatch, capsys):
    save_file({"w": torch.full((300_000,), 1e5)}, "A.safetensors")
    for threads in "13":
        words = ("A.safetensors", "--strategy", "linear", "--dtype", "float16", "--threads", threads)
        assert "float16: 300000, the largest 100000;" in merge(monkeypatch, capsys, *words)[1]


def test_a_kept_tensor_is_checked_when_its_dtype_changes_and_keeps_the_infinities_it_has(monkeypatch, capsys):
    save("A", w=[1.0], kept=[1e5, float("-inf")])
    words = ("A.safetensors", "--strategy", "linear", "--keep", "kept", "--dtype")
    assert (
        "kept has values too large for float16: 1, the largest 100000"
        in merge(monkeypatch, capsys, *words, "float16")[1]
    )
    assert merge(monkeypatch, capsys, *words, "bfloat16")[0] == 0
    assert load_file("out/model.safetensors")["kept"].tolist() == [99840.0, float("-inf")]


def test_the_largest_number_of_each_dtype_fits(monkeypatch, capsys):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        largest = torch.finfo(dtype).max
        save("A", torch.float64, w=[largest, -largest])
        words = ("A.safetensors", "--strategy", "linear", "--force", "--dtype", str(dtype).removeprefix("torch."))
        assert merge(monkeypatch, capsys, *words) == (0, "")
        assert load_file("out/model.safetensors")["w"].double().tolist() == [largest, -largest]


def prompts(*contexts):
    class Words:
        spec, device, key, token_width = "words", "cpu", "words", 2

        def embed(self, text):
            return contexts[0]

    return [Single(Words(), Prompt(ctx)) for ctx in contexts]


def test_a_merge_in_memory_is_checked_too():
    base = torch.zeros(1, 2, dtype=torch.bfloat16)
    models = prompts(base, torch.tensor([[3.4e38, 1.0]]), torch.tensor([[3.4e38, 1.0]]))
    told = "ctx has values too large for bfloat16: 1, the largest 3.4e.38; float32 holds all"
    with pytest.raises(UserError, match=told):
        TaskArithmetic(0.5).merge(MergeInputs(models[0], tuple(models[1:]), (), None))
    merged = Linear((1.0, 1.0, 1.0)).merge(MergeInputs(models[0], tuple(models[1:]), (), None))
    assert merged.adapter.ctx.isfinite().all()  # two thirds of it fit


def test_a_checkpoint_of_float64_does_not_become_infinite_in_a_model():
    module = torch.nn.Linear(2, 1, bias=False)
    given = {"weight": torch.tensor([[1.0, -1e300]], dtype=torch.float64)}
    with pytest.raises(UserError, match=r"x.pt: weight has values too large for float32: 1, the largest -1e\+300"):
        load_into(module, given, where="x.pt", hint="")
    load_into(module, {"weight": given["weight"].clamp(-1e38)}, where="x.pt", hint="")
    assert module.weight.tolist() == [[1.0, pytest.approx(-1e38)]]


def test_a_prompt_of_float64_does_not_become_infinite(tmp_path):
    file = tmp_path / "prompt.safetensors"
    save_file({"ctx": torch.full((4, 2), 1e39, dtype=torch.float64)}, file)
    with pytest.raises(UserError, match="ctx has values too large for float32: 8, the largest 1e.39"):
        Prompt.load(file)


def test_a_variance_beyond_float32_is_the_largest_and_not_none(monkeypatch, capsys):
    # task vectors [1e20, 1] and [0, 3]: variances 2.5e39, which float32 has not, and 1; half of the elements is one
    save("base", w=[0.0, 0.0])
    save("A", w=[1e20, 1.0])
    save("B", w=[0.0, 3.0])
    words = ("A.safetensors", "B.safetensors", "--base", "base.safetensors", "--strategy", "sce", "density=0.5")
    assert merge(monkeypatch, capsys, *words) == (0, "")
    assert load_file("out/model.safetensors")["w"].tolist() == [float(np.float32(1e20)), 0.0]
    assert Sce(0.5).merged == "selected"
