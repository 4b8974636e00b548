"""What only a GPU can show: that it gives the numbers of a CPU, that whole runs go through on it, and that they repeat."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pictures
import pytest
import torch
from test_merge_methods import merged, models, random_models
from test_text_towers import tower

from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.backbones.micro import Micro
from mergekit_vl.errors import UserError
from mergekit_vl.models.inputs import MergeInputs, TaskData
from mergekit_vl.models.model import Classes, Single
from mergekit_vl.strategies.iso_c import IsoC
from mergekit_vl.strategies.iso_cts import IsoCTS
from mergekit_vl.strategies.mergetune import MergeTune
from mergekit_vl.strategies.tsv_m import TsvM
from mergekit_vl.system.reproducible import make_reproducible

pytestmark = pytest.mark.gpu

RUNS = {
    "prompt": ["run", "mergetune_coop", "tuned.0.tuner.epochs=2", "strategy.0.epochs=2", "protocol.shots=4"],
    "again": ["run", "mergetune_coop", "tuned.0.tuner.epochs=2", "strategy.0.epochs=2", "protocol.shots=4"],
    "fisher": ["run", "mergetune_coop", "tuned.0.tuner.epochs=2", "strategy.0.epochs=2", "protocol.shots=2", "strategy.0.surrogate=fisher", "strategy.0.space=weights"],
    "probe": ["run", "robust_micro_probe", "protocol.shots=4"],
    "tower": ["run", "robust_micro", "protocol.shots=4", "tuned.0.tuner.epochs=1", "strategy.0.epochs=1", "strategy.1.epochs=1"],
    "towers": ["run", "multi_task_micro", "tuned.0.tuner.epochs=1"],
    "timm": ["run", "linear_head_timm", "dataset.path=pictures", "protocol.shots=4"],
    "bfloat16": ["run", "linear_head_timm", "dataset.path=pictures", "protocol.shots=4", "backbone.precision=bfloat16"],
    "bench": ["bench", "bench_small", "tuned.0.tuner.epochs=2", "search.budget=2", "search.training_budget=1"],
    "bench of heads": ["bench", "bench_few_shot_micro", "seed=1", "protocol.shots=2", "search.budget=1"],
    "bench of towers": ["bench", "bench_multi_task_micro", "tuned.0.tuner.epochs=1", "strategy.0.steps=3", "search.budget=1"],
}  # fmt: skip
GPU_ALONE = {"again", "bfloat16", "bench of heads", "bench of towers"}
"""Runs without a twin on the CPU."""
SAME = {"tower": 8.0, "towers": 8.0}
"""Points by which scores on a CPU and on a GPU may differ; 1 where nothing is said. A tower that is trained goes its own way."""


@pytest.fixture(scope="module", autouse=True)
def reproducible():
    make_reproducible("cuda")
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Every run that a collected test asks for, on a CPU and on a GPU, all at once, each with a store of its own."""
    asked = {"prompt", "again"}
    asked |= {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    place = tmp_path_factory.mktemp("runs")
    pictures.write(place / "pictures", np.random.default_rng(0), side=64)
    started = {}
    for name, words in RUNS.items():
        if name not in asked:
            continue
        for device in ("cuda",) if name in GPU_ALONE else ("cpu", "cuda"):
            out, log = place / f"{name} {device}", place / f"{name} {device}.log"
            store = {"MERGEKIT_VL_CACHE": str(place / "stores" / out.name), "OMP_NUM_THREADS": "1"}
            command = [
                sys.executable,
                "-m",
                "mergekit_vl.commands.app",
                *words,
                "--device",
                device,
                "--quiet",
                "--out",
                str(out),
            ]
            with log.open("w") as file:
                process = subprocess.Popen(command, cwd=place, env=os.environ | store, stdout=file, stderr=file)
            started[name, device] = (process, out, log)
    return {key: (process.wait(), out, log.read_text()) for key, (process, out, log) in started.items()}


def rows_of(out):
    """Scores by row, of a run or of a bench."""
    if (out / "report.json").exists():
        return {row["row"]: row["score"] for row in json.loads((out / "report.json").read_text())["cells"][0]["rows"]}
    with open(out / "results.csv", newline="") as file:
        return {(r["dataset"], r["row"]): float(r["score"]) for r in csv.DictReader(file) if r["status"] == "done"}


@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run_goes_through(runs, name):
    code, out, log = runs[name, "cuda"]
    assert code == 0, log
    assert all(np.isfinite(list(rows_of(out).values())))


@pytest.mark.parametrize("name", [name for name in RUNS if name not in GPU_ALONE])
def test_a_whole_run_gives_the_scores_of_a_cpu(runs, name):
    code, _, log = runs[name, "cpu"]
    assert code == 0, log
    here, there = (rows_of(runs[name, device][1]) for device in ("cpu", "cuda"))
    assert here.keys() == there.keys()
    apart = {row: there[row] - score for row, score in here.items() if abs(there[row] - score) > SAME.get(name, 1.0)}
    assert not apart


def test_the_same_run_gives_the_same_bytes(runs):
    first, again = (runs[name, "cuda"][1] for name in ("prompt", "again"))
    for file in ("merged.safetensors", "scores.json"):
        assert (first / file).read_bytes() == (again / file).read_bytes()


@pytest.mark.parametrize("kind", ["classic", "resnet, quickgelu", "siglip", "coca"])
def test_features_are_those_of_a_cpu(kind):
    here, there = tower(kind), tower(kind, device="cuda")
    size = here.preprocess["image_size"]
    images = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    plain = here.encode_image(images)
    exact = replace(there, precision="float32").encode_image(images).cpu()
    assert (exact - plain).norm() < 1e-5 * plain.norm()
    assert there.precision == "bfloat16"
    near = there.encode_image(images)
    assert near.dtype == torch.float32 and (near.cpu() - plain).norm() < 3e-2 * plain.norm()
    for words in (None, "a photo of a"):
        texts = [
            b.encode_prompts(b.tokenize(["dog.", "cat."], 4 if words else 0), b.embed(words) if words else None).cpu()
            for b in (here, there)
        ]
        assert (texts[0] - texts[1]).norm() < 1e-5 * texts[0].norm()


@pytest.mark.parametrize("space", ["classifiers", "weights"])
@pytest.mark.parametrize("surrogate", ["cosine", "l2"])
def test_a_step_of_mergetune_is_that_of_float64_on_a_cpu(space, surrogate):
    """Loss to 1e-5, gradient to 1e-4 of its norm."""

    def step(device, dtype):
        backbone = Micro().build(device)
        backbone.model.to(dtype)
        classes = Classes(("dog", "car", "apple"))
        draw = torch.Generator().manual_seed(5)
        start = backbone.embed("a photo of a")
        noise = torch.randn(start.shape, generator=draw, dtype=torch.float64)
        images = torch.nn.functional.normalize(torch.randn(6, 128, generator=draw, dtype=torch.float64), dim=-1)
        tuned = Single(backbone, Prompt(backbone.embed("a sketch of a"), "a photo of a"))
        inputs = MergeInputs(Single(backbone, ZeroShot()), (tuned,), (TaskData(classes, None),), None, seed=3)
        strategy = MergeTune(space=space, surrogate=surrogate)
        (network,) = tuned.adapter.networks(
            backbone, [classes], training=True
        )  # its text forward is a graph on the GPU
        x, draw = images.to(start), torch.Generator().manual_seed(4)
        objective = strategy.objective(network, x[None], *strategy.ends(inputs), inputs)
        ctx = (start + start.std() * noise.to(start)).detach().requires_grad_(True)
        labels = torch.tensor([0, 2, 1, 1, 0, 2], device=device)
        if device == "cuda":  # another step before it
            sum(objective.terms({"ctx": (2 * ctx).detach().requires_grad_(True)}, x, labels, draw)).backward()
        value = sum(objective.terms({"ctx": ctx}, x, labels, draw))
        value.backward()
        return value.item(), ctx.grad.double().cpu()

    exact, single = step("cpu", torch.float64), step("cuda", torch.float32)
    assert abs(exact[0] - single[0]) < 1e-5 * abs(exact[0])
    assert (exact[1] - single[1]).norm() < 1e-4 * exact[1].norm()


@pytest.mark.parametrize("method", [TsvM(), IsoC(), IsoCTS()], ids=str)
def test_svd_merges_are_those_of_numpy(method):
    base, tuned = random_models(3, n=3)
    given = models(*tuned, base=base)
    here, there = merged(method, given), merged(method, replace(given, device="cuda"))
    for name in here:
        np.testing.assert_allclose(there[name], here[name], rtol=1e-5, atol=1e-6)
    bad = np.ones((3, 4))
    bad[1, 2] = np.inf
    with pytest.raises(UserError, match="B: w has values that are not finite"):
        merged(method, replace(models(np.ones((3, 4)) * 2, bad, base=np.zeros((3, 4))), device="cuda"))
