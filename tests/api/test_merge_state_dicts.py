"""`mergekit_vl.merge`: the command's bytes, on state dicts, modules and paths; its errors."""

import copy
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mergekit_vl
from mergekit_vl import MergedFolder, UserError, merge
from mergekit_vl.merge_files import streaming
from mergekit_vl.merge_files.plan import MergePlan
from mergekit_vl.strategies.dare_ties import DareTies
from mergekit_vl.strategies.iso_c import IsoC
from mergekit_vl.strategies.linear import Linear
from mergekit_vl.strategies.task_arithmetic import TaskArithmetic
from mergekit_vl.strategies.ties import Ties


def state(seed, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return {
        "blocks.0.weight": torch.randn(6, 5, generator=draw).to(dtype),
        "blocks.1.weight": torch.randn(6, 5, generator=draw).to(dtype),
        "bias": torch.randn(6, generator=draw).to(dtype),
        "position_ids": torch.arange(6),
    }


ZS, A, B = state(0), state(1), state(2)


def same(given, other):
    assert given.keys() == other.keys()
    for name in given:
        assert given[name].dtype == other[name].dtype and torch.equal(given[name], other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method", [Ties(), DareTies(), Linear(), TaskArithmetic(scale=0.3), IsoC()], ids=lambda m: m.info.name
)
def test_the_bytes_are_those_of_the_command(tmp_path, monkeypatch, method, dtype):
    monkeypatch.chdir(tmp_path)
    models = {"ZS": state(0, dtype), "A": state(1, dtype), "B": state(2, dtype)}
    for label, tensors in models.items():
        save_file(tensors, f"{label}.safetensors")
    files = ("A.safetensors", "B.safetensors")
    plan = MergePlan(method.info.name, method, files, "ZS.safetensors", seed=3)
    streaming.merge(plan, tmp_path / "out")
    written = load_file("out/model.safetensors")
    before = copy.deepcopy(models)
    same(merge([models["A"], models["B"]], base=models["ZS"], strategy=method, seed=3), written)
    same(merge(files, base="ZS.safetensors", strategy=method, seed=3), written)
    for label, tensors in models.items():
        same(tensors, before[label])


def test_a_folder_is_what_the_command_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for label, tensors in (("ZS", ZS), ("A", A), ("B", B)):
        save_file(tensors, f"{label}.safetensors")
    plan = MergePlan("ties", Ties(density=0.5), ("A.safetensors", "B.safetensors"), "ZS.safetensors")
    streaming.merge(plan, tmp_path / "command")
    made = merge(["A.safetensors", "B.safetensors"], base="ZS.safetensors", density=0.5, out="python")
    assert isinstance(made, MergedFolder) and repr(made) == "<ties of ZS, A, B: python>"
    for name in ("model.safetensors", "README.md"):
        assert (tmp_path / "python" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()
    same(made.state_dict(), load_file("command/model.safetensors"))
    with pytest.raises(UserError, match="exists"):
        merge(["A.safetensors"], base="ZS.safetensors", out="python")


def test_numbers_by_hand():
    zero, one, two = ({"w": torch.tensor([x, x])} for x in (0.0, 1.0, 3.0))
    assert merge([one, two], strategy="linear")["w"].tolist() == [2.0, 2.0]
    assert merge([one, two], strategy="linear", weights=[3, 1])["w"].tolist() == [1.5, 1.5]
    assert merge({"a": one, "b": two}, strategy="linear", weights={"b": 1, "a": 3})["w"].tolist() == [1.5, 1.5]
    assert merge([one, two], zero, "task_arithmetic", scale=0.5)["w"].tolist() == [2.0, 2.0]
    assert merge(two, zero, "wise_ft", alpha=0.5)["w"].tolist() == [1.5, 1.5]
    by_label = {"base": 1, "a": 1, "b": 2}
    assert merge({"a": one, "b": two}, zero, "linear", weights=by_label)["w"].tolist() == [1.75, 1.75]


class Tied(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.norm(self.embed(x)))


def test_modules_give_a_new_module():
    with torch.random.fork_rng():
        zs, a, b = Tied(0).eval(), Tied(1), Tied(2)
    a.embed.weight.requires_grad_(False)
    before = [copy.deepcopy(each.state_dict()) for each in (zs, a, b)]
    merged = merge([a, b], base=zs, strategy="dare_ties", density=0.5, seed=1)
    assert type(merged) is Tied and merged is not zs and not merged.training
    assert merged.head.weight is merged.embed.weight
    same(
        merged.state_dict(), merge([a.state_dict(), b.state_dict()], zs.state_dict(), "dare_ties", density=0.5, seed=1)
    )
    assert merged.embed.weight.requires_grad
    for each, kept in zip((zs, a, b), before):
        same(each.state_dict(), kept)
    narrow = merge([a, b], base=zs, strategy="linear", dtype=torch.bfloat16)
    assert narrow.embed.weight.dtype == torch.bfloat16 and narrow.norm.num_batches_tracked.dtype == torch.int64


def test_dtypes_and_integers_as_the_command_treats_them():
    half = {"w": torch.tensor([1.0, 2.0], dtype=torch.float16), "n": torch.tensor([3])}
    whole = {"w": torch.tensor([3.0, 4.0], dtype=torch.float64), "n": torch.tensor([4])}
    with pytest.warns(UserWarning, match=r"n \(I64\) differs between model-1 and model-2; model-1's is taken"):
        merged = merge([half, whole], strategy="uniform_soup")
    assert merged["w"].dtype == torch.float16 and merged["w"].tolist() == [2.0, 3.0] and merged["n"].tolist() == [3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert merge([half, whole], strategy="uniform_soup", dtype="float32")["w"].dtype == torch.float32
    with pytest.raises(UserError, match="w has values too large for float16"):
        merge([{"w": torch.tensor([1e6])}], strategy="linear", dtype="float16")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: merge([A, {**B, "bias": torch.zeros(3)}], ZS),
            r"base and model-2 differ in bias: \(6,\) against \(3,\)",
        ),
        (lambda: merge([A, {"bias": B["bias"]}], ZS), r"blocks.0.weight: \(6, 5\) against missing"),
        (lambda: merge([A, B]), "needs the model that the others were tuned from"),
        (lambda: merge([A, B], ZS, densty=0.2), "strategy ties: unknown key 'densty' .did you mean 'density'"),
        (lambda: merge([A, B], ZS, density=2.0), r"strategy ties: density=2 \(it lies in 0 .. 1\)"),
        (lambda: merge([A, B], ZS, "tise"), "unknown strategy 'tise' .did you mean 'ties'"),
        (lambda: merge([A, B], ZS, "mergetune"), "mergetune needs data or an evaluation"),
        (lambda: merge([A, B], ZS, "linear", weights=[1.0]), "1 weights for 3 models"),
        (lambda: merge({"a": A, "b": B}, ZS, weights={"c": 1}), "unknown model 'c'"),
        (lambda: merge({"a": A, "b": B}, ZS, weights={"a": 1}), "b has no weight"),
        (lambda: merge([{"state_dict": A, "epoch": 3}], ZS, "linear"), "state_dict is a dict, not a tensor"),
        (lambda: merge([{"w": torch.empty(2, device="meta")}], strategy="linear"), "without values of its own"),
        (lambda: merge([], strategy="linear"), "no model to merge"),
        (lambda: merge(["nowhere.safetensors"], strategy="linear"), "no such model"),
        (lambda: merge([A, B], ZS, keep="nothing"), "covers no tensor"),
        (lambda: merge([{"w": torch.tensor([float("nan")])}], strategy="linear"), "values that are not finite"),
        (lambda: merge([A, B], ZS, Ties(), density=0.3), "density= beside a strategy that is made"),
        (lambda: merge([A, B], ZS, object()), "is no closed form"),
        (lambda: merge([A, 3], ZS), "a int is not a model"),
        (lambda: merge([A], ZS, "linear", device="tpu"), "unknown device 'tpu'"),
    ],
)
def test_errors_say_what_and_how_to_mend_it(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_models_are_checked_without_being_merged():
    told = repr(mergekit_vl.check([A, B], base=ZS, density=0.3)).splitlines()
    assert told[0].startswith("strategy  ties: density=0.3,") and told[-1].startswith("note      1 integer tensors")
    with pytest.raises(UserError, match="unknown key 'densty'"):
        mergekit_vl.check([A, B], base=ZS, densty=0.3)


def test_keep_takes_tensors_from_the_base():
    merged = merge([A, B], base=ZS, strategy="linear", keep=["bias"])
    assert torch.equal(merged["bias"], ZS["bias"]) and not torch.equal(merged["blocks.0.weight"], ZS["blocks.0.weight"])


def test_strategies_are_listed_with_their_options():
    listed = mergekit_vl.list_strategies()
    assert "ties" in listed and len(listed) == len(list(listed)) and listed["ties"].merges_weights
    assert listed["ties"].options["density"] == "Coefficient = 0.2: share of each task vector that is kept"
    assert not listed["mergetune"].merges_weights
    assert repr(listed).splitlines()[0].startswith("linear ") and "<table>" in listed._repr_html_()
    assert (
        repr(listed["ties"]).startswith("ties: trim, elect signs")
        and "<td>density</td>" in listed["ties"]._repr_html_()
    )
    assert np.isin("ties", list(listed))
