"""Wrong command lines, every command and every kind of wrong value: one line, exit code 2, and nothing is left behind."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from mergekit_vl.backbones.micro import Micro
from mergekit_vl.commands import app
from mergekit_vl.registry.plugins import registry

LONG = "x" * 5000
MERGE = "merge A.safetensors B.safetensors -o out"
LINEAR = f"{MERGE} --strategy linear"
CHECK = "check A.safetensors B.safetensors"
COOP = "run mergetune_coop"
PREDICT = "predict micro ok.png --classes a,b"
EVAL = "eval micro --dataset microworld task=sea_and_sky_emboss"

LINES = f"""
nonsense
--nonsense
--plugins-dir
--plugins-dir nowhere list
--plugins-dir A.safetensors list
--plugins-dir {LONG} list
run
run ''
run nowhere
run nowhere.yaml
run .
run /dev/null
run /dev/zero
run {LONG}
run A.safetensors
run empty.yaml
run broken.yaml
run latin.yaml
run mergetune_coop.yml
{COOP} --nonsense
{COOP} --out ''
{COOP} --out=
{COOP} -o ''
bench bench_small --out ''
landscape mergetune_coop --out ''
merge A.safetensors B.safetensors --strategy linear -o .
merge A.safetensors B.safetensors --strategy linear --force -o ..
merge A.safetensors B.safetensors --strategy linear --force -o /
{COOP} --device
{COOP} --device ''
{COOP} --device gpu
{COOP} --device cpu:7x
{COOP} --device cpu:
{COOP} --device cuda:-1
{COOP} --device cuda:x
{COOP} --seed
{COOP} --seed -5
{COOP} --seed nan
{COOP} --seed inf
{COOP} --seed 1.5
{COOP} --seed ''
{COOP} --seed 99999999999999999999999
{COOP} seed=-1
{COOP} seed=nan
{COOP} seed=[]
{COOP} seed=[1,x]
{COOP} seed
{COOP} =3
{COOP} ''
{COOP} nonsense=1
{COOP} seed=[1
{COOP} 'strategy={{name: wise_ft'
{COOP} strategy=nonsense
{COOP} strategy.name=wise_ft
{COOP} strategy.0.alpha=x
{COOP} strategy.0.name=''
{COOP} strategy.-99.name=wise_ft
{COOP} strategy.99.name=wise_ft
{COOP} tuned=[]
{COOP} tuned=3
{COOP} tuned.0.tuner.epochs=nan
{COOP} tuned.0.tuner.epochs=-3
{COOP} tuned.0.tuner.epochs=many
{COOP} tuned.0.tuner.lr=0
{COOP} tuned.0.tuner.lr=.inf
{COOP} protocol.shots=0
{COOP} protocol.shots=1.5
{COOP} protocol.name=nonsense
{COOP} backbone=nonsense
{COOP} backbone.name=[1]
{COOP} dataset=[]
{COOP} dataset.task=nonsense
{COOP} 'dataset={{name: folder, path: nowhere}}'
{COOP} 'dataset={{name: folder, path: A.safetensors}}'
{COOP} 'dataset={{name: folder, path: {LONG}}}'
{COOP} 'dataset={{name: folder, path: "a\\0b"}}'
{COOP} 'dataset={{name: folder}}'
{COOP} 'tuned=[{{checkpoint: nowhere}}]'
{COOP} 'tuned=[{{checkpoint: {LONG}}}]'
{COOP} 'tuned=[{{checkpoint: ok.png}}]'
{COOP} controls=perhaps
{COOP} 'seed=${{nowhere}}'
{COOP} 'seed=${{'
{COOP} --out A.safetensors
{COOP} --out A.safetensors/below
{COOP} --out taken
{COOP} -o taken
{COOP} --out {LONG}
{COOP} --out /proc/nowhere
check
check ''
check nowhere
check nowhere.yaml
check mergetune_coop seed=x
check mergetune_coop nonsense=1
check broken.yaml
check {LONG}
check A.safetensors nowhere
check A.safetensors {LONG}
{CHECK} --strategy nonsense
{CHECK} --strategy ''
{CHECK} --strategy mergetune
{CHECK} --strategy ties
{CHECK} --base nowhere
{CHECK} --base ok.png
{CHECK} density=0.5
{CHECK} A=
{CHECK} A=x
{CHECK} A=nan
list nonsense
list ''
list strategies tuners
show
show nonsense
show ''
show {LONG}
cache --older-than 3
cache --clear --older-than -1
cache --clear --older-than nan
cache --clear --older-than inf
cache --clear --older-than x
cache nonsense
merge
merge A.safetensors
merge -o out
{MERGE}
{MERGE} --strategy
{MERGE} --strategy nonsense
{MERGE} --strategy ''
{MERGE} --strategy wise_fti
{MERGE} --strategy adamerging
{MERGE} --strategy task_arithmetic
{LINEAR} density=0.5
{LINEAR} weights=[1
{LINEAR} weights=1
{LINEAR} weights=[1,2,3]
{LINEAR} weights=[nan,1]
{LINEAR} weights=[x,1]
{LINEAR} A=0.5
{LINEAR} A=inf B=1
{LINEAR} A=[1 B=1
{LINEAR} --seed -1
{LINEAR} --seed x
{LINEAR} --seed 1e3
{LINEAR} --dtype int8
{LINEAR} --dtype ''
{LINEAR} --threads 0
{LINEAR} --threads -1
{LINEAR} --threads 100000
{LINEAR} --threads nan
{LINEAR} --threads ''
{LINEAR} --max-ram inf
{LINEAR} --max-ram nan
{LINEAR} --max-ram -1G
{LINEAR} --max-ram 0
{LINEAR} --max-ram ''
{LINEAR} --max-ram many
{LINEAR} --max-ram 1K
{LINEAR} --max-ram 1e400G
{LINEAR} --shard-size inf
{LINEAR} --shard-size 1e400G
{LINEAR} --shard-size 0
{LINEAR} --shard-size G
{LINEAR} --device tpu
{LINEAR} --device cpu:7x
{LINEAR} --device cuda:
{LINEAR} --base nowhere
{LINEAR} --base ''
{LINEAR} --keep ''
merge A.safetensors '' --strategy linear -o out
merge A.safetensors nowhere --strategy linear -o out
merge A.safetensors {LONG} --strategy linear -o out
merge A.safetensors . --strategy linear -o out
merge A.safetensors ok.png --strategy linear -o out
merge A.safetensors wide.safetensors --strategy linear -o out
merge A.safetensors /dev/null --strategy linear -o out
merge A.safetensors B.safetensors --strategy linear -o ''
merge A.safetensors B.safetensors --strategy linear -o A.safetensors
merge A.safetensors B.safetensors --strategy linear -o taken
merge A.safetensors B.safetensors --strategy linear -o {LONG}
merge A.safetensors B.safetensors --strategy linear -o /proc/nowhere
merge A.safetensors B.safetensors --strategy linear -o A.safetensors/below
merge broken.yaml -o out
merge nowhere.yaml -o out
merge broken.yaml A.safetensors -o out
verify
verify nowhere
verify ''
verify A.safetensors
verify taken
verify {LONG}
verify merged A
verify merged nonsense=A.safetensors
verify merged A=nowhere
verify merged --threads 0
verify merged --threads 100000
verify metadata-brace
verify metadata-list
verify metadata-empty
verify metadata-text
verify metadata-models
eval
eval ''
eval nowhere
eval {LONG}
eval clip:nonsense
eval vision:nonsense
eval micro
eval micro --dataset nonsense
eval micro --dataset folder
eval micro --dataset folder path=nowhere
eval micro --dataset folder path=[
eval micro --dataset folder nonsense=1
eval micro --dataset folder path
{EVAL} --split nonsense
{EVAL} --split ''
{EVAL} --row main
{EVAL} --checkpoint nowhere
{EVAL} --checkpoint ok.png
{EVAL} --checkpoint .
{EVAL} --device cpu:x
eval report-brace
eval report-empty
eval report-list
eval report-none
eval shots-gone
eval shots-list
predict
predict micro
predict micro ok.png
predict nowhere ok.png
predict micro nowhere.png --classes a,b
predict micro '' --classes a,b
predict micro {LONG} --classes a,b
predict micro A.safetensors --classes a,b
predict micro empty --classes a,b
predict micro ok.png --classes ''
predict micro ok.png --classes a
predict micro ok.png --classes {LONG}
predict micro ok.png --classes A.safetensors
predict micro ok.png --classes .
{PREDICT} --top 0
{PREDICT} --top -1
{PREDICT} --top x
{PREDICT} --row main
{PREDICT} --checkpoint nowhere
{PREDICT} --device ''
predict report-brace ok.png
predict report-empty ok.png
predict shots-gone ok.png
predict shots-list ok.png
bench nowhere
bench ''
bench bench_small --seeds ''
bench bench_small --seeds x
bench bench_small --seeds -1
bench bench_small --seeds 1,,x
bench bench_small --seeds 1]
bench bench_small --strategies ''
bench bench_small --strategies nonsense
bench bench_small --strategies ,
bench bench_small --datasets ''
bench bench_small --datasets nonsense
bench bench_small --shots ''
bench bench_small --shots 0
bench bench_small --shots -1
bench bench_small --shots nan
bench bench_small --shots ²
bench bench_small --device cpu:x
bench bench_small --out A.safetensors
bench bench_small --out taken
bench bench_small -o taken
bench bench_small nonsense=1
bench nonsense=1
landscape
landscape nowhere
landscape multi_task_micro
landscape mergetune_coop --points 2
landscape mergetune_coop --points x
landscape mergetune_coop --plane -1
landscape mergetune_coop --plane nan
landscape mergetune_coop --device cpu:x
landscape mergetune_coop --out A.safetensors
landscape mergetune_coop nonsense=1
""".strip().splitlines()


def test_there_are_enough_of_them():
    assert len(set(LINES)) == len(LINES) > 250
    commands = {line.split()[0] for line in LINES}
    assert commands >= {
        "run",
        "check",
        "list",
        "show",
        "cache",
        "merge",
        "verify",
        "eval",
        "predict",
        "bench",
        "landscape",
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a few good files and many bad ones."""
    here = tmp_path_factory.mktemp("lines")
    for name, width in (("A", 4), ("B", 4), ("wide", 5)):
        save_file({"w": np.arange(2 * width, dtype=np.float32).reshape(2, width)}, here / f"{name}.safetensors")
    Image.new("RGB", (9, 9), (80, 10, 0)).save(here / "ok.png")
    (here / "empty.yaml").write_text("")
    (here / "broken.yaml").write_text("backbone: {name: micro\nseed: 1\n")
    (here / "latin.yaml").write_bytes("backbone: {name: mícro}".encode("latin-1"))
    (here / "empty").mkdir()
    (here / "taken").mkdir()
    (here / "taken" / "precious.txt").write_text("mine")
    tensors = {"w": np.zeros((2, 4), np.float32)}
    told = {"brace": "{", "list": "[]", "empty": "{}", "text": '"x"', "models": '{"models": [3], "base": 1}'}
    for name, metadata in told.items():
        (here / f"metadata-{name}").mkdir()
        save_file(tensors, here / f"metadata-{name}" / "model.safetensors", metadata={"mergekit_vl": metadata})
    report = json.dumps({"cells": [{"rows": [{"row": "coop"}], "dataset": "d", "seed": 1}], "main": "coop"})
    recipe = "dataset: {name: microworld, task: sea_and_sky_emboss}\nstrategy: {name: wise_ft}\n"
    for name, text in {"report-brace": "{", "report-empty": "{}", "report-list": "[]", "report-none": None,
                       "shots-gone": report, "shots-list": report}.items():  # fmt: skip
        state = here / name / "state" / "d-seed1"
        state.mkdir(parents=True)
        (here / name / "recipe.yaml").write_text(recipe)
        (state / "coop.model.json").write_text('{"kind": "zero_shot"}')
        if text is not None:
            (here / name / "report.json").write_text(text)
        if name == "shots-list":
            (state / "shots.json").write_text("[]")
    build = lru_cache(Micro.build)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Micro, "build", lambda micro, device: build(micro, device))  # once for all lines
        patch.chdir(here)
        assert call(*"merge A.safetensors B.safetensors --strategy linear -o merged --quiet".split())[0] == 0
        yield here


def call(*words):
    """Run the console script in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["mergekit-vl", *words])
        patch.setenv("MERGEKIT_VL_PLUGINS", "")
        with pytest.raises(SystemExit) as stop:
            app.main()
    return stop.value.code or 0, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.replace(LONG, "LONG"))
def test_a_wrong_line_is_one_line(line, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("MERGEKIT_VL_CACHE", str(place.parent / "cache"))
    if "--plugins-dir" in line:
        registry.cache_clear()
    before = sorted(place.rglob("*"))
    try:
        code, out, err = call(*shlex.split(line))
    finally:
        if "--plugins-dir" in line:
            registry.cache_clear()
    told = [text for text in err.splitlines() if text.strip() and not text.startswith("warning: ")]
    assert code == 2 and len(told) == 1 and told[0].startswith("error: "), (code, out, err[-2000:])
    assert len(told[0]) < 1100 and told[0].isprintable()
    assert sorted(place.rglob("*")) == before


SHELL = ["run nowhere", "list nonsense", "merge A.safetensors", f"check {LONG}", "verify metadata-brace"]


@pytest.mark.parametrize("line", SHELL, ids=lambda line: line.replace(LONG, "LONG"))
def test_the_same_from_a_shell(line, place):
    words = [sys.executable, "-m", "mergekit_vl", *shlex.split(line)]
    done = subprocess.run(
        words, cwd=place, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not Path(place, "runs").exists()
