"""Merging files: same bytes as in memory, every kind of input, nothing half written, bounded memory."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_merge_methods import EVERY

from mergekit_vl.adapters.linear_head import LinearHead
from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.adapters.tower import Tower
from mergekit_vl.checkpoints.reader import open_checkpoint
from mergekit_vl.commands import app
from mergekit_vl.errors import UserError
from mergekit_vl.merge_files import memory, streaming
from mergekit_vl.merge_files.provenance import canonical, read_metadata
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.models.model import Single
from mergekit_vl.registry.plugins import load_plugins
from mergekit_vl.strategies.linear import Linear
from mergekit_vl.strategies.task_arithmetic import TaskArithmetic
from mergekit_vl.strategies.ties import Ties
from mergekit_vl.strategies.wise_ft import WiseFT
from mergekit_vl.system.memory import threads_available

SHAPES = {"visual.blocks.0.w": (40, 300), "visual.blocks.1.w": (12_000,), "logit_scale": (), "empty": (0, 4)}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tensors(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {k: np.asarray(rng.standard_normal(s), np.float32) for k, s in shapes.items()}


def three(shapes=SHAPES):
    """ZS, A and B in the working folder."""
    for seed, name in enumerate(("ZS", "A", "B")):
        save_file(tensors(seed, shapes), f"{name}.safetensors")


def plan(method, models=("A.safetensors", "B.safetensors"), base="ZS.safetensors", **more):
    names = {entry.resolve(): name for name, entry in load_plugins().entries["strategies"].items()}
    return streaming.MergePlan(names[type(method)], method, models, base, **more)


def call(monkeypatch, capsys, *arguments):
    """The console script in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["mergekit-vl", *arguments])
    with pytest.raises(SystemExit) as stop:
        app.main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


class Words:
    """A backbone whose words are the zero-shot prompt."""

    spec, device, key = "words", "cpu", "words"

    def __init__(self, ctx):
        self.ctx, self.token_width = ctx, ctx.shape[-1]

    def embed(self, text):
        return self.ctx


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", [m for m in EVERY if not m.describe(2).by_task], ids=str)
def test_files_and_memory_give_the_same_bytes(method, dtype):
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    generator = torch.Generator().manual_seed(0)
    contexts = [torch.randn(60, 170, generator=generator).to(getattr(torch, dtype)) for _ in range(3)]
    for name, ctx in zip(("ZS", "A", "B"), contexts):
        save_torch({"ctx": ctx}, f"{name}.safetensors")
    models = [Single(Words(contexts[0]), Prompt(ctx)) for ctx in contexts]
    in_memory = method.merge(MergeInputs(models[0], tuple(models[1:]), (), None, seed=5))
    streaming.merge(plan(method, seed=5), Path("out"), threads=2)
    merged = load_torch("out/model.safetensors")["ctx"]
    assert merged.dtype == in_memory.adapter.ctx.dtype == getattr(torch, dtype)
    assert torch.equal(merged.view(torch.uint8), in_memory.adapter.ctx.view(torch.uint8))
    assert all(torch.equal(m.adapter.ctx, ctx) for m, ctx in zip(models, contexts))  # the inputs are unchanged


def test_threads_pieces_and_shards_do_not_change_a_byte():
    three()
    streaming.merge(plan(Ties()), Path("one"), threads=1)
    first = Path("one/model.safetensors").read_bytes()
    streaming.merge(plan(Ties()), Path("two"), threads=3, chunk_size=8192)
    assert Path("two/model.safetensors").read_bytes() == first
    streaming.merge(plan(Ties()), Path("cut"), shard_size=60_000)
    shards = sorted(path.name for path in Path("cut").glob("*.safetensors"))
    assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    whole, parts = load_file("one/model.safetensors"), {}
    for shard in shards:
        parts |= load_file(f"cut/{shard}")
    assert {k: v.tobytes() for k, v in whole.items()} == {k: v.tobytes() for k, v in parts.items()}
    again = open_checkpoint("cut")  # the index is there, and right
    assert set(again.tensors) == set(SHAPES)
    streaming.merge(plan(Ties(), models=("cut", "one")), Path("three"))  # our own output is an input


def test_what_is_written_beside_the_tensors(monkeypatch, capsys):
    three()
    Path("ZS").mkdir()
    os.rename("ZS.safetensors", "ZS/model.safetensors")
    Path("ZS/open_clip_config.json").write_text('{"model_cfg": {}}')
    code, out, err = call(
        *(monkeypatch, capsys, "merge", "A.safetensors", "B.safetensors", "--base", "ZS", "--strategy", "dare_ties"),
        *("-o", "out", "density=0.5", "B=0.5", "A=1", "--seed", "4"),
    )
    assert code == 0 and "dare_ties of ZS, A, B: out" in out and "next: mergekit-vl verify out" in out and not err
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "README.md",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    with safe_open("out/open_clip_model.safetensors", "np") as file:
        assert sorted(file.metadata()) == ["format", "mergekit_vl"]
        recipe = json.loads(file.metadata()["mergekit_vl"])
    assert recipe["strategy"] == "dare_ties" and recipe["seed"] == 4 and recipe["version"]
    assert recipe["options"]["density"] == 0.5 and recipe["options"]["weights"] == [1.0, 0.5]
    assert [m["label"] for m in recipe["models"]] == ["A", "B"] and recipe["base"]["path"] == "ZS"
    assert recipe["models"][0]["blake3"]["A.safetensors"] == blake3(Path("A.safetensors").read_bytes()).hexdigest()
    card = Path("out/README.md").read_text()
    assert (
        "# A merge with dare_ties" in card
        and "| density | `0.5` |" in card
        and recipe["base"]["blake3"]["model.safetensors"] in card
    )


def test_verify_repeats_the_merge(monkeypatch, capsys):
    three()
    streaming.merge(plan(Ties(0.5)), Path("out"))
    assert call(monkeypatch, capsys, "verify", "out")[:2] == (0, "out: reproduced byte for byte, ties of ZS, A, B\n")
    os.rename("A.safetensors", "moved.safetensors")
    code, _, err = call(monkeypatch, capsys, "verify", "out")
    assert code == 2 and "error: A.safetensors: no such model" in err
    assert call(monkeypatch, capsys, "verify", "out", "A=moved.safetensors")[0] == 0
    with open("out/model.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    code, _, err = call(monkeypatch, capsys, "verify", "out", "A=moved.safetensors")
    assert code == 2 and "out: is not what its inputs merge to" in err
    save_file(tensors(9), "A.safetensors")
    code, _, err = call(monkeypatch, capsys, "verify", "out")
    assert code == 2 and "A.safetensors: is not the file that was merged: its BLAKE3 differs" in err


class Optimizer:
    """Something in a training checkpoint whose code must not run."""

    def __reduce__(self):
        return (os.system, ("touch ran",))


def test_every_kind_of_input_is_the_same_model(monkeypatch, capsys):
    state = {k: torch.from_numpy(v) for k, v in tensors(1).items()}
    turned = dict(state)
    turned["visual.blocks.0.w"] = state["visual.blocks.0.w"].t().contiguous().t()  # not contiguous
    save_file(tensors(0), "ZS.safetensors")
    save_file(tensors(1), "plain.safetensors")
    torch.save(state, "plain.pth")
    torch.save(turned, "turned.pt")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}, "optimizer": Optimizer()}, "epoch_3.pt"
    )
    torch.save({"state_dict": {k: torch.nn.Parameter(v) for k, v in state.items()}}, "parameters.bin")
    torch.save(state, "legacy.pth", _use_new_zipfile_serialization=False)
    for name, keys in (("model-1.safetensors", list(state)[:2]), ("model-2.safetensors", list(state)[2:])):
        Path("sharded").mkdir(exist_ok=True)
        save_file({k: state[k].numpy() for k in keys}, f"sharded/{name}")
    places = {k: f"model-{1 + (i >= 2)}.safetensors" for i, k in enumerate(state)}
    size = sum(v.numel() * 4 for v in state.values())
    Path("sharded/model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": places})
    )
    Path("hub").mkdir()
    torch.save(state, "hub/open_clip_pytorch_model.bin")
    expected = None
    inputs = [
        "plain.safetensors",
        "plain.pth",
        "turned.pt",
        "epoch_3.pt",
        "parameters.bin",
        "legacy.pth",
        "sharded",
        "hub",
    ]
    for given in [*inputs, "sharded/model.safetensors.index.json"]:
        streaming.merge(plan(WiseFT(0.3), models=(given,)), Path("out"), force=True)
        merged = {k: v.tobytes() for k, v in load_file("out/model.safetensors").items()}
        expected = expected or merged
        assert merged == expected, given
    assert not Path("ran").exists()


def test_a_folder_that_plain_open_clip_loads():
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    states = []
    for name in ("ZS", "A"):
        states.append(open_clip.CLIP(8, vision, text).state_dict())
        Path(name).mkdir()
        torch.save({"state_dict": states[-1], "epoch": 1}, f"{name}/epoch_1.pt")
    Path("ZS/open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    streaming.merge(plan(WiseFT(0.25), models=("A",), base="ZS"), Path("out"))
    loaded = open_clip.create_model(f"local-dir:{Path('out').resolve()}").state_dict()
    for name, value in loaded.items():
        torch.testing.assert_close(value, 0.75 * states[0][name] + 0.25 * states[1][name])


def test_tags_of_open_clip_go_through_its_own_loader(monkeypatch):
    import open_clip

    asked = []

    def create_model(name, pretrained=None, **more):
        asked.append((name, pretrained))
        model = torch.nn.Linear(2, 1)
        torch.nn.init.constant_(model.weight, 1.0 if pretrained == "openai" else 3.0)
        torch.nn.init.zeros_(model.bias)
        return model

    monkeypatch.setattr(open_clip, "create_model", create_model)
    metadata = streaming.merge(
        plan(Linear(), models=("open_clip:ViT-B-16/openai", "open_clip:ViT-B-16/laion"), base=None), Path("out")
    )
    assert asked == [("ViT-B-16", "openai"), ("ViT-B-16", "laion")]
    assert load_file("out/model.safetensors")["weight"].tolist() == [[2.0, 2.0]]
    assert [m["label"] for m in metadata["models"]] == ["ViT-B-16-openai", "ViT-B-16-laion"]
    assert all(len(m["blake3"]["tensors"]) == 64 for m in metadata["models"])  # there is no file to hash


def test_dtypes_integers_and_tied_weights(monkeypatch, capsys):
    half = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    word = torch.tensor([4.0, 8.0])
    bn = {"bn.num_batches_tracked": torch.tensor(10), "ids": torch.arange(3)}
    torch.save({"w": half, "v": word, "head": word, **bn}, "A.pt")
    torch.save(
        {"w": half.float() * 3, "v": word * 2, "head": word * 2, **bn, "bn.num_batches_tracked": torch.tensor(12)},
        "B.pt",
    )
    code, out, err = call(monkeypatch, capsys, "check", "A.pt", "B.pt")
    assert code == 0 and "note      2 integer tensors (bn.num_batches_tracked, ids) come from A" in out
    assert "dtypes differ: A bfloat16+float32; B float32; merged in float32, written as in A" in out
    assert "tied weights: 1 in A; written as separate tensors" in out
    code, out, err = call(monkeypatch, capsys, "merge", "A.pt", "B.pt", "--strategy", "linear", "-o", "out")
    assert code == 0 and err == "warning: bn.num_batches_tracked (I64) differs between A and B; A's is taken\n"
    from safetensors.torch import load_file as load_torch

    merged = load_torch("out/model.safetensors")
    assert merged["w"].dtype == torch.bfloat16 and merged["w"].tolist() == [2.0, 4.0]
    assert merged["v"].tolist() == merged["head"].tolist() == [6.0, 12.0]
    assert merged["bn.num_batches_tracked"].item() == 10 and merged["ids"].tolist() == [0, 1, 2]
    call(
        monkeypatch,
        capsys,
        *("merge", "A.pt", "B.pt", "--strategy", "linear", "-o", "out", "--force", "--dtype", "fp16"),
    )
    merged = load_torch("out/model.safetensors")
    assert {str(t.dtype) for t in merged.values()} == {"torch.float16", "torch.int64"}


def test_prompts_of_a_run_stay_prompts(monkeypatch, capsys):
    for i, name in enumerate(("A", "B", "C")):
        Prompt(torch.full((4, 2), float(i)), "a photo of a").save(
            Path(f"{name}.safetensors"), backbone="micro" if i < 2 else "clip"
        )
    assert (
        call(monkeypatch, capsys, *("merge", "A.safetensors", "B.safetensors", "--strategy", "linear", "-o", "out"))[0]
        == 0
    )
    merged = Prompt.load(Path("out/model.safetensors"))
    assert merged.init == "a photo of a" and merged.ctx.unique().tolist() == [0.5]
    code, _, err = call(
        monkeypatch, capsys, *("merge", "A.safetensors", "C.safetensors", "--strategy", "linear", "-o", "new")
    )
    assert code == 2 and "A and C are adapters of different backbone" in err and not Path("new").exists()


def test_heads_of_a_run_stay_heads_and_their_classes_must_be_in_one_order(monkeypatch, capsys):
    def head(value, names):
        return LinearHead(torch.full((2, 3), value), torch.zeros(2), names, True, chosen={"l2": value})

    for name, value, names in (("A", 1.0, ("a", "b")), ("B", 3.0, ("a", "b")), ("C", 3.0, ("b", "a"))):
        head(value, names).save(Path(f"{name}.safetensors"), backbone="micro")
        tower = Tower({"w": torch.full((2,), value)}, head(value, names))
        tower.save(Path(f"T{name}.safetensors"), backbone="micro")
    merge = ("merge", "--strategy", "linear", "-o")
    for prefix, cls, what in (("", LinearHead, "names"), ("T", Tower, "head")):
        files = [f"{prefix}{name}.safetensors" for name in "ABC"]
        assert call(monkeypatch, capsys, *merge, f"{prefix}out", *files[:2])[0] == 0
        merged = cls.load(Path(f"{prefix}out/model.safetensors"))
        found = merged if cls is LinearHead else merged.head
        assert found.names == ("a", "b") and found.normalise and found.weight.unique().tolist() == [2.0]
        code, _, err = call(monkeypatch, capsys, *merge, "new", files[0], files[2])
        assert code == 2 and f"A and {prefix}C are adapters of different {what}" in err and not Path("new").exists()


def test_models_of_one_name_get_labels_of_their_own(monkeypatch, capsys):
    for i, folder in enumerate(("x", "y", "z")):
        Path(folder).mkdir()
        save_file({"w": np.full(2, i, np.float32)}, f"{folder}/m.safetensors")
    words = (
        "merge",
        "y/m.safetensors",
        "z/m.safetensors",
        "--base",
        "x/m.safetensors",
        "--strategy",
        "ties",
        "-o",
        "out",
    )
    assert call(monkeypatch, capsys, *words, "density=1", "m-2=1", "m-3=0")[0] == 0
    recipe = read_metadata(Path("out"))[0]
    assert [m["label"] for m in (recipe["base"], *recipe["models"])] == ["m", "m-2", "m-3"]
    assert call(monkeypatch, capsys, "verify", "out")[0] == 0


def test_a_head_that_differs_can_be_kept(monkeypatch, capsys):
    save_file({"w": np.ones(3, np.float32), "head": np.ones(2, np.float32)}, "A.safetensors")
    save_file({"w": np.full(3, 3, np.float32), "head": np.ones(5, np.float32)}, "B.safetensors")
    words = ("merge", "A.safetensors", "B.safetensors", "--strategy", "linear", "-o", "out")
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2 and "A and B differ in head: (2,) against (5,)" in err and not Path("out").exists()
    assert call(monkeypatch, capsys, *words, "--keep", "head")[0] == 0
    merged = load_file("out/model.safetensors")
    assert merged["w"].tolist() == [2, 2, 2] and merged["head"].tolist() == [1, 1]


PAGE = (Path(__file__).parents[2] / "docs" / "merging.md").read_text()
RECIPE = next(block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.S) if "weights:" in block)
MERGEKIT = """
merge_method: ties
base_model: ZS.safetensors
models:
  - {model: ZS.safetensors}
  - model: A.safetensors
    parameters: {weight: 0.3, density: 0.5}
  - model: B.safetensors
    parameters: {weight: [0, 1]}
parameters: {normalize: false, lambda: 0.9}
dtype: bfloat16
"""


def test_a_recipe_with_a_weights_section(monkeypatch, capsys):
    three()
    Path("r.yaml").write_text(RECIPE)
    code, out, _ = call(monkeypatch, capsys, "merge", "r.yaml", "-o", "out", "scale=0.5", "birds=0.1", "density=0.4")
    assert code == 0
    recipe, _ = read_metadata(Path("out"))
    assert recipe["options"]["weights"] == [0.3, 0.1] and recipe["options"]["density"] == 0.4
    assert recipe["options"]["scale"] == 0.5 and recipe["dtype"] == "float32"
    assert call(monkeypatch, capsys, "check", "r.yaml")[0] == 0


def test_a_mergekit_recipe_runs_mergekits_variant(monkeypatch, capsys):
    three()
    Path("m.yml").write_text(MERGEKIT)
    code, out, _ = call(monkeypatch, capsys, "merge", "m.yml", "-o", "out")
    assert code == 0 and out.startswith(
        "mergekit's ties: weights=[0.3, [0.0, 1.0]] scale=0.9 densities=[0.5, 1.0] elect=weighted"
    )
    options = read_metadata(Path("out"))[0]["options"]
    assert options["trim"] == "tensor" and options["elect"] == "weighted" and options["mean"] is False


def test_mergekits_sce_is_its_variant(monkeypatch, capsys):
    three()
    models = "base_model: ZS.safetensors\nmodels: [{model: A.safetensors}, {model: B.safetensors}]\n"
    Path("m.yml").write_text(f"merge_method: sce\n{models}parameters: {{select_topk: 0.3, int8_mask: true}}\n")
    code, out, _ = call(monkeypatch, capsys, "merge", "m.yml", "-o", "out")
    assert code == 0 and out.startswith("mergekit's sce: density=0.3 share_of=varying mean=True equal_below=1e-06\n")
    Path("m.yml").write_text(f"merge_method: sce\n{models}")
    call(monkeypatch, capsys, "merge", "m.yml", "-o", "out", "--force")
    assert read_metadata(Path("out"))[0]["options"]["density"] == 1.0


MERGEKIT_WRONG = {
    "sce": ("merge_method: sce\nmodels: [{model: A}, {model: B}]", "sce needs a base_model"),
    "densty": (
        "merge_method: ties\nbase_model: Z\nmodels: [{model: A, parameters: {weight: 1, densty: 1}}]",
        "unknown parameter 'densty' (did you mean 'density'?)",
    ),
    "slices": ("merge_method: linear\nslices: []\nmodels: []", "slices is no list of slices"),
    "key": ("merge_method: linear\nmodls: [{model: A}]", "unknown key of mergekit's 'modls' (did you mean 'models'?)"),
    "method": ("merge_method: tie\nmodels: [{model: A}]", "unknown merge_method 'tie' (did you mean 'ties'?)"),
    "base": ("merge_method: ties\nmodels: [{model: A, parameters: {weight: 1}}]", "ties needs a base_model"),
    "weight": ("merge_method: linear\nmodels: [{model: A}, {model: B}]", "A has no weight"),
    "t": ("merge_method: slerp\nbase_model: A\nmodels: [{model: A}, {model: B}]", "t is missing"),
    "models": ("merge_method: linear\nmodels: 3", "models is a list"),
    "value": ("merge_method: linear\nmodels: [{model: A, parameters: {weight: much}}]", "'much' is no number"),
}


@pytest.mark.parametrize("case", MERGEKIT_WRONG)
def test_what_a_mergekit_recipe_may_not_say(case, monkeypatch, capsys):
    text, message = MERGEKIT_WRONG[case]
    Path("m.yaml").write_text(text)
    code, out, err = call(monkeypatch, capsys, "merge", "m.yaml", "-o", "out")
    assert code == 2 and message in err and err.count("\n") == 1 and not Path("out").exists()


TWO = ("A.safetensors", "B.safetensors", "--base", "ZS.safetensors", "-o", "out")
BAD = {
    "no model": (["-o", "out", "--strategy", "linear", "density=1"], "no model to merge"),
    "no strategy": ([*TWO], "which strategy? (give --strategy linear, for instance)"),
    "unknown strategy": ([*TWO, "--strategy", "tie"], "unknown strategy 'tie' (did you mean 'ties'?)"),
    "a strategy with data": ([*TWO, "--strategy", "mergetune"], "mergetune needs data or an evaluation (use `mergekit-vl run` with it)"),
    "unknown option": ([*TWO, "--strategy", "ties", "densty=1"], "unknown option or model 'densty' (did you mean 'density'?)"),
    "ill-typed option": ([*TWO, "--strategy", "ties", "density=much"], "density='much'"),
    "density outside": ([*TWO, "--strategy", "ties", "density=2"], "strategy ties: density=2 (it lies in 0 .. 1)"),
    "one weight": ([*TWO, "--strategy", "ties", "A=1"], "B has no weight (write B=NUMBER too)"),
    "no weights there": ([*TWO, "--strategy", "model_stock", "A=1", "B=1"], "takes no weight per model (its options are along)"),
    "weights that cancel": ([*TWO, "--strategy", "linear", "A=1", "B=-1", "ZS=0"], "the weights sum to zero"),
    "no base": (["A.safetensors", "-o", "out", "--strategy", "ties"], "needs the model that the others were tuned from"),
    "one model": (["A.safetensors", "-o", "out", "--strategy", "slerp"], "strategy slerp: 2 tuned models, not 1"),
    "missing": (["gone", "-o", "out", "--strategy", "linear"], "gone: no such model"),
    "empty": (["empty.safetensors", "-o", "out", "--strategy", "linear"], "empty.safetensors: damaged or truncated safetensors: it is empty"),
    "truncated": (["cut.safetensors", "-o", "out", "--strategy", "linear"], "cut.safetensors: damaged or truncated safetensors"),
    "not a checkpoint": (["text.pt", "-o", "out", "--strategy", "linear"], "text.pt: not a checkpoint"),
    "a zip": (["zip.pt", "-o", "out", "--strategy", "linear"], "zip.pt: a zip, but no checkpoint"),
    "TorchScript": (["script.pt", "-o", "out", "--strategy", "linear"], "script.pt: a TorchScript archive (save its state_dict"),
    "a missing shard": (["shards", "-o", "out", "--strategy", "linear"], "the shard two.safetensors is missing"),
    "a changed shard": (["changed", "-o", "out", "--strategy", "linear"], "one.safetensors holds no v, as its index tells"),
    "another size": (["resized", "-o", "out", "--strategy", "linear"], "the shards hold 8 bytes, the index tells of 12"),
    "many files": ([".", "-o", "out", "--strategy", "linear"], "which weights? found A.safetensors, B.safetensors"),
    "other architecture": (["A.safetensors", "other.safetensors", "-o", "out", "--strategy", "linear"], "visual.blocks.0.w: (40, 300) against missing and 2 more tensors"),
    "other shape": (["A.safetensors", "shape.safetensors", "-o", "out", "--strategy", "linear"], "logit_scale: () against (2,)"),
    "not finite": (["A.safetensors", "nan.safetensors", "-o", "out", "--strategy", "linear"], "nan: logit_scale has values that are not finite"),
    "float8": (["f8.safetensors", "-o", "out", "--strategy", "linear"], "dtype F8_E4M3 cannot be merged"),
    "exists": ([*TWO[:4], "-o", "done", "--strategy", "linear"], "done: exists (--force replaces it)"),
    "foreign folder": ([*TWO[:4], "-o", "taken", "--strategy", "linear", "--force"], "taken: holds files that no merge wrote"),
    "a file": ([*TWO[:4], "-o", "text.pt", "--strategy", "linear"], "text.pt: is a file; the output is a folder"),
    "unwritable": ([*TWO[:4], "-o", "text.pt/x", "--strategy", "linear"], "cannot be written"),
    "an input": (["done", "A.safetensors", "-o", "done", "--strategy", "linear", "--force"], "done: the output is the input done"),
    "max-ram": ([*TWO, "--strategy", "linear", "--max-ram", "1M"], "--max-ram 1M is too little"),
    "size": ([*TWO, "--strategy", "linear", "--max-ram", "much"], "--max-ram much (write 500M or 2G)"),
    "dtype": ([*TWO, "--strategy", "linear", "--dtype", "int8"], "unknown dtype 'int8'"),
    "keep": ([*TWO, "--strategy", "linear", "--keep", "haed"], "--keep haed covers no tensor"),
    "too large for float16": (["large.safetensors", "-o", "out", "--strategy", "linear", "--dtype", "float16"], "w has values too large for float16"),
    "no section": (["x.yaml", "-o", "out"], "x.yaml: has no `weights:` section"),
    "broken recipe": (["broken.yaml", "-o", "out"], "broken.yaml: broken YAML, line 2, column 1"),
    "seed of a recipe": (["seed.yaml", "-o", "out"], "seed.yaml: seed='many' (a whole number from 0)"),
    "no path": (["path.yaml", "-o", "out"], "path.yaml: {'weight': 1} is no model"),
    "two recipes": (["key.yaml", "path.yaml", "-o", "out"], "a recipe names its models itself"),
    "unknown key": (["key.yaml", "-o", "out"], "key.yaml: weights: unknown key 'modells' (did you mean 'models'?)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, tmp_path, monkeypatch, capsys):
    three()
    whole = Path("A.safetensors").read_bytes()
    Path("empty.safetensors").write_bytes(b"")
    Path("cut.safetensors").write_bytes(whole[:-10])
    Path("text.pt").write_text("hello")
    import zipfile

    with zipfile.ZipFile("zip.pt", "w") as archive:
        archive.writestr("x/readme.txt", "hello")
    with zipfile.ZipFile("script.pt", "w") as archive:
        archive.writestr("x/constants.pkl", "hello")
    for folder, tells, total in (
        ("shards", {"w": "one", "v": "two"}, None),
        ("changed", {"w": "one", "v": "one"}, None),
        ("resized", {"w": "one"}, 12),
    ):
        Path(folder).mkdir()
        save_file({"w": np.zeros(2, np.float32)}, f"{folder}/one.safetensors")
        index = {
            "metadata": {"total_size": total} if total else {},
            "weight_map": {k: f"{v}.safetensors" for k, v in tells.items()},
        }
        Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"w": np.zeros(2, np.float32)}, "other.safetensors")
    save_file(tensors(4) | {"logit_scale": np.zeros(2, np.float32)}, "shape.safetensors")
    save_file(tensors(4) | {"logit_scale": np.array(np.nan, np.float32)}, "nan.safetensors")
    save_file({"w": np.array([1e6], np.float32)}, "large.safetensors")
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    Path("f8.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    streaming.merge(plan(Linear()), Path("done"))
    Path("taken").mkdir()
    Path("taken/precious.txt").write_text("mine")
    Path("x.yaml").write_text("strategy: {name: linear}\n")
    Path("broken.yaml").write_text("weights: [\n")
    Path("seed.yaml").write_text("weights: {models: [a], strategy: linear, seed: many}\n")
    Path("path.yaml").write_text("weights: {models: [{weight: 1}], strategy: linear}\n")
    Path("key.yaml").write_text("weights: {modells: [a]}\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    arguments, message = BAD[case]
    code, out, err = call(monkeypatch, capsys, "merge", *arguments)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0], err
    assert "Traceback" not in err and not out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["changed", "done", "resized", "shards", "taken"]


def test_force_replaces_a_merge_and_only_a_merge():
    three()
    streaming.merge(plan(Linear()), Path("out"))
    with pytest.raises(UserError, match="exists"):
        streaming.merge(plan(Ties()), Path("out"))
    streaming.merge(plan(Ties()), Path("out"), force=True)
    assert read_metadata(Path("out"))[0]["strategy"] == "ties"
    assert sorted(p.name for p in Path().iterdir()) == ["A.safetensors", "B.safetensors", "ZS.safetensors", "out"]


@pytest.mark.parametrize("call_that_fails", ["posix_fallocate", "pwrite", "fdatasync", "fsync"])
def test_a_disk_that_fills_up_leaves_nothing(call_that_fails, monkeypatch):
    three()
    streaming.merge(plan(Linear()), Path("old"))
    before = Path("old/model.safetensors").read_bytes()
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > (2 if call_that_fails == "pwrite" else 0):
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(arguments[1])

    monkeypatch.setattr(os, call_that_fails, full)
    for out, force in (("new", False), ("old", True)):
        with pytest.raises(UserError, match="cannot be written: No space left on device"):
            streaming.merge(plan(TaskArithmetic()), Path(out), force=force, threads=2)
        calls.clear()
    assert sorted(p.name for p in Path().iterdir()) == ["A.safetensors", "B.safetensors", "ZS.safetensors", "old"]
    assert Path("old/model.safetensors").read_bytes() == before


def test_an_input_that_changes_meanwhile_is_refused(monkeypatch):
    three()
    apply = streaming.apply

    def meddle(*arguments):
        apply(*arguments)
        save_file(tensors(8), "A.safetensors")

    monkeypatch.setattr(streaming, "apply", meddle)
    with pytest.raises(UserError, match="A.safetensors: changed while it was read"):
        streaming.merge(plan(Linear()), Path("out"))
    assert not Path("out").exists()


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have it ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from mergekit_vl.strategies import linear
plain = linear.Linear.merge_chunk
def slow(self, chunk, stats):
    print("merging", flush=True)
    time.sleep(60)
    return plain(self, chunk, stats)
linear.Linear.merge_chunk = slow
sys.argv = ["mergekit-vl", "merge", "A.safetensors", "B.safetensors", "--strategy", "linear", "-o", "out", "--threads", "1"]
from mergekit_vl.commands.app import main
main()
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_merge_that_is_stopped_leaves_nothing(how):
    three()
    process = subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "merging\n"
    process.send_signal(how)
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0 and not Path("out").exists() and "Traceback" not in err
    left = [p.name for p in Path().iterdir() if p.name.startswith(".")]
    if how == signal.SIGKILL:  # nobody could tidy up: the next merge does
        assert sorted(left) == [".out.lock", ".out.merging"]
        streaming.merge(plan(Linear()), Path("out"))
        left = [p.name for p in Path().iterdir() if p.name.startswith(".")]
    else:
        assert process.returncode == 128 + how and err == "interrupted; nothing was written\n"
    assert not left


def test_a_second_merge_to_one_place_ends_at_once_and_names_the_first():
    import socket

    three()
    process = subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "merging\n"
        with pytest.raises(
            UserError, match=f"out: is being written by process {process.pid} on {socket.gethostname()}"
        ):
            streaming.merge(plan(Linear()), Path("out"), force=True)
        assert Path(".out.merging").is_dir()  # the first one's, as it was
    finally:
        process.kill()
        process.communicate()
    streaming.merge(plan(Linear()), Path("out"))  # the lock of a dead process is no lock
    assert not [p.name for p in Path().iterdir() if p.name.startswith(".")]


def test_a_lock_of_a_file_system_without_locks_goes_by_its_holder(tmp_path, monkeypatch):
    import fcntl
    import socket

    from mergekit_vl.system.locks import locked

    def none(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    file = tmp_path / "lock"
    for holder in (f"{os.getpid()} {socket.gethostname()}", "1 elsewhere"):
        file.write_text(holder + "\n")
        with (
            pytest.raises(UserError, match=f"process {holder.replace(' ', ' on ')}"),
            locked(file, where=tmp_path, hint=""),
        ):
            pass
        assert file.read_text() == holder + "\n"
    file.write_text(f"{dead.pid} {socket.gethostname()}\n")
    with locked(file, where=tmp_path, hint=""):
        assert file.read_text() == f"{os.getpid()} {socket.gethostname()}\n"
    assert not file.exists()


def peak(*arguments):
    """Peak resident megabytes of a merge in its own process."""
    code = "from mergekit_vl.commands.app import main\ntry: main()\nexcept SystemExit as e: assert not e.code, e\n"
    code += "print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024)"
    done = subprocess.run([sys.executable, "-c", code, "merge", *arguments, "--quiet"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def sparse(name, elements):
    """A model of zeros that takes no room."""
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [elements // 1024, 1024], "data_offsets": [0, 4 * elements]}}
    ).encode()
    with open(name, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * elements)


@pytest.mark.parametrize("strategy", ["linear", "ties", "slerp"])
def test_memory_grows_with_neither_models_nor_their_number(strategy):
    for i in range(20):
        sparse(f"{i}.safetensors", 1 << 21)
    for name in "xyz":
        sparse(f"{name}.safetensors", 1 << 25)
    many = [f"{i}.safetensors" for i in range(1, 20)]
    base, flags = ["--base", "0.safetensors"], ["--strategy", strategy, "--threads", "2", "-o"]
    if strategy == "slerp":
        few = peak(*many[:2], *flags, "few")
    else:
        few = peak(*many[:2], *base, *flags, "few")
        assert peak(*many, *base, *flags, "many") < few + 60  # 19 models of 8 MB would be 152
    assert (
        peak("x.safetensors", "y.safetensors", *(["--base", "z.safetensors"] * (strategy != "slerp")), *flags, "large")
        < few + 25
    )
    assert few < 150  # 128 MB a model, and the interpreter


def test_max_ram_is_kept():
    for name in "xyz":
        sparse(f"{name}.safetensors", 1 << 24)
    flags = ("--strategy", "dare_ties", "--threads", "4", "-o", "out", "--max-ram", "90M")
    assert peak("x.safetensors", "y.safetensors", "--base", "z.safetensors", *flags) < 90


@pytest.mark.parametrize("strategy", ["tsv_m", "iso_c", "iso_cts"])
def test_max_ram_is_kept_by_methods_that_hold_matrices(strategy, monkeypatch, capsys):
    three({"visual.blocks.0.w": (700, 700), "visual.blocks.1.w": (500, 800), "token_embedding.weight": (8000, 64)})
    words = ("A.safetensors", "B.safetensors", "--base", "ZS.safetensors", "--strategy", strategy, "--threads", "2")
    words = (*words, "averaged=[token_embedding]", "-o", "out")
    monkeypatch.setattr(memory, "anonymous_memory", lambda: 30 << 20)  # of a process that has merged nothing yet
    code, _, err = call(monkeypatch, capsys, "merge", *words, "--max-ram", "40M")
    needed = int(re.search(r"too little: (\d+)M are needed", err)[1])
    assert code == 2 and 60 < needed < 140
    assert peak(*words, "--max-ram", f"{needed + 20}M") < needed + 20


def test_check_tells_what_svds_take(monkeypatch, capsys):
    three({"visual.blocks.0.w": (2000, 1000), "b": (9,)})
    words = ("A.safetensors", "B.safetensors", "--base", "ZS.safetensors", "--strategy")
    _, out, _ = call(monkeypatch, capsys, "check", *words, "tsv_m")
    assert "form      tensor, at most 22 arrays of a matrix's size at a time, 1 pass over the files" in out
    seconds = float(re.search(r"time      about (\S+) s", out)[1])
    assert seconds > 4 * 1.0 / threads_available()


def test_svds_on_another_device_give_the_same_model(monkeypatch, capsys):
    three({"visual.blocks.0.w": (40, 30), "b": (9,)})
    words = ("merge", "A.safetensors", "B.safetensors", "--base", "ZS.safetensors", "--strategy", "tsv_m", "-o")
    for out, device in (("numpy", "cpu"), ("torch", "cpu:0")):  # as on a GPU, but there
        assert call(monkeypatch, capsys, *words, out, "--device", device)[0] == 0
        assert call(monkeypatch, capsys, "verify", out)[0] == 0
    ours, theirs = (load_file(f"{out}/model.safetensors") for out in ("numpy", "torch"))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)
    assert '"device":"cpu:0"' in canonical(read_metadata(Path("torch"))[0])
    code, _, err = call(monkeypatch, capsys, *words, "new", "--device", "tpu")
    assert code == 2 and "unknown device 'tpu'" in err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = call(monkeypatch, capsys, *words, "new", "--device", "cuda")
    assert code == 2 and "no GPU is visible to torch" in err and not Path("new").exists()


def test_check_reads_headers_only_and_estimates(monkeypatch, capsys):
    for name in ("ZS", "A", "B"):
        sparse(f"{name}.safetensors", 1 << 20)
    monkeypatch.setattr(
        "mergekit_vl.checkpoints.checkpoint.Checkpoint.raw", lambda *a: pytest.fail("a tensor was read")
    )
    code, out, _ = call(
        monkeypatch,
        capsys,
        *("check", "A.safetensors", "B.safetensors", "--base", "ZS.safetensors", "--strategy", "ties"),
    )
    assert code == 0 and "base      ZS: 1 tensors, 1.0 M elements, F32, 4.2 MB" in out
    for line in (
        "strategy  ties: density=0.2",
        "3 passes over the files",
        "memory    about ",
        "disk      4.2 MB",
        "time      about ",
        "ok  ",
    ):
        assert line in out
    code, _, err = call(monkeypatch, capsys, "check", "A.safetensors", "gone.safetensors")
    assert code == 2 and "gone.safetensors: no such model" in err


def test_no_torch_is_imported_for_files():
    three()
    torch.save({k: torch.from_numpy(v) for k, v in tensors(1).items()}, "A.pt")
    for arguments in (
        ["check", *TWO[:4]],
        ["merge", "A.pt", *TWO[1:], "--strategy", "dare_ties"],
        ["verify", "out"],
        ["show", "ties"],
    ):
        code = f"import sys; sys.modules['torch'] = None; sys.argv = {['mergekit-vl', *arguments]!r}; from mergekit_vl.commands.app import main; main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout and not done.stderr, (arguments, done.stderr)


def test_what_may_not_be_meant_is_warned_of(monkeypatch, capsys):
    three()
    words = ("A.safetensors", "B.safetensors", "--base", "ZS.safetensors", "--strategy", "slerp")
    for command in (("merge", *words, "-o", "out"), ("check", *words)):
        code, out, err = call(monkeypatch, capsys, *command)
        assert code == 0 and "slerp merges the tuned models alone: of the base it takes nothing but" in out + err
    code, _, err = call(monkeypatch, capsys, "merge", "A.safetensors", *words[2:], "-o", "from base")
    assert code == 0 and "alone" not in err
    _, _, err = call(
        monkeypatch, capsys, "merge", "A.safetensors", "A.safetensors", "--strategy", "linear", "-o", "twice"
    )
    assert "warning: the same file is given twice" in err
    raw, averaged = ({k: torch.from_numpy(v) for k, v in tensors(seed).items()} for seed in (1, 2))
    torch.save({"state_dict": raw, "state_dict_ema": averaged}, "ema.pt")
    _, _, err = call(monkeypatch, capsys, "merge", "ema.pt", "--strategy", "linear", "-o", "raw")
    assert "warning: ema holds averaged weights too (state_dict_ema), which are not taken" in err
    assert all(np.array_equal(v, raw[k]) for k, v in load_file("raw/model.safetensors").items())


def test_an_output_that_is_a_link_is_refused(monkeypatch, capsys):
    three()
    Path("real").mkdir()
    Path("link").symlink_to("real")
    code, _, err = call(monkeypatch, capsys, "merge", "A.safetensors", "--strategy", "linear", "-o", "link")
    assert code == 2 and "link: is a link (name what it leads to: " in err
    assert Path("link").is_symlink() and not list(Path("real").iterdir())


def test_weights_are_given_once(monkeypatch, capsys):
    three()
    words = ("merge", "A.safetensors", "B.safetensors", "--strategy", "linear", "-o", "out")
    code, _, err = call(monkeypatch, capsys, *words, "weights=[0.1,0.9]", "A=1", "B=0.4")
    assert code == 2 and "weights= and weights by label (A, B) (give one of them)" in err
