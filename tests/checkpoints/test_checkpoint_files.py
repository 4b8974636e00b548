"""Checkpoints that people have: read as tensors, nothing in them runs, and what is wrong with one is said in a line."""

import json
import pickle
import subprocess
import sys
import textwrap
import warnings
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.backbones.micro import Micro
from mergekit_vl.checkpoints import torch_io
from mergekit_vl.errors import UserError
from mergekit_vl.reporter import SILENT

DASSL = """
    import sys, types, torch
    # a scheduler as Dassl keeps it: alive, of a module that nobody has, holding the optimizer and the prompt itself
    gone = types.ModuleType("dassl.optim.lr_scheduler")
    class ConstantWarmupScheduler:
        def __init__(self, optimizer):
            self.optimizer, self.successor, self.last_epoch = optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50), 3
    ConstantWarmupScheduler.__module__ = gone.__name__
    ConstantWarmupScheduler.__qualname__ = "ConstantWarmupScheduler"
    gone.ConstantWarmupScheduler = ConstantWarmupScheduler
    sys.modules |= {"dassl": types.ModuleType("dassl"), "dassl.optim": types.ModuleType("dassl.optim"), gone.__name__: gone}
    state = torch.load(sys.argv[1] + "/state.pt", weights_only=False)
    ctx = torch.nn.Parameter(state["ctx"].clone())
    optimizer = torch.optim.SGD([ctx], lr=0.002, momentum=0.9)
    ctx.sum().backward(); optimizer.step()
    scheduler = ConstantWarmupScheduler(optimizer)
    content = {"state_dict": state, "epoch": 50, "optimizer": optimizer.state_dict(),
               "scheduler": vars(scheduler) | {"itself": scheduler}, "val_result": None}
    torch.save(content, sys.argv[1] + "/zip.pth.tar-50")
    torch.save(content, sys.argv[1] + "/legacy.pth.tar-50", _use_new_zipfile_serialization=False)
"""


@pytest.fixture(scope="module")
def micro():
    return Micro().build("cpu")


@pytest.fixture(scope="module")
def dassl(tmp_path_factory, micro):
    """A folder with the same prompt as Dassl writes it, in torch's present format and in the one before 1.6."""
    folder = tmp_path_factory.mktemp("prompt_learner")
    ctx = micro.embed("a photo of a") + 0.01 * torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    before = micro.text.before()
    state = OrderedDict(ctx=ctx, token_prefix=before.expand(3, 1, 128).clone(), token_suffix=torch.zeros(3, 19, 128))
    torch.save(state, folder / "state.pt")
    subprocess.run([sys.executable, "-c", textwrap.dedent(DASSL), str(folder)], check=True)
    return folder, ctx


@pytest.mark.parametrize("format", ["zip", "legacy"])
def test_a_coop_prompt_with_a_live_scheduler_of_an_unimportable_module(dassl, micro, format):
    folder, ctx = dassl
    file = folder / f"{format}.pth.tar-50"
    with pytest.raises((pickle.UnpicklingError, ModuleNotFoundError)):  # what the usual door does with it
        torch.load(file, weights_only=True)
    prompt = Prompt.load(file)
    assert torch.equal(prompt.ctx, ctx) and prompt.init == "a photo of a"
    prompt.check(micro)
    assert Prompt.load(file).with_init("a sketch of a").init == "a sketch of a"


class Runs:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (exec, (f"open({str(self.mark)!r}, 'w').close()",))


@pytest.mark.parametrize("new", [True, False])
def test_a_file_that_would_run_code_does_not(tmp_path, new):
    mark, file = tmp_path / "ran", tmp_path / "evil.pth.tar-1"
    torch.save(
        {"state_dict": {"ctx": torch.ones(4, 8)}, "scheduler": Runs(mark)}, file, _use_new_zipfile_serialization=new
    )
    assert torch.equal(Prompt.load(file).ctx, torch.ones(4, 8))
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists()  # the fixture bites


class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)
        self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float16))
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x):
        return self.inner(x) * self.scale


def test_every_kind_of_file_gives_the_same_tensors(tmp_path):
    tower = Tower()
    state = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    training = {"epoch": 3, "name": "run", "state_dict": {f"module.{name}": t for name, t in state.items()}}
    torch.save(training, tmp_path / "epoch_3.pt")
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.save(tower.half(), tmp_path / "whole_module.pt")
    state |= {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    with warnings.catch_warnings(action="ignore"):  # torch.jit is deprecated, OpenAI's files stay
        torch.jit.save(torch.jit.script(tower), tmp_path / "openai.pt")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "model").mkdir()
    save_file(state, tmp_path / "model" / "open_clip_model.safetensors")
    for name in ("epoch_3.pt", "old.bin", "openai.pt", "whole_module.pt", "model.safetensors", "model"):
        found = torch_io.read(tmp_path / name)
        assert found.keys() == state.keys(), name
        assert all(torch.equal(found[key].half(), state[key].half()) for key in state), name


def test_a_renamed_file_is_read_for_what_it_is_and_a_cut_one_is_said_to_be(tmp_path):
    state = {"weight": torch.arange(300.0)}
    torch.save(state, tmp_path / "zip.safetensors")
    save_file(state, tmp_path / "real.pt")
    torch.save(state, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    for name in ("zip.safetensors", "real.pt", "legacy"):
        assert torch.equal(torch_io.read(tmp_path / name)["weight"], state["weight"])
        content = (tmp_path / name).read_bytes()
        for share in (0.1, 0.5, 0.9):
            (tmp_path / f"cut-{name}").write_bytes(content[: int(len(content) * share)])
            with pytest.raises(UserError, match=f"cut-{name}: damaged"):
                torch_io.read(tmp_path / f"cut-{name}")
    (tmp_path / "page.pt").write_text("<html>404</html>")
    with pytest.raises(UserError, match="page.pt: it is a web page, and not the file"):
        torch_io.read(tmp_path / "page.pt")


def test_another_architecture_is_told_by_the_first_three_tensors():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 9))
    given = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 8))
    message = r"""f.pt: a checkpoint of another architecture, 4 tensors differ: 0.weight is \(2, 4\) in the checkpoint, \(2, 3\) in the
        model; 1.bias is missing in the checkpoint, \(2,\) in the model; 2.weight is \(8, 2\) in the checkpoint, \(9, 2\) in the model
        \(give its own\)"""
    with pytest.raises(UserError, match=" ".join(message.split())):
        torch_io.load_into(model, given.state_dict(), where="f.pt", hint="give its own")


def test_prompts_that_do_not_fit_say_so(tmp_path, micro, dassl):
    def refused(state, match, file="p.pth.tar-2"):
        torch.save({"state_dict": state}, tmp_path / file)
        with pytest.raises(UserError, match=match):
            Prompt.load(tmp_path / file).check(micro)

    refused({"ctx": torch.ones(4, 512)}, "the prompt is 512 wide, micro needs 128")
    refused({"ctx": torch.ones(5, 4, 128)}, r"one context per class, \[5, 4, 128\], and the file does not tell which")
    refused({"ctx": torch.ones(4, 128), "meta_net.linear1.weight": torch.ones(1)}, "not a prompt: it holds meta_net")
    refused({"ctx": torch.ones(4, 128), "token_prefix": torch.ones(2, 1, 128)}, "tuned on another model than micro")
    refused({"ctx": torch.full((4, 128), torch.nan)}, "ctx has values that are not finite")
    half = {"ctx": dassl[1].half(), "token_prefix": micro.text.before().half()[None]}
    torch.save({"state_dict": half}, tmp_path / "half.pth.tar-1")
    Prompt.load(tmp_path / "half.pth.tar-1").check(micro)


def test_a_context_of_another_length_has_no_zero_shot_point_until_its_words_are_given(tmp_path, micro):
    torch.save({"state_dict": {"ctx": torch.ones(5, 128)}}, tmp_path / "five.pth.tar-1")
    with pytest.raises(UserError, match="started at random .* {checkpoint: FILE, init: a photo of a}"):
        Prompt.load(tmp_path / "five.pth.tar-1").untuned(micro)
    assert Prompt.load(tmp_path / "five.pth.tar-1").with_init("a photo of a big").untuned(micro).ctx.shape == (5, 128)


def test_a_recipe_continues_from_a_coop_checkpoint(dassl, tmp_path, micro):
    from mergekit_vl.experiments import experiment
    from mergekit_vl.models.features import FeatureStore
    from mergekit_vl.recipes import recipe
    from mergekit_vl.registry import plugins

    folder, ctx = dassl
    plain = {
        "dataset": {"name": "microworld", "task": "animals_emboss"},
        "protocol": {"name": "base_to_novel", "shots": 1},
        "tuned": [{"checkpoint": str(folder / "zip.pth.tar-50"), "label": "coop", "init": "a photo of a"}],
        "strategy": {"name": "wise_ft"},
    }
    plan = recipe.parse(plain, name="r", where="r.yaml")
    ready = experiment.build(plan, plugins.load_plugins())
    assert ready.rows == ("zero-shot", "coop", "wise_ft")
    store = FeatureStore(tmp_path / "cache")
    experiment.run(ready, tmp_path / "out", device="cpu", store=store, reporter=SILENT)
    merged = Prompt.load(tmp_path / "out" / "merged.safetensors")
    assert torch.allclose(merged.ctx, (ctx + micro.embed("a photo of a")) / 2, atol=1e-6)
    assert json.loads((tmp_path / "out" / "scores.json").read_text())
    with pytest.raises(UserError, match="tuned.0 needs either a tuner or a checkpoint"):
        recipe.parse({**plain, "tuned": [{"checkpoint": "x", "words": "y"}]}, name="r", where="r.yaml")
