"""What people bring to `predict` and `eval`: a model's own class names, averaged weights, prefixes, folders of merges, one bad picture among good ones."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from mergekit_vl.adapters.linear_head import rows_by_config
from mergekit_vl.commands import app
from mergekit_vl.errors import UserError

pytestmark = pytest.mark.filterwarnings("always")
LETTERS = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERGEKIT_VL_CACHE", str(tmp_path / "cache"))
    Image.new("RGB", (8, 8), (9, 99, 9)).save("x.png")


@pytest.fixture
def call(monkeypatch, capsys):
    def called(*words):
        monkeypatch.setattr(sys, "argv", ["mergekit-vl", *words])
        with pytest.raises(SystemExit) as stop:
            app.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return called


def net(seed):
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=3).state_dict()


def test_the_names_of_a_models_own_config(call):
    Path("a").mkdir()
    save_file({k: v.contiguous() for k, v in net(1).items()}, "a/model.safetensors")
    Path("a/config.json").write_text(
        json.dumps({"architecture": "test_resnet", "num_classes": 3, "label_names": LETTERS})
    )
    code, plain, err = call("predict", "vision:test_resnet:a", "x.png")
    assert code == 0 and "ant" in plain, err
    assert call("predict", "a", "x.png")[1] == plain
    assert call("predict", "a", "x.png", "--classes", "cat,bee,ant")[1] == plain  # by name, in whatever order
    code, other, err = call("predict", "a", "x.png", "--classes", "x,y,z")
    assert code == 0 and "calls its classes 'ant', 'bee' ...; the names that are asked for are taken by place" in err
    code, _, err = call("predict", "a", "x.png", "--classes", "ant,dog,bee")
    assert code == 2 and "knows no class 'dog'" in err


def test_rows_are_found_whatever_the_case():
    assert rows_by_config(("Red_Kite", "t-shirt"), ("T-shirt", "red kite"), "m") == [1, 0]
    assert rows_by_config((), ("a", "b"), "m") is None


def test_averaged_weights_are_told_and_taken(call):
    torch.save({"state_dict": net(1), "state_dict_ema": net(2)}, "a.pth.tar")
    words = ("predict", "vision:test_resnet:a.pth.tar", "x.png", "--classes", ",".join(LETTERS))
    code, plain, err = call(*words)
    assert code == 0 and "averaged weights too (state_dict_ema), and the plain ones are taken: --weights ema" in err
    code, averaged, err = call(*words, "--weights", "ema")
    assert code == 0 and averaged != plain and "averaged" not in err
    torch.save(net(2), "e.pth")
    assert call("predict", "vision:test_resnet:e.pth", *words[2:])[1] == averaged


def test_a_prefix_before_the_names_of_a_backbone(call):
    torch.save(
        {"state_dict": {f"model.{name}": value for name, value in net(1).items()} | {"loss.w": torch.ones(2)}}, "a.ckpt"
    )
    torch.save(net(1), "b.pth")
    words = ("x.png", "--classes", ",".join(LETTERS))
    code, out, err = call("predict", "vision:test_resnet:a.ckpt", *words)
    assert (
        code == 0 and "its names begin with 'model.', which is taken off; 1 beside that prefix left out (loss.w)" in err
    )
    assert out == call("predict", "vision:test_resnet:b.pth", *words)[1]


def test_one_bad_picture_does_not_end_a_folder(call):
    Path("d").mkdir()
    for name in "ac":
        Image.new("RGB", (8, 8)).save(f"d/{name}.png")
    Path("d/b.png").write_bytes(b"no image")
    code, out, err = call("predict", "micro", "d", "--classes", "fish,boat")
    assert code == 0 and "d/a.png" in out and "d/c.png" in out and "d/b.png: cannot be decoded: left out" in err
    for name in "ac":
        Path(f"d/{name}.png").write_bytes(b"")
    code, out, err = call("predict", "micro", "d", "--classes", "fish,boat")
    assert code == 2 and "none of 3 images can be decoded" in err


def test_names_twice_and_in_other_forms(call):
    Path("n.json").write_text(json.dumps({"0": "fish", "1": "boat"}))
    assert "fish" in call("predict", "micro", "x.png", "--classes", "n.json")[1]
    Path("n.txt").write_text("fish\nboat\nfish\n")
    code, out, err = call("predict", "micro", "x.png", "--classes", "n.txt")
    assert code == 0 and "1 class name used more than once: fish" in err


@pytest.mark.parametrize("given", ["clip:NoSuchThing", "vision:nosuchthing_xyzq"])
def test_an_unknown_architecture_does_not_print_all(given, call):
    code, _, err = call("predict", given, "x.png", "--classes", "a,b")
    assert code == 2 and len(err) < 400


def test_a_folder_that_is_no_model(call):
    Path("hf").mkdir()
    Path("hf/config.json").write_text(json.dumps({"architectures": ["ViTForImageClassification"], "model_type": "vit"}))
    code, _, err = call("predict", "hf", "x.png", "--classes", "a,b")
    assert code == 2 and "ViTForImageClassification (name it: clip:ARCH:FOLDER" in err
    code, _, err = call("predict", "openai/clip", "x.png", "--classes", "a,b")
    assert code == 2 and "clip:hf-hub:openai/clip" in err


def test_another_methods_prompts_are_named(call):
    from mergekit_vl.storage.tuned import _check_method

    with pytest.raises(UserError, match="MaPLe's prompts of both towers, a method that is not here"):
        _check_method({"prompt_learner.ctx": (2, 8), "prompt_learner.proj.weight": (8, 8)}, Path("m.pth"))
    with pytest.raises(UserError, match="factors of low-rank updates"):
        _check_method({"q.lora_A": (2, 8), "q.lora_B": (8, 2)}, Path("m.pth"))


def test_json_of_eval_is_what_clip_benchmark_builds_from(call, monkeypatch):
    monkeypatch.setattr("mergekit_vl.microworld.tasks.PER_CLASS", {"train": 4, "val": 2, "test": 3})
    code, out, err = call("eval", "micro", "--dataset", "microworld", "task=sea_and_sky_emboss", "--json")
    data = json.loads(out)
    row = {**data["metrics"], **data}  # clip_benchmark/cli.py, main_build
    del row["metrics"]
    assert code == 0 and isinstance(row["model"] + " " + row["pretrained"], str) and row["dataset"] and row["task"]
