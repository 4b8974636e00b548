"""`repair` and `soup`, run small: what they choose and on what, what they write, and what they refuse."""

import json
import sys

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mergekit_vl as mk
from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.backbones import clip
from mergekit_vl.commands import app
from mergekit_vl.models.choices import Tried
from mergekit_vl.storage.export import loading
from mergekit_vl.strategies import repair
from mergekit_vl.strategies.mergetune import MergeTune
from mergekit_vl.strategies.repair import Repair

PETS, FLOWERS = ("dog", "cat", "bird", "fish"), ("rose", "tulip", "daisy")
SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def images(folder, names, count=10):
    draw = np.random.default_rng(len(names))
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draw.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small CLIP as open_clip's own folder, three fine-tuned from it, and two folders of images."""
    place = tmp_path_factory.mktemp("jobs")
    torch.manual_seed(0)
    model = clip.construct(SMALL, "small")
    for name in ("zs", "a"):
        (place / name).mkdir()
        (place / name / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL, "preprocess_cfg": {}}))
    save_file(model.state_dict(), place / "zs" / "open_clip_model.safetensors")
    for i, name in enumerate("abc"):
        draw = torch.Generator().manual_seed(i)
        tuned = {
            k: t + 0.2 * t.std() * torch.randn(t.shape, generator=draw) if t.ndim > 1 else t
            for k, t in model.state_dict().items()
        }
        file = place / "a" / "open_clip_model.safetensors" if name == "a" else place / f"{name}.safetensors"
        save_file({k: t.contiguous() for k, t in tuned.items()}, file)
    images(place / "pets", PETS)
    images(place / "flowers", FLOWERS)
    return place


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MERGEKIT_VL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["mergekit-vl", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        app.main()
    captured = capsys.readouterr()
    return caught.value.code or 0, captured.out, captured.err


def one(new, kept, method="wise_ft", alpha=0.5):
    return Tried(method, alpha, {"new": new, "kept": kept}, {"new": 100, "kept": 100})


def test_what_is_best_by_hand():
    """HM of (0.8, 0.6) is 0.6857, of (0.9, 0.5) 0.6429, of (0.7, 0.68) 0.6899; the base keeps 0.7, so 2 points leave 0.68."""
    base, tried = one(0.4, 0.7), [one(0.8, 0.6), one(0.9, 0.5), one(0.7, 0.68), one(0.6, 0.69)]

    def best(method):
        return max(tried, key=lambda each: method.key(each, base, 0.0))

    assert best(Repair()) is tried[2] and Repair().key(tried[0], base, 0.0)[0] == pytest.approx(0.685714)
    assert best(Repair(budget=2.0)) is tried[2] and best(Repair(budget=1.9)) is tried[3]
    assert best(Repair(budget=10.0)) is tried[0] and best(Repair(budget=100.0)) is tried[1]
    assert Repair(budget=0.0).key(base, base, 0.0) > Repair(budget=0.0).key(tried[1], base, 0.0)


def test_repair_gives_a_model_that_open_clip_loads(place, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    words = ("repair", place / "zs", place / "a", "--new", place / "pets", "--keep", place / "flowers", "--out", out)
    code, told, _ = call(monkeypatch, capsys, *words)
    assert code == 0 and "Gained and forgotten: repair against zero-shot" in told
    report = json.loads((out / "report.json").read_text())
    (cell,) = report["cells"]
    assert [row["row"] for row in cell["rows"]] == ["zero-shot", "tuned", "repair"]
    assert {test["test"] for test in cell["changes"]} == {"pets", "flowers"}
    assert cell["counts"] == {"train": 24, "val": 7, "pets": 12, "flowers": 9}
    # what was chosen is the best of what was tried on the validation images of both sides, one a class
    row = cell["rows"][-1]
    tried = row["tried"]
    assert [each["method"] for each in tried] == ["base", *["wise_ft"] * 6, *["lines"] * 2, "monosoup", "tuned"]
    assert all(each["n"] == {"new": 4, "kept": 3} for each in tried) and row["chosen_on"] == "val"
    means = [2 * n * k / (n + k) if n and k else 0.0 for n, k in (each["accuracy"].values() for each in tried)]
    chosen = next(
        each
        for each in tried
        if each["method"] == row["chosen"]["method"] and each["alpha"] == row["chosen"].get("alpha")
    )
    assert means[tried.index(chosen)] == pytest.approx(max(means))
    page = (out / "report.html").read_text()
    assert "What was tried" in page and page.index("Gained and forgotten") < page.index("<h2>Accuracy")
    name = chosen["method"] + (f" {chosen['alpha']:g}" if chosen["alpha"] is not None else "")
    assert f"repair: {name} is the best of 11 on validation images (" in told
    # the last line of the terminal loads it
    last = told.strip().splitlines()[-1]
    assert last.startswith("in Python: import open_clip; model, _, preprocess = ")
    scope = {}
    exec(last.removeprefix("in Python: "), scope)  # noqa: S102
    state = load_file(out / "merged" / "open_clip_model.safetensors")
    for name, tensor in scope["model"].state_dict().items():
        torch.testing.assert_close(tensor, state[name])
    again, told, _ = call(monkeypatch, capsys, *words)
    assert again == 0 and told.strip().splitlines()[-1] == last


def test_repair_in_python_with_a_budget_and_classes_of_the_folder(place, tmp_path):
    given = dict(new=place / "pets", keep="dog,cat", budget="2pt")
    result = mk.repair(place / "zs", place / "a", **given, out=tmp_path / "run")
    (cell,) = result.report.cells
    assert list(cell.metric.columns) == ["new", "kept"] and cell.counts["new"] == cell.counts["kept"] == 6
    tried = cell.rows[-1].choice.tried
    assert result.chosen["method"] in {each.method for each in tried}
    chosen = next(each for each in tried if each.is_chosen(result.chosen))
    allowed = [each for each in tried if tried[0].accuracy["kept"] - each.accuracy["kept"] <= 0.02 + 1e-12]
    assert chosen in allowed and chosen.accuracy["new"] == max(each.accuracy["new"] for each in allowed)


def test_several_folders_are_kept_and_mergetune_is_tried(tmp_path, monkeypatch):
    """On the embedded CLIP with a prompt: classifiers are averaged too, and what is no whole model loads by `load_model`."""
    images(tmp_path / "new", ("apple", "car"), 4)
    for name in ("one", "two"):
        images(tmp_path / name, ("dog", "swan"), 4)
    micro = mk.load_model("micro").model.backbone
    Prompt(micro.embed("a photo of a") + 0.02, "a photo of a").save(tmp_path / "ctx.safetensors", backbone="micro")
    monkeypatch.setattr(repair, "MergeTune", lambda: MergeTune(epochs=1))
    kept = [tmp_path / "one", tmp_path / "two"]
    result = mk.repair(
        "micro", tmp_path / "ctx.safetensors", new=tmp_path / "new", keep=kept, train=True, out=tmp_path / "run"
    )
    (cell,) = result.report.cells
    assert cell.metric.columns == {"new": ("new",), "kept": ("one", "two")}
    methods = [each.method for each in cell.rows[-1].choice.tried]
    assert list(dict.fromkeys(methods)) == [
        "base",
        "wise_ft",
        "monosoup",
        "wise_ft of classifiers",
        "mergetune",
        "tuned",
    ]
    assert loading(tmp_path / "run" / "merged", tmp_path / "run").startswith(
        "import mergekit_vl; model = mergekit_vl.load"
    )


def test_repair_without_images(place, tmp_path, monkeypatch, capsys):
    """Of a known base in the whole model; of files of weights as `merge` does it; both have the same numbers."""
    words = ("repair", place / "zs", place / "b.safetensors", "--out", tmp_path / "known")
    code, told, _ = call(monkeypatch, capsys, *words)
    assert code == 0 and "nothing was measured" in told and "MonoSoup of" in told
    scope = {}
    exec(told.strip().splitlines()[-1].removeprefix("in Python: "), scope)  # noqa: S102
    file = place / "zs" / "open_clip_model.safetensors"
    code, _, _ = call(monkeypatch, capsys, "repair", file, place / "b.safetensors", "--out", tmp_path / "files")
    assert code == 0
    merged = mk.merge([place / "b.safetensors"], place / "zs", "monosoup")
    for found in (scope["model"].state_dict(), load_file(tmp_path / "files" / "model.safetensors")):
        for name, tensor in merged.items():
            torch.testing.assert_close(found[name], tensor)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    code, _, error = call(monkeypatch, capsys, *words[:-1], tmp_path / "mine")
    assert code == 2 and "holds files that no merge wrote" in error and (tmp_path / "mine" / "notes.txt").exists()


def test_a_timm_model_keeps_classes_that_it_has(place, tmp_path, monkeypatch, capsys):
    import timm

    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=len(PETS))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    tuned = {k: t + 0.05 * torch.randn_like(t) if t.ndim > 1 else t for k, t in model.state_dict().items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    images(tmp_path / "sketches", PETS)
    base = f"vision:test_resnet:{tmp_path / 'base.safetensors'}"
    words = ("repair", base, tmp_path / "tuned.safetensors", "--new", place / "pets", "--out", tmp_path / "run")
    code, told, error = call(monkeypatch, capsys, *words, "--keep", tmp_path / "sketches")
    assert code == 0, error
    scope = {}
    exec(told.strip().splitlines()[-1].removeprefix("in Python: "), scope)  # noqa: S102
    code, _, error = call(monkeypatch, capsys, *words[:-1], tmp_path / "other", "--keep", place / "flowers")
    assert code == 2 and "no class for 3 classes of what is kept: daisy, rose, tulip" in error
    assert not (tmp_path / "other").exists()


def test_soup(place, tmp_path, monkeypatch, capsys):
    models = (place / "a", place / "b.safetensors", place / "c.safetensors")
    words = ("soup", *models, "--val", place / "pets", "--base", place / "zs", "--out", tmp_path / "run")
    code, told, _ = call(monkeypatch, capsys, *words)
    assert code == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    rows = {row["row"]: row for row in report["cells"][0]["rows"]}
    assert list(rows) == ["zero-shot", "a", "b", "c", "greedy_soup", "uniform_soup"]
    ingredients = rows["greedy_soup"]["chosen"]["ingredients"]
    assert ingredients and set(ingredients) <= {"a", "b", "c"}
    assert f"greedy_soup: ingredients [{', '.join(ingredients)}], chosen on validation images" in told
    assert f"{', '.join(ingredients)}" in (tmp_path / "run" / "README.md").read_text()
    merged, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'run' / 'merged'}")
    files = {"a": place / "a" / "open_clip_model.safetensors", "b": models[1], "c": models[2]}
    states = [load_file(files[name]) for name in ingredients]
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, sum(state[name] for state in states) / len(states))
    result = mk.soup(models, val=place / "pets", out=tmp_path / "python")
    assert set(result.chosen["ingredients"]) <= {"a", "b", "c"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--new", "pets"), "--new without --keep FOLDER"),
        (("--keep", "pets"), "--keep without --new FOLDER"),
        (("--new", "none", "--keep", "pets"), "none: no such folder"),
        (("--new", "pets", "--keep", "./none"), "--keep ./none: no such folder"),
        (("--new", "pets", "--keep", "pets"), "the same folder is given twice"),
        (("--new", "pets", "--keep", "captions.csv"), "images with captions cannot be kept yet"),
        (("--new", "pets", "--keep", "dgo,cat"), "unknown class 'dgo' (did you mean 'dog'?)"),
        (("--new", "pets", "--keep", "dog"), "1 of 4 classes are kept (at least two classes must be kept"),
        (("--new", "pets", "--keep", "flowers", "--budget", "two"), "--budget two"),
        (("--budget", "2pt"), "--budget and key=value need images"),
    ],
)
def test_what_repair_refuses(words, told, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    code, _, error = call(monkeypatch, capsys, "repair", "zs", "a", *words, "--out", tmp_path / "out")
    assert code == 2 and told in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("repair", "nothing", "a", "--new", "pets", "--keep", "flowers"), "'nothing' is no model"),
        (("repair", "zs", "gone.pt", "--new", "pets", "--keep", "flowers"), "gone.pt: no such model"),
        (("soup", "a", "--val", "pets"), "soup: 1 model (name at least two)"),
        (("soup", "a", "./a", "--val", "pets"), "soup: the same model is given twice"),
        (("soup", "a", "gone.pt", "--val", "pets"), "gone.pt: no such model"),
        (("soup", "a", "b.safetensors", "--val", "gone"), "gone: no such folder"),
    ],
)
def test_models_and_folders_that_are_not_there(words, told, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    code, _, error = call(monkeypatch, capsys, *words, "--out", tmp_path / "out")
    assert code == 2 and told in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
