"""Golden outputs: what recipes and merges give, so that a change that is to change nothing can be held against it.

    python scripts/golden.py write before.json          every recipe that needs no download, at a small size; every merge method
    python scripts/golden.py compare before.json        runs them again; says what differs and ends with 1

Bits depend on the machine and its thread count, so a file is compared where it was written. Names and keys that name code or its hash
are not part of it: scores, tables and tensors are.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

SHORT = ["tuned.0.tuner.epochs=2", "strategy.0.epochs=2"]
RUNS = {
    "mergetune_coop": ["run", "mergetune_coop", *SHORT, "protocol.shots=4"],
    "mergetune_suite": ["run", "mergetune_suite", *SHORT, "strategy.1.epochs=2", "protocol.shots=2", "seed=[1]"],
    "robust_micro": ["run", "robust_micro", "tuned.0.tuner.epochs=1", "strategy.0.epochs=1", "strategy.1.epochs=1", "protocol.shots=4"],
    "robust_micro_probe": ["run", "robust_micro_probe", "protocol.shots=4"],
    "multi_task_micro": ["run", "multi_task_micro", "tuned.0.tuner.epochs=1"],
    "my_photos": ["run", "my_photos", *SHORT, "dataset.path=pictures", "backbone.name=micro"],
    "linear_head_timm": ["run", "linear_head_timm", "dataset.path=pictures", "protocol.shots=4"],
    "bench_small": ["bench", "bench_small", "tuned.0.tuner.epochs=2", "search.budget=2", "search.training_budget=1"],
    "bench_few_shot_micro": ["bench", "bench_few_shot_micro", "seed=[1]", "protocol.shots=2", "search.budget=1"],
    "bench_robust_micro": ["bench", "bench_robust_micro", "seed=[1]", "protocol.shots=2", "search.budget=1"],
    "bench_multi_task_micro": ["bench", "bench_multi_task_micro", "tuned.0.tuner.epochs=1", "strategy.0.steps=2", "search.budget=1"],
}  # fmt: skip
MERGES = (
    "linear", "uniform_soup", "wise_ft", "ema", "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "task_arithmetic", "lines", "ties",
    "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "sce", "consensus", "pcb", "emr", "tall_mask", "tsv_m",
    "iso_c", "iso_cts",
)  # fmt: skip
OPTIONS = {
    "ema": ["decay=0.9"],
    "emr": ["task=1"],
    "tall_mask": ["task=1"],
    "dare_linear": ["density=0.4", "rescale=l1"],
    "della": ["rescale=l1"],
}
COSTS = ("seconds", "ms a sample", "peak MB")
"""Columns of a table that no two runs have in common."""
ONE = {"wise_ft"}
TWO = {"slerp", "nuslerp"}


def command(place: Path, words: list[str], cache: str = "cache") -> str:
    """Run one command with one thread; what it said on failure, or nothing."""
    environment = {**os.environ, "MERGEKIT_VL_CACHE": str(place / cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mergekit_vl", *words], cwd=place, env=environment, capture_output=True, text=True
    )
    return "" if done.returncode == 0 else f"exit {done.returncode}: {done.stderr.strip()[-300:]}"


def prepare(place: Path) -> None:
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    import pictures

    draw = np.random.default_rng(0)
    pictures.write(place / "pictures", draw)
    shapes = {f"visual.blocks.{i}.w": (24, 16) for i in range(2)} | {"visual.bias": (7,), "text.w": (5, 4, 3)}
    base = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(base, place / "base.safetensors")
    for name in "ABC":
        near = {k: (v + 0.1 * draw.standard_normal(v.shape)).astype(np.float32) for k, v in base.items()}
        save_file(near, place / f"{name}.safetensors")


def tensors(folder: Path) -> dict[str, str]:
    """Hash of every tensor file of a folder, by name."""
    told = {}
    for file in sorted(folder.rglob("*.safetensors")):
        if "state" in file.parts:
            continue
        digest = hashlib.sha256()
        for name, values in sorted(load_file(file).items()):
            digest.update(name.encode() + str(values.dtype).encode() + values.tobytes())
        told[str(file.relative_to(folder))] = digest.hexdigest()[:16]
    return told


def of_run(place: Path, name: str) -> dict[str, object]:
    if error := command(place, [*RUNS[name], "--quiet", "--out", name], f"cache-{name}"):
        return {"error": error}
    out = place / name
    told: dict[str, object] = {"tensors": tensors(out)}
    if (out / "report.json").exists():
        cells = json.loads((out / "report.json").read_text())["cells"]
        told["scores"] = [[row["row"], row["score"], row["digest"]] for cell in cells for row in cell["rows"]]
    else:
        with open(out / "results.csv", newline="") as file:
            rows = [
                [row[k] for k in ("dataset", "row", "status", "score", "default_score", "options")]
                for row in csv.DictReader(file)
            ]
        told["scores"] = rows  # fmt: skip
        with open(out / "table.csv", newline="") as file:
            told["table"] = [{k: v for k, v in row.items() if k not in COSTS} for row in csv.DictReader(file)]
    return told


def of_merge(place: Path, method: str) -> dict[str, object]:
    models = ["A", "B", "C"][: 1 if method in ONE else 2 if method in TWO else 3]
    words = ["merge", *(f"{m}.safetensors" for m in models), "--base", "base.safetensors", "--strategy", method]
    error = command(place, [*words, *OPTIONS.get(method, []), "-o", f"merged-{method}", "--quiet"])
    if error:
        error = command(place, [w for w in words if w not in ("--base", "base.safetensors")] + [*OPTIONS.get(method, []), "-o", f"merged-{method}", "--quiet"])  # fmt: skip
    return {"error": error} if error else {"tensors": tensors(place / f"merged-{method}")}


def golden() -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prepare(place)
        with ThreadPoolExecutor(2) as pool:
            merges = dict(zip(MERGES, pool.map(lambda method: of_merge(place, method), MERGES)))
            runs = dict(zip(RUNS, pool.map(lambda name: of_run(place, name), RUNS)))
    return {"runs": runs, "merges": merges}


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in ("write", "compare"):
        raise SystemExit(__doc__)
    made, file = golden(), Path(sys.argv[2])
    failed = [
        f"{kind} {name}: {told['error']}" for kind in made for name, told in made[kind].items() if "error" in told
    ]
    print("\n".join(failed) or "every command ended with 0")
    if sys.argv[1] == "write":
        file.write_text(json.dumps(made, indent=1) + "\n")
        raise SystemExit(bool(failed))
    before = json.loads(file.read_text())
    apart = []
    for kind in before:
        for name, told in before[kind].items():
            now = json.loads(json.dumps(made[kind].get(name)))
            if now != told:
                parts = [part for part in told if (now or {}).get(part) != told[part]]
                apart.append(f"{kind} {name}: {', '.join(parts)} differ")
    print("\n".join(apart) or "the same as before")
    raise SystemExit(bool(apart or failed))


if __name__ == "__main__":
    main()
