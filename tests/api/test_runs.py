"""Runs, benches and models from Python: a small run is made, read back, scored and used."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import mergekit_vl
from mergekit_vl import Classes, UserError, check, evaluate, load_model, predict, run

RECIPE = {
    "backbone": {"name": "micro"},
    "dataset": {"name": "microworld", "task": "sea_and_sky_emboss"},
    "protocol": {"name": "few_shot", "shots": 1},
    "tuned": [{"tuner": {"name": "coop", "epochs": 1}}],
    "strategy": [{"name": "wise_ft"}, {"name": "ensemble"}],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return run(RECIPE, out=tmp_path_factory.mktemp("runs") / "out")


def test_a_run_tells_its_table(made):
    assert list(made.scores()) == ["zero-shot", "coop", "wise_ft", "ensemble"]
    assert made.html.exists()
    folder, title, header, _, *rows = repr(made).splitlines()
    assert folder == str(made.folder) and title.startswith("recipe: sea_and_sky_emboss, seed 1")
    assert header.split()[:2] == ["row", "test"]
    assert "n = 800 test" in "\n".join(rows[4:])
    assert [row.split()[0] for row in rows[:4]] == list(made.scores())
    assert made._repr_html_().count("<tr") == 5 + 2 and "<caption>recipe: " in made._repr_html_()
    (test,) = made.changed
    assert len(test.classes) == 20 and test.whole.n == 800 and "Gained and forgotten" in repr(made)
    assert test.whole.percent("after") == pytest.approx(made.scores()["wise_ft"])
    again = run(RECIPE, out=made.folder)
    assert again.report.seconds == made.report.seconds  # read, and not repeated


def test_a_row_is_a_model(made):
    model = load_model(made.folder)
    assert "model wise_ft" in repr(model) and "wise_ft" in model._repr_html_() and len(model.classes.names) == 20
    scored = evaluate(model)
    assert 100 * scored.accuracy == pytest.approx(made.scores()["wise_ft"])
    assert repr(scored).startswith("wise_ft on sea_and_sky_emboss (test, 800 images, 20 classes)\n  accuracy")
    assert scored.to_json()["metrics"]["acc1"] == scored.accuracy and "<caption>wise_ft on" in scored._repr_html_()
    assert evaluate(made.model("coop"), split="val").split == "val"
    same = evaluate(model.model, "microworld", task="sea_and_sky_emboss")
    assert replace(same, model="wise_ft", ms_per_sample=0) == replace(scored, ms_per_sample=0)


def test_predictions_of_files_pictures_and_batches_agree(tmp_path):
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 255, (48, 48, 3), dtype=np.uint8)) for _ in range(2)]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    model = load_model("micro", device="cpu")
    of_files = predict(model, tmp_path, classes=["dog", "cat", "car"])
    assert of_files.images == (str(tmp_path / "0.png"), str(tmp_path / "1.png"))
    assert of_files.probabilities.shape == (2, 3) and len(of_files) == 2
    name, p = of_files[0]
    assert name in ("dog", "cat", "car") and p == of_files.probabilities[0].max() and list(of_files)[0] == (name, p)
    assert repr(of_files).splitlines()[0].startswith(f"{of_files.images[0]}: {name} ")
    assert of_files._repr_html_().count("<tr>") == 3
    batch = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    for images in (pictures, batch, (batch / 255 - 0.5) / 0.3):
        found = predict(model, images, Classes(("dog", "cat", "car")))
        torch.testing.assert_close(found.probabilities, of_files.probabilities, rtol=1e-4, atol=1e-6)


def test_a_limit_on_pixels_ends_with_the_call(tmp_path):
    Image.new("RGB", (48, 48)).save(tmp_path / "large.png")
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UserError, match="more than 0.001 million pixels"):
        predict("micro", tmp_path, ["dog", "cat"], max_megapixels=0.001)
    assert Image.MAX_IMAGE_PIXELS == before


def test_a_check_tells_the_plan():
    assert repr(check(RECIPE)).splitlines()[-2].startswith("cells     1;")
    assert "bench     bench_small" in repr(check("bench_small"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run("mergetune_cop"), "unknown recipe 'mergetune_cop' .did you mean 'mergetune_coop'"),
        (lambda: run(RECIPE, "seed=2"), "overrides are of files and names"),
        (lambda: check("mergetune_coop", "strategy.0.lamda=3"), "unknown key 'lamda'"),
        (lambda: evaluate("micro"), "evaluate: no dataset"),
        (lambda: evaluate("micro", "microworld", task="nowhere"), "unknown microworld task"),
        (lambda: evaluate("micro", "microworld", split="tset", cache=False), "unknown split 'tset'"),
        (lambda: predict("micro", "nowhere.png", ["a", "b"]), "no such image"),
        (lambda: predict("micro", [], ["a", "b"]), "predict: no images"),
        (lambda: predict("micro", [3], ["a", "b"]), "a int is no image"),
        (lambda: predict("micro", torch.zeros(3, 8, 8), ["a", "b"]), r"a tensor of shape \(3, 8, 8\)"),
        (lambda: predict("micro", [Image.new("RGB", (8, 8))]), "no class names"),
        (lambda: predict("micro", [Image.new("RGB", (8, 8))], ["a", "a"]), "at least two, each once"),
        (lambda: load_model("nowhere"), "'nowhere' is no model"),
    ],
)
def test_errors(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_bench_tells_its_table(tmp_path):
    recipe = {**RECIPE, "strategy": [{"name": "wise_ft", "alpha": 0.3}], "controls": False, "search": {"by": "none"}}
    made = mergekit_vl.bench(recipe, out=tmp_path / "bench")
    assert {"zero-shot", "coop", "wise_ft"} <= set(made.scores()) and made.html.exists()
    assert repr(made).splitlines()[2].split()[:2] == ["row", "test"] and "<caption>recipe: " in made._repr_html_()
