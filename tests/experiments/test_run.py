"""Whole runs at a small size: what they write, that they repeat, and that a killed one goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SMALL = ["tuned.0.tuner.epochs=2", "strategy.0.epochs=2", "protocol.shots=4"]


def mergekit_vl(*arguments, cwd, cache, prelude=""):
    code = f"{prelude}\nimport sys; sys.argv = {['mergekit-vl', *map(str, arguments)]!r}\nfrom mergekit_vl.commands.app import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "MERGEKIT_VL_CACHE": str(cache)},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the main recipe, two epochs long."""
    place = tmp_path_factory.mktemp("work")
    done = mergekit_vl("run", "mergetune_coop", *SMALL, "--out", "first", cwd=place, cache=place / "cache")
    assert done.returncode == 0, done.stderr
    return place, done.stdout


def test_what_a_run_leaves(finished):
    place, out = finished
    run = place / "first"
    assert {p.name for p in run.iterdir()} == {
        ".recipe-hash", "state", "results", "merged.safetensors", "recipe.yaml", "scores.json", "cost.json", "report.json", "report.html", "report.png", "README.md",
    }  # fmt: skip
    report = json.loads((run / "report.json").read_text())
    rows = {row["row"]: row for row in report["summary"]}
    assert (
        list(rows)[:5] == ["zero-shot", "coop", "continued", "CE only", "mergetune"]
        and rows["ensemble"]["forwards"] == 2
    )
    assert rows["zero-shot"]["parameters"] == 0 and rows["coop"]["parameters"] == 4 * 128
    for row in rows.values():
        base, novel = (column["acc1"] for column in row["columns"].values())
        assert row["score"] == pytest.approx(2 / (1 / base + 1 / novel))
    assert report["cells"][0]["counts"] == {"train": 40, "val": 40, "base": 400, "novel": 400}
    result = json.loads(sorted((run / "results").glob("*.json"))[0].read_text())
    assert {"dataset", "model", "pretrained", "task", "metrics", "language"} <= result.keys()
    assert set(result["metrics"]) == {"acc1", "acc5", "mean_per_class_recall"} and 0 < result["metrics"]["acc1"] <= 1
    page = (run / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    against, where, in_python, _ = out.strip().splitlines()[-4:]
    assert against.startswith("mergetune against coop: ") and str(Path("first") / "report.html") in where
    assert in_python.startswith("in Python: import mergekit_vl; model = mergekit_vl.load_model(")


def test_a_run_tells_what_was_gained_and_what_was_forgotten(finished):
    place, out = finished
    report = json.loads((place / "first" / "report.json").read_text())
    rows = {row["row"]: row for row in report["cells"][0]["rows"]}
    for change in report["cells"][0]["changes"]:
        counted = {when: sum(each[when] for each in change["classes"]) for when in ("n", "before", "tuned", "after")}
        for when, row in (("before", "zero-shot"), ("tuned", "coop"), ("after", "mergetune")):
            assert counted[when] == rows[row]["right"][change["test"]].count("1")
        assert counted["n"] == 400 and all("drawn" not in picture for picture in change["pictures"])
        answers = {
            (picture["before"] == picture["label"], picture["after"] == picture["label"])
            for picture in change["pictures"]
        }
        assert answers <= {(True, False), (False, True)}
    assert "Gained and forgotten: mergetune against zero-shot" in out
    page = (place / "first" / "report.html").read_text()
    assert "<h2>Gained and forgotten</h2>" in page and 'src="data:image/jpeg;base64,' in page


def same(one, other):
    return all(one["columns"][c]["acc1"] == pytest.approx(other["columns"][c]["acc1"]) for c in ("base", "novel"))


def test_the_lines_end_where_their_models_stand(finished):
    report = json.loads((finished[0] / "first" / "report.json").read_text())
    rows = {row["row"]: row for row in report["summary"]}
    ends = {(p["segment"], p["alpha"]): p for p in report["landscape"]}
    for segment, alpha, row in (
        ("zero-shot -> tuned", 0.0, "zero-shot"),
        ("zero-shot -> tuned", 1.0, "coop"),
        ("merged -> tuned", 0.0, "mergetune"),
    ):
        assert same(ends[segment, alpha], rows[row])


def test_a_report_with_the_keys_of_0_1_0_is_read(finished):
    from mergekit_vl.reports.results import Report

    report = json.loads((finished[0] / "first" / "report.json").read_text())
    points = [{("leg" if key == "segment" else key): v for key, v in p.items()} for p in report["landscape"]]
    old = {key: value for key, value in report.items() if key not in ("landscape", "tuned_row")}
    read = Report.from_json({**old, "path": points, "anchor": report["tuned_row"]})
    assert points and read == Report.from_json(report) and read.to_json() == report


def test_the_coefficients_are_those_of_wise_ft_in_both_spaces(finished):
    report = json.loads((finished[0] / "first" / "report.json").read_text())
    rows = {row["row"]: row for row in report["summary"]}
    middle = {p["space"]: p for p in report["landscape"] if p["segment"] == "zero-shot -> tuned" and p["alpha"] == 0.5}
    for space, row in (("contexts", "average"), ("classifiers", "average of classifiers")):
        assert same(middle[space], rows[row])


def test_the_cards_lines_use_the_merged_prompt_in_plain_open_clip(finished, monkeypatch):
    from mergekit_vl.adapters.prompt import Prompt
    from mergekit_vl.backbones.micro import Micro
    from mergekit_vl.models.model import Classes, Single

    monkeypatch.chdir(finished[0] / "first")
    scope: dict = {}
    exec(Path("README.md").read_text().split("```python")[1].split("```")[0], scope)  # noqa: S102
    model = Single(Micro().build("cpu"), Prompt.load(Path("merged.safetensors")))
    ours = torch.nn.functional.normalize(model.text_features(Classes(("dog", "cat"))), dim=-1)
    torch.testing.assert_close(scope["text"], ours, atol=1e-5, rtol=0)


def test_the_shots_are_kept(finished):
    shots = json.loads((finished[0] / "first" / "state" / "sea_and_sky_emboss-seed1" / "shots.json").read_text())
    assert len(shots["base"]) == len(shots["novel"]) == 10 and not set(shots["base"]) & set(shots["novel"])
    assert [shot["class"] for shot in shots["train"]] == [name for name in shots["base"] for _ in range(4)]


def test_the_same_command_says_already_done_and_force_repeats_the_same_bytes(finished):
    place, _ = finished
    again = mergekit_vl("run", "mergetune_coop", *SMALL, "--out", "first", cwd=place, cache=place / "cache")
    assert again.returncode == 0 and again.stdout.startswith("already done: ")
    names = ("merged.safetensors", "recipe.yaml", "scores.json")
    before = [(place / "first" / name).read_bytes() for name in names]
    forced = mergekit_vl(
        "run", "mergetune_coop", *SMALL, "--out", "first", "--force", "--json", cwd=place, cache=place / "other-cache"
    )
    assert json.loads(forced.stdout)["main"] == "mergetune"
    assert [(place / "first" / name).read_bytes() for name in names] == before


@pytest.mark.parametrize("write", [1, 8, 21])
def test_killed_at_a_write_the_same_command_goes_on(finished, write):
    place, _ = finished
    out = f"killed{write}"
    kill = f"import os\nreal, left = os.replace, [{write}]\ndef replace(a, b):\n    left[0] -= 1\n    if not left[0]: os.kill(os.getpid(), 9)\n    real(a, b)\nos.replace = replace"
    killed = mergekit_vl("run", "mergetune_coop", *SMALL, "--out", out, cwd=place, cache=place / "cache", prelude=kill)
    assert killed.returncode == -9 and not (place / out / "report.json").exists()
    assert (
        mergekit_vl(
            "run", "mergetune_coop", *SMALL, "--out", out, "--quiet", cwd=place, cache=place / "cache"
        ).returncode
        == 0
    )
    assert (place / out / "scores.json").read_bytes() == (place / "first" / "scores.json").read_bytes()
    assert not list((place / out).rglob("*.partial"))


def test_a_checkpoint_takes_the_tuners_place(finished):
    place, _ = finished
    file = place / "first" / "state" / "sea_and_sky_emboss-seed1" / "coop.safetensors"
    done = mergekit_vl(
        "run",
        "mergetune_coop",
        *SMALL[1:],
        f"tuned=[{{checkpoint: {file}}}]",
        "--json",
        "--out",
        "from",
        cwd=place,
        cache=place / "cache",
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        json.loads(done.stdout)["summary"],
        json.loads((place / "first" / "report.json").read_text())["summary"],
    )
    assert all(same(*rows) for rows in zip(ours, theirs, strict=True))


def test_another_checkpoint_under_the_same_name_starts_its_cell_again(finished, tmp_path):
    place, _ = finished
    state = place / "first" / "state" / "sea_and_sky_emboss-seed1"
    file, arguments = (
        tmp_path / "w2.safetensors",
        ["tuned=[{checkpoint: w2.safetensors}]", "protocol.shots=4", "--out", "out"],
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text("dataset: {name: microworld, task: sea_and_sky_emboss}\nstrategy: {name: wise_ft}\n")
    file.write_bytes((state / "coop.safetensors").read_bytes())
    assert mergekit_vl("run", "r.yaml", *arguments, cwd=tmp_path, cache=place / "cache").returncode == 0
    (tmp_path / "out" / "report.json").unlink()
    file.write_bytes((state / "mergetune.safetensors").read_bytes())
    done = mergekit_vl("run", "r.yaml", *arguments, cwd=tmp_path, cache=place / "cache")
    assert done.returncode == 0 and "checkpoints changed since: rows that depend on it are made again" in done.stderr


def test_a_folder_of_pictures(finished, tmp_path):
    place, _ = finished
    rng = np.random.default_rng(0)
    for name in ("dog", "red blorptag", "apple", "car"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(
                tmp_path / "pets" / name / f"{i}.jpg"
            )
    done = mergekit_vl(
        "run", "my_photos", "dataset.path=pets", *SMALL[:2], "protocol.shots=2", cwd=tmp_path, cache=place / "cache"
    )
    assert done.returncode == 0, done.stderr
    assert "photo was never trained on these words of pets: blorptag (nearest: borage);" in done.stderr
    assert "halves of the sorted labels" in done.stdout


def test_a_recipe_that_was_renamed_is_found_and_told():
    from mergekit_vl.recipes.loading import find_recipe

    with pytest.warns(FutureWarning, match="folder_coop is now my_photos"):
        assert find_recipe("folder_coop").name == "my_photos.yaml"


def test_the_recorded_suite_is_that_of_the_recipe():
    """The means printed beside a demo belong to the recipe that ships."""
    from mergekit_vl.recipes.loading import load_recipe

    suite = json.loads((Path(__file__).parents[2] / "mergekit_vl" / "assets" / "suite.json").read_text())
    assert suite["recipe_hash"] == load_recipe("mergetune_suite").hash
