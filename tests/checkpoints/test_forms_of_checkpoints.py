"""What people bring as checkpoints: whole modules, weights under any key, averaged weights beside plain ones, foreign formats, other methods' files."""

import pickle

import hostile
import pytest
import torch
from torch import nn

from mergekit_vl.checkpoints import torch_io
from mergekit_vl.checkpoints.foreign import FORMATS, hub_hint, method_of, recognised
from mergekit_vl.checkpoints.prefixes import find
from mergekit_vl.checkpoints.reader import open_checkpoint, taking
from mergekit_vl.errors import UserError


class Net(nn.Module):
    def __init__(self, value=1.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.register_buffer("seen", torch.ones(1))
        self.register_buffer("made", torch.ones(1), persistent=False)
        with torch.no_grad():
            self.body[0].weight.fill_(value)


NAMES = {"body.0.weight", "body.0.bias", "seen"}


def saved(tmp_path, content, name="m.pt", **how):
    torch.save(content, tmp_path / name, **how)
    return tmp_path / name


@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("wrap", [lambda n: n, lambda n: {"model": n, "epoch": 3}, nn.DataParallel, lambda n: {"args": {"lr": 0.1}, "net": n}])  # fmt: skip
def test_whole_modules_are_read_for_their_tensors(wrap, how, tmp_path):
    file = saved(tmp_path, wrap(Net(4.0)), **how)
    found = torch_io.read(file)
    assert found.keys() == NAMES and found["body.0.weight"].unique().tolist() == [4]
    assert any(
        "a whole module" in note and "none of its code is run" in note for note in open_checkpoint(str(file)).notes
    )


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def test_a_module_that_would_run_code_does_not(tmp_path):
    net = Net()
    net.hook = Evil()
    assert torch_io.read(saved(tmp_path, net)).keys() == NAMES


def test_a_module_within_itself_ends(tmp_path):
    body = (
        hostile.named("torch.nn", "Module")
        + b")\x81q\x00}("
        + hostile.text("_modules")
        + b"}("
        + hostile.text("a")
        + b"h\x00uub"
    )
    with pytest.raises(UserError, match="more than 100 deep, or one holds itself"):
        open_checkpoint(str(hostile.archive(tmp_path / "m.pt", body)))


@pytest.mark.parametrize(
    "path", ["net", "teacher", "params", "generator", "checkpoint.state_dict", "a.b.c", "model.net"]
)
def test_weights_under_any_key(path, tmp_path):
    content = Net().state_dict()
    for key in reversed(path.split(".")):
        content = {key: content, "step": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    file = saved(tmp_path, content)
    assert torch_io.read(file).keys() == NAMES
    assert any(path in note for note in open_checkpoint(str(file)).notes)


def test_several_models_are_refused_until_one_is_named(tmp_path):
    file = saved(tmp_path, {"student": Net(1.0).state_dict(), "teacher": Net(2.0).state_dict()})
    with pytest.raises(UserError, match="several models in it: student, teacher .--weights student takes that one"):
        torch_io.read(file)
    with taking("teacher"):
        assert torch_io.read(file)["body.0.weight"].unique().tolist() == [2]
    with taking("other"), pytest.raises(UserError, match="no weights 'other' in it .there are student, teacher"):
        torch_io.read(file)


def test_parts_are_one_model(tmp_path):
    found = torch_io.read(saved(tmp_path, {"encoder": {"w": torch.ones(2)}, "head": {"weight": torch.ones(3)}}))
    assert found.keys() == {"encoder.w", "head.weight"}


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema", "swa_state_dict", "ema_state_dict"])
def test_averaged_weights_beside_plain_ones(key, tmp_path):
    file = saved(tmp_path, {"state_dict": Net(1.0).state_dict(), key: Net(2.0).state_dict()})
    assert torch_io.read(file)["body.0.weight"].unique().tolist() == [1]
    assert f"averaged weights too ({key}), and the plain ones are taken" in open_checkpoint(str(file)).told()[0]
    with taking("ema"):
        assert torch_io.read(file)["body.0.weight"].unique().tolist() == [2]
    with taking("ema"), pytest.raises(UserError, match="holds no averaged weights"):
        torch_io.read(saved(tmp_path, Net().state_dict(), "plain.pt"))


def test_torchs_averaged_model(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(Net())
    assert torch_io.read(saved(tmp_path, averaged.state_dict())).keys() >= NAMES


FOREIGN = {
    "m.onnx": b"\x08\x08\x12\x07pytorch" + bytes(99),
    "m.h5": b"\x89HDF\r\n\x1a\n" + bytes(99),
    "m.gguf": b"GGUF" + bytes(99),
    "m.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "m.bin": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "page.pth": b"<!DOCTYPE html><html>",
    "m.tflite": b"\0\0\0\0TFL3" + bytes(99),
    "m.pb": b"\x0a\x01" + bytes(99),
    "flax_model.msgpack": b"\x81" + bytes(99),
    "m.npy": b"\x93NUMPY" + bytes(99),
    "m.pt.gz": b"\x1f\x8b" + bytes(99),
    "m.tar.7z": b"7z\xbc\xaf\x27\x1c" + bytes(99),
    "__0_0.distcp": bytes(99),
    "cat.jpg": b"\xff\xd8\xff" + bytes(99),
    "config.json": b"{}" + b" " * 99,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_named_with_the_next_step(name, tmp_path):
    (tmp_path / name).write_bytes(FOREIGN[name])
    found = recognised(FOREIGN[name], name)
    with pytest.raises(UserError) as told:
        open_checkpoint(str(tmp_path / name))
    assert found in FORMATS and found.what in str(told.value) and found.step in str(told.value)


def test_a_folder_of_another_format(tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(b"\x81")
    with pytest.raises(UserError, match="it holds Flax weights, and no weights that are read here"):
        open_checkpoint(str(tmp_path))


def test_a_name_of_the_hub_without_its_prefix():
    with pytest.raises(UserError, match="a model of the hub is hf-hub:openai/clip-vit-base-patch32"):
        open_checkpoint("openai/clip-vit-base-patch32")
    assert not hub_hint("model.pt") and not hub_hint("./a/b") and not hub_hint("a/b/c")


def test_an_object_without_tensors_is_named(tmp_path):
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(UserError):
        open_checkpoint(str(tmp_path / "m.pkl"))
    with pytest.raises(UserError, match="one tensor without a name, as Tip-Adapter saves its cache"):
        torch_io.read(saved(tmp_path, torch.ones(3, 4)))
    with pytest.raises(UserError, match="its keys are epoch, lr"):
        torch_io.read(saved(tmp_path, {"epoch": 3, "lr": 0.1}))


METHODS = {
    "MaPLe": ["prompt_learner.ctx", "prompt_learner.proj.weight", "prompt_learner.compound_prompts_text.0"],
    "PromptSRC": ["prompt_learner.ctx", "image_encoder.VPT", "image_encoder.transformer.resblocks.1.VPT_shallow"],
    "CoCoOp": ["ctx", "meta_net.linear1.weight"],
    "TaskRes": ["prompt_learner.text_feature_residuals"],
    "CLIP-Adapter": ["fc.0.weight", "fc.2.weight"],
    "Tip-Adapter": ["cache_keys", "cache_values"],
    "another": ["prompt_embeddings", "head.weight"],
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_files_are_called_what_they_are(method):
    assert method in method_of(METHODS[method]).what


def test_what_is_read_is_no_other_method():
    for names in (
        ["ctx"],
        ["ctx", "token_prefix", "token_suffix"],
        ["prompt_learner.ctx"],
        ["visual.proj", "ln.weight"],
    ):
        assert method_of(names) is None


def test_prefixes_are_found_by_names_and_shapes():
    wanted = {"a.w": (2,), "a.b": (3,), "c.w": (4,)}
    for prefix in ("model.", "clip.", "x.y."):
        found, _ = find(wanted, {prefix + name: shape for name, shape in wanted.items()} | {"other": (9,)})
        assert found.given == prefix and found.renamed("other") is None and found.renamed(prefix + "a.w") == "a.w"
    assert find(wanted, wanted) == (None, []) and find(wanted, {})[0] is None
    assert find(wanted, {"m." + name: (7, 7) for name in wanted})[0] is None
