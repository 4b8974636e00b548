"""Every command line of the README, the docs and the recipes' heads: it parses, and does what can be done in seconds.

Models of hubs and people's own files are replaced by the stand-ins of one table. What takes minutes (`run`, `bench`, `landscape`) is
parsed with its own options and then planned: `check`, `bench --dry-run`.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

from mergekit_vl.backbones import clip
from mergekit_vl.backbones.micro import Micro
from mergekit_vl.commands import app
from mergekit_vl.experiments import experiment
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.recipes.loading import load_recipe
from mergekit_vl.registry.plugins import load_plugins
from mergekit_vl.reporter import SILENT

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*.yaml"))]
STAND_INS = {
    r"ViT-B-16 backbone\.pretrained=openai": "small backbone.pretrained=ZS.safetensors",
    r"ViT-B-16, pretrained: openai": "small, pretrained: ZS.safetensors",
    r"clip:ViT-B-16:openai": "clip:small:ZS.safetensors",
    r"resnet50(\.a1_in1k)?": "test_resnet",
    r"\bMODEL\b": "clip:small:ZS.safetensors",
    r"\bRECIPE\b": "mergetune_coop",
    r"\bNAME\b": "mergetune",
    r"--(images|plugins-dir) FOLDER": r"--\1 plug",
}
"""What the docs name and a test has not, by what stands for it; all other files are made under their own names by `place`."""
SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
MERGEKIT = "merge_method: linear\nmodels: [{model: A, parameters: {weight: 1}}, {model: B, parameters: {weight: 1}}]\n"
CLASSES = ("cat", "dog", "ant", "bee")
WORDS = r"mergekit-vl (?:--|run|check|list|show|eval|predict|bench|path|cache|merge|verify|repair|soup)[^`\n]*|(?:make|python|pip install) [^`\n]+"


def commands():
    """(page, line) of every command: in indented and fenced blocks, in a recipe's head, and between backticks."""
    found = {}
    for page in PAGES:
        text = re.sub(r" *\\\n *", " ", page.read_text())
        lines = re.findall(rf"(?:^|^# *|^    )({WORDS})$", text, re.M)
        if page.suffix == ".md":
            lines += [line for line in re.findall(rf"`({WORDS})`", text) if " " in line.removeprefix("mergekit-vl ")]
        for line in lines:
            found.setdefault(line.partition("  #")[0].strip(), page.name)
    return [(page, line) for line, page in found.items()]


COMMANDS = commands()


def test_the_commands_are_found():
    lines = [line for _, line in COMMANDS]
    assert len(lines) > 45 and "mergekit-vl merge A B --strategy linear --rebasin -o merged" in lines
    assert any(
        line.startswith("mergekit-vl run wise_ft_own") and line.endswith("dataset.path=~/pets") for line in lines
    )
    assert {"make demo", "mergekit-vl show robust_micro > mine.yaml"} <= set(lines)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A home folder that holds everything the docs name."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("HOME", str(home))
        patch.setenv("MERGEKIT_VL_CACHE", str(home / "cache"))
        patch.setattr("mergekit_vl.microworld.tasks.PER_CLASS", {"train": 3, "val": 2, "test": 3})
        models(home)
        pictures(home)
        blocks = {page: (ROOT / page).read_text() for page in ("README.md", "docs/merging.md", "docs/plugins.md")}
        for page, start, name in (
            ("README.md", "backbone:", "my.yaml"),
            ("docs/merging.md", "# mergekit-vl merge birds.yaml", "birds.yaml"),
        ):
            block = next(b for b in re.findall(r"```yaml\n(.*?)```", blocks[page], re.S) if b.startswith(start))
            (home / name).write_text(block)
        (home / "config.yaml").write_text(MERGEKIT)
        (home / "plug").mkdir()
        (home / "plug" / "median.py").write_text(re.search(r"```python\n(.*?)```", blocks["docs/plugins.md"], re.S)[1])
        a_run(home)
        yield home
    torch.use_deterministic_algorithms(False)
    torch.backends.mha.set_fastpath_enabled(True)


def models(home):
    (home / "small.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(home / "small.json")
    state = clip.construct(SMALL, "small").state_dict()
    for i, name in enumerate(("ZS", "A", "B", "C")):
        (home / name).mkdir()
        moved = {key: tensor + 0.01 * i * tensor.sign() for key, tensor in state.items()}
        save_file(moved, home / f"{name}.safetensors")
        save_file(moved, home / name / "model.safetensors")
    tuned = {f"module.{key}": tensor * 1.01 for key, tensor in state.items()}
    (home / "logs" / "checkpoints").mkdir(parents=True)
    for file in ("logs/checkpoints/epoch_10.pt", "epoch_10.pt", "finetuned.pt"):
        torch.save({"epoch": 10, "state_dict": tuned}, home / file)
    torch.save(timm.create_model("test_resnet", num_classes=len(CLASSES)).state_dict(), home / "mine.pth")
    context = {"state_dict": {"ctx": Micro().build("cpu").embed("a photo of a")}, "epoch": 50}
    (home / "prompt_learner").mkdir()
    for file in ("prompt_learner/model.pth.tar-50", "model.pth.tar-50"):
        torch.save(context, home / file)


def pictures(home):
    draw = np.random.default_rng(0)
    for folder in (
        "pets",
        "flowers",
        "clothing",
        "pets-sketches",
        "pets-night",
        "night",
        *(f"OUT/folders/{shift}" for shift in ("plain", "sketch", "grey")),
    ):
        for name in CLASSES:
            (home / folder / name).mkdir(parents=True)
            for i in range(6):
                pixels = draw.integers(0, 255, (18, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(home / folder / name / f"{i}.png")
    (home / "holiday").mkdir()
    for file in ("photo.jpg", "holiday/sea.jpg"):
        Image.new("RGB", (20, 20), (90, 120, 40)).save(home / file)
    (home / "data" / "dtd").mkdir(parents=True)
    (home / "models" / "zs").mkdir(parents=True)


def a_run(home):
    """What `run robust_micro` leaves, with the row and the split that the docs name, of a linear head on a few images."""
    words = ["dataset={name: folder, path: pets, shifts: [night]}", "strategy=[{name: wise_ft}]", "controls=false"]
    words += ["tuned.0.tuner={name: linear_probe, label: full}"]
    made = experiment.build(load_recipe("robust_micro", words), load_plugins())
    quiet = {"reporter": SILENT}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "LINE_POINTS", 2)
        out = home / "runs" / "robust_micro-1234abcd"
        experiment.run(made, out, device="cpu", store=FeatureStore(home / "cache"), **quiet)


def here(line):
    """The line's words, with stand-ins."""
    for name, stand_in in STAND_INS.items():
        line = re.sub(name, stand_in, line)
    words = shlex.split(line.partition(" > ")[0])
    return [re.sub(r"^~|(?<=[=])~(?=/)", os.environ["HOME"], word) for word in words]


def planned(words):
    """What a command that takes minutes can do in a moment."""
    name, *rest = words
    typer.main.get_command(app.application()).commands[name].make_context(name, list(rest))  # its own options
    if name == "bench":
        return [*words, "--dry-run"] if "--dry-run" not in words else words
    flags = [i for i, word in enumerate(rest) if word.startswith("--")]
    return ["check", *(word for i, word in enumerate(rest) if i not in flags and i - 1 not in flags)]


@pytest.mark.parametrize("line", [line for _, line in COMMANDS if line.startswith("mergekit-vl")])
def test_a_command_does_what_it_says(line, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("MERGEKIT_VL_CACHE", str(place / "cache"))
    monkeypatch.setattr("mergekit_vl.microworld.tasks.PER_CLASS", {"train": 3, "val": 2, "test": 3})
    words = here(line)[1:]
    if words[0] == "merge" or "merge" in words[1:3]:
        output = Path(words[words.index("-o") + 1])
        for file in output.glob("*"):
            file.unlink()
        output.rmdir() if output.exists() else None
    elif words[0] == "verify" and not Path("merged").exists():
        call(monkeypatch, capsys, "merge", "A", "B", "--strategy", "linear", "-o", "merged")
    if words[0] == "--plugins-dir":  # read when the process starts
        words = [*words, "list"] if len(words) == 2 else words
        code = f"import sys; sys.argv = {['mergekit-vl', *words]!r}; from mergekit_vl.commands.app import main; main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout + done.stderr, done.stderr
        return
    if words[0] in ("run", "bench", "landscape"):
        words = planned(words)
    code, out, err = call(monkeypatch, capsys, *words)
    assert code == 0 and "error" not in err and out + err, err


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["mergekit-vl", *words])
    with pytest.raises(SystemExit) as stop:
        app.main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


@pytest.mark.parametrize("line", [line for _, line in COMMANDS if not line.startswith("mergekit-vl")])
def test_a_target_script_or_extra_is_there(line):
    program, *words = shlex.split(line)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M)
    elif program == "python" and words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None
    elif program == "python":
        text = (ROOT / words[0]).read_text()
        assert all(f'"{word}"' in text for word in words if word.startswith("--"))
    else:
        extra = re.search(r"\[(\w+)\]", words[-1])
        assert extra is None or f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text()
