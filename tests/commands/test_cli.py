"""The command line: bad input is one line and exit code 2, light commands stay light."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file

from mergekit_vl.commands import app
from mergekit_vl.recipes.loading import installed_recipes

RECIPES = Path(__file__).parents[2] / "recipes"
COOP = str(RECIPES / "mergetune_coop.yaml")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(monkeypatch, capsys, *arguments):
    """Run the console script in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["mergekit-vl", *arguments])
    with pytest.raises(SystemExit) as stop:
        app.main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


BAD = {
    "no such recipe": (["run", "mergetune_cop"], "unknown recipe 'mergetune_cop' (did you mean 'mergetune_coop'?)"),
    "broken YAML": (["run", "broken.yaml"], "broken.yaml: broken YAML, line 2, column 5"),
    "not a mapping": (["run", "list.yaml"], "list.yaml: a recipe is a mapping of keys"),
    "no strategy": (["run", "short.yaml"], "short.yaml: 'strategy' is missing"),
    "unknown key": (["run", COOP, "strateg.0=x"], "unknown key 'strateg' (did you mean 'strategy'?)"),
    "unknown option": (["run", COOP, "strategy.0.lamda=3"], "unknown key 'lamda' (did you mean 'lambda'?)"),
    "unknown strategy": (
        ["run", COOP, "strategy.0.name=mergetun"],
        "unknown strategy 'mergetun' (did you mean 'mergetune'?)",
    ),
    "unknown backbone": (["run", COOP, "backbone.name=mikro"], "unknown backbone 'mikro' (did you mean 'micro'?)"),
    "unknown dataset": (["run", COOP, "dataset.name=folders"], "unknown dataset 'folders' (did you mean 'folder'?)"),
    "unknown task": (
        ["run", COOP, "dataset.task=animal_emboss"],
        "unknown microworld task 'animal_emboss' (did you mean 'animals_emboss'?)",
    ),
    "wrong type": (["run", COOP, "protocol.shots=many"], "shots='many': Input should be a valid integer"),
    "negative shots": (["run", COOP, "protocol.shots=-1"], "shots=-1 (it must be positive)"),
    "zero shots": (["run", COOP, "protocol.shots=0"], "shots=0 (it must be positive)"),
    "more shots than images": (
        ["run", COOP, "protocol.shots=30"],
        "class 'fish' has 20 images, 30 shots were asked for (lower protocol.shots)",
    ),
    "not an override": (["run", COOP, "seed"], "'seed' is not an override (write key=value, for instance seed=2)"),
    "list index": (
        ["run", COOP, "tuned.3.tuner.epochs=2"],
        "list index out of range (list items are written tuned.0.tuner.epochs=5)",
    ),
    "same label twice": (["run", COOP, "strategy.1.label=mergetune"], "two rows are called 'mergetune'"),
    "missing folder": (["run", "my_photos", "dataset.path=nowhere"], "no such folder"),
    "one class": (["run", "my_photos", "dataset.path=one"], "one class"),
    "nameless class": (
        ["run", "my_photos", "dataset.path=nameless", "protocol.shots=1"],
        "the tokenizer maps ' ' to nothing (give the class a name in words)",
    ),
    "missing checkpoint": (
        ["run", COOP, "tuned=[{checkpoint: gone.safetensors}]"],
        "gone.safetensors: no such checkpoint",
    ),
    "truncated checkpoint": (
        ["run", COOP, "tuned=[{checkpoint: cut.safetensors}]"],
        "cut.safetensors: damaged or truncated safetensors",
    ),
    "foreign checkpoint": (
        ["run", COOP, "tuned=[{checkpoint: foreign.safetensors}]"],
        "foreign.safetensors: a checkpoint of another architecture than micro",
    ),
    "NaN": (
        ["run", COOP, "tuned=[{checkpoint: nan.safetensors}]"],
        "nan.safetensors: ctx has values that are not finite",
    ),
    "other width": (["run", COOP, "tuned=[{checkpoint: wide.safetensors}]"], "the prompt is 7 wide, micro needs 128"),
    "foreign folder": (["run", COOP, "--out", "taken"], "taken: this folder belongs to another recipe"),
    "a file": (["run", COOP, "--out", "short.yaml"], "short.yaml: is a file (choose another --out)"),
    "unwritable": (["run", COOP, "--out", "short.yaml/below"], "cannot be written"),
    "lr without end": (["check", COOP, "tuned.0.tuner.lr=inf"], "CoOp: lr=inf (a finite number)"),
    "crop above 1": (["check", COOP, "tuned.0.tuner.crop=2"], "CoOp: crop=2.0 (at most 1)"),
    "unknown device": (["run", COOP, "--device", "gpu"], "unknown device 'gpu' (did you mean 'cpu'?)"),
    "unknown kind": (["list", "strategy"], "unknown kind 'strategy' (did you mean 'strategies'?)"),
    "unknown name": (["show", "mergetun"], "unknown name 'mergetun' (did you mean 'mergetune'?)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, tmp_path, monkeypatch, capsys):
    from PIL import Image

    Path("broken.yaml").write_text("backbone: {name: micro\nseed: 1\n")
    Path("list.yaml").write_text("- a\n")
    Path("short.yaml").write_text("dataset: {name: microworld}\n")
    Path("taken").mkdir()
    Path("taken/precious.txt").write_text("mine")
    Path("one/dog").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(f"one/dog/{i}.png")
    for name in ("_", "dog"):
        Path("nameless", name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (9, 9), (i, 0, 0)).save(f"nameless/{name}/{i}.png")
    Path("cut.safetensors").write_bytes(b"x")
    meta = {"mergekit_vl": json.dumps({"adapter": "prompt", "init": "a photo of a", "names": []})}
    save_file({"x": torch.zeros(1)}, "foreign.safetensors")
    save_file({"ctx": torch.full((4, 128), float("nan"))}, "nan.safetensors", metadata=meta)
    save_file({"ctx": torch.zeros(4, 7)}, "wide.safetensors", metadata=meta)
    before = sorted(p for p in tmp_path.rglob("*"))

    arguments, message = BAD[case]
    monkeypatch.setenv("MERGEKIT_VL_CACHE", str(tmp_path.parent / "cache"))
    code, out, err = call(monkeypatch, capsys, *arguments)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0], err
    assert "Traceback" not in err and not out
    left = [p for p in tmp_path.rglob("*") if p not in before and p.is_file()]
    assert not left


def test_a_class_name_that_the_tokenizer_maps_to_nothing():
    from mergekit_vl.backbones.micro import Micro
    from mergekit_vl.errors import UserError

    with pytest.raises(UserError, match="the tokenizer maps ' ' to nothing"):
        Micro().build("cpu").tokenize(["dog", " "])


def test_light_commands_do_not_import_torch():
    for arguments in (["--help"], ["--version"], ["list"], ["show", "mergetune"], ["check", COOP]):
        code = f"import sys; sys.modules['torch'] = None; sys.argv = {['mergekit-vl', *arguments]!r}; from mergekit_vl.commands.app import main; main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout and not done.stderr, (arguments, done.stderr)


def test_the_list_of_commands_has_the_first_line_of_the_help_of_each():
    told = {name: summary for name, (_, summary) in app.COMMANDS.items() if summary}
    for command in (None, ""):
        found = typer.main.get_command(app.application(command)).commands.items()
        assert {name: each.help.partition("\n")[0] for name, each in found if not each.hidden} == told


def test_every_command_that_writes_a_folder_takes_out_and_o():
    commands = typer.main.get_command(app.application()).commands
    found = {name: param.opts for name, each in commands.items() for param in each.params if "--out" in param.opts}
    assert set(found) >= {"run", "bench", "landscape", "merge"}
    assert all(opts == ["--out", "-o"] for opts in found.values()), found


def test_a_command_imports_what_it_needs_alone(tmp_path):
    """What others need - tables, runs, torch - costs a merge of small files more than the merge itself."""
    for name, value in (("A", 1.0), ("B", 3.0)):
        save_file({"w": torch.full((2, 2), value)}, tmp_path / f"{name}.safetensors")
    rooms = ("recipes", "models.model", "alignment", "experiments")
    no_plugins = "import importlib.metadata; importlib.metadata.entry_points = lambda **group: ()"
    merge = ["mergekit-vl", "merge", "A.safetensors", "B.safetensors", "--strategy", "linear", "-o", "out"]
    for words, needless in (
        (merge, ("rich", "torch", "omegaconf", "scipy", "html", "isal", *(f"mergekit_vl.{each}" for each in rooms))),
        (["mergekit-vl", "--help"], ("rich", "numpy", "pydantic", "mergekit_vl.recipes", "mergekit_vl.experiments")),
    ):
        code = f"{no_plugins}\nimport sys; sys.argv = {words!r}\nfrom mergekit_vl.commands.app import main\ntry: main()\nexcept SystemExit as end: assert not end.code\nprint(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0 and not set(needless) & set(done.stdout.split()), done.stderr


def test_every_recipe_is_valid(monkeypatch, capsys):
    Path("prompt_learner").mkdir()
    Path(
        "prompt_learner/model.pth.tar-50"
    ).touch()  # what mergetune_from_coop_checkpoint needs; `check` reads no weights
    Path("finetuned.pt").touch()  # and wise_ft_own
    recipes = installed_recipes()
    assert set(recipes) == {path.stem for path in RECIPES.rglob("*.yaml")} and len(recipes) >= 3
    for name in recipes:
        code, out, _ = call(monkeypatch, capsys, "check", name)
        assert code == 0 and re.search("rows      (zero-shot|class means), ", out)


def test_show_tells_options_and_source(monkeypatch, capsys):
    _, out, _ = call(monkeypatch, capsys, "show", "mergetune")
    assert (
        "arXiv 2601.10497" in out
        and "lambda: float | None = None" in out
        and "weight of the loss on the line to zero-shot" in out
    )


def test_list_names_every_builtin(monkeypatch, capsys):
    _, out, _ = call(monkeypatch, capsys, "list")
    assert all(
        name in out
        for name in ("mergetune", "wise_ft", "kgcoop", "micro", "base_to_novel", "folder", "mergetune_suite")
    )


COMMAND = """
from mergekit_vl.registry.hookspecs import hookimpl

@hookimpl
def register_commands(app):
    @app.command()
    def NAME():
        "Greet."
        print("hello")
"""


def test_a_plugin_brings_a_command(tmp_path):
    def mergekit_vl(*arguments):
        words = [sys.executable, "-m", "mergekit_vl.commands.app", *arguments]
        return subprocess.run(words, capture_output=True, text=True)

    (tmp_path / "greeter.py").write_text(COMMAND.replace("NAME", "greet"))
    assert mergekit_vl("--plugins-dir", str(tmp_path), "greet").stdout == "hello\n"
    assert "Greet." in mergekit_vl(f"--plugins-dir={tmp_path}", "--help").stdout
    (tmp_path / "greeter.py").write_text(COMMAND.replace("NAME", "run"))
    taken = mergekit_vl("--plugins-dir", str(tmp_path), "list")
    assert taken.returncode == 2 and "plugin greeter brings a command 'run', which is taken" in taken.stderr
    (tmp_path / "greeter.py").write_text(COMMAND.replace("@app", "1 / 0\n    @app"))
    failed = mergekit_vl("--plugins-dir", str(tmp_path), "list", "tuners")
    assert failed.returncode == 0 and "coop" in failed.stdout
    assert failed.stderr == "warning: plugin greeter was not loaded: ZeroDivisionError: division by zero\n"


def test_ctrl_c(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    from mergekit_vl.experiments import experiment

    monkeypatch.setattr(experiment, "run", interrupted)
    code, _, err = call(monkeypatch, capsys, "run", COOP)
    assert code == 130 and "the same command continues" in err


def test_an_override_that_names_another_thing_replaces_the_old_ones_options():
    from mergekit_vl.recipes.loading import load_recipe

    plain = load_recipe("robust_micro", ["dataset={name: folder, path: pets}", "tuned.0.tuner={epochs: 3}"]).plain
    assert plain["dataset"] == {"name": "folder", "path": "pets"}
    assert plain["tuned"][0]["tuner"]["name"] == "full" and plain["tuned"][0]["tuner"]["epochs"] == 3
