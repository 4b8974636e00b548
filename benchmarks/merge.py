"""Merging three ViT-B-16 checkpoints: whole processes, against mergekit and sd-mecha where they are installed.

    python benchmarks/merge.py --mergekit OTHER_VENV/bin/mergekit-pytorch [--sd-mecha OTHER_VENV/bin/python] [--runs 5] [--json FILE]

Makes three fp32 safetensors of 598.5 MB with the shapes of open_clip's ViT-B-16 in a temporary folder, reads them once, and then in
each round runs every tool on every method, one after the other, from start to exit: mergekit's and ours read the same mergekit YAML.
A round begins with the disk's floor, copying one file and syncing it. Medians are printed; memory is the peak of RssAnon (pages that
are no file's), with the peak of RSS beside it, both sampled every 5 ms. The outputs of the last round are compared with each other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

LINEAR = "merge_method: linear\nmodels: [{model: ZS, parameters: {weight: 1}}, {model: A, parameters: {weight: 1}}, {model: B, parameters: {weight: 1}}]\n"
TASK = "base_model: ZS\nmodels: [{model: ZS}, {model: A, parameters: {weight: 0.4}}, {model: B, parameters: {weight: 0.4}}]\n"
SPARSE = TASK.replace("0.4}", "1, density: 0.2}")
METHODS = {
    "linear": LINEAR,
    "task_arithmetic": "merge_method: task_arithmetic\n" + TASK,
    "slerp": "merge_method: slerp\nbase_model: ZS\nmodels: [{model: ZS}, {model: A}]\nparameters: {t: 0.5}\n",
    "dare_ties": "merge_method: dare_ties\n" + SPARSE,
    "ties": "merge_method: ties\n" + SPARSE,
}
MECHA = {
    "linear": "s.n_average(*m)",
    "slerp": "s.slerp(m[0], m[1], alpha=0.5)",
    "ties": "l.add_difference(m[0], s.ties_sum(*(s.subtract(x, m[0]) for x in m[1:]), k=0.2, vote_sgn=True), alpha=1.0)",
}
MECHA_CODE = (
    "import sd_mecha as s; from sd_mecha.extensions.builtin.merge_methods import linear as l; s.set_log_level('ERROR'); m = [s.model(f'{{n}}.safetensors') for n in ('ZS', 'A', 'B')]\n"
    "s.merge({recipe}, output='{out}', output_dtype=None)"
)
OWN = {
    "ties, paper (whole model)": ["ties", "density=0.2"],
    "dare_ties, paper": ["dare_ties", "density=0.2"],
    "dare_linear": ["dare_linear", "density=0.2"],
    "della": ["della"],
    "breadcrumbs": ["breadcrumbs"],
    "model_stock": ["model_stock"],
    "karcher": ["karcher"],
    "multislerp": ["multislerp"],
    "nuslerp": ["nuslerp"],
    "nuslerp, along=last": ["nuslerp", "along=last"],
    "lines": ["lines"],
    "sce": ["sce"],
    "consensus": ["consensus"],
    "consensus, vector=ties": ["consensus", "vector=ties"],
    "emr, task=A": ["emr", "task=A"],
    "tall_mask, task=A": ["tall_mask", "task=A"],
    "pcb": ["pcb"],
    "iso_c": ["iso_c"],
    "iso_cts": ["iso_cts"],
    "tsv_m": ["tsv_m"],
    "ema": ["ema"],
    "uniform_soup": ["uniform_soup"],
}
"""Methods that are timed alone: options of ours without a counterpart above."""


def vit_b_16() -> dict[str, tuple[int, ...]]:
    """Names and shapes of open_clip's ViT-B-16: 302 tensors, 149.6 million elements."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, 512),
        "text_projection": (512, 512),
        "logit_scale": (),
        "visual.class_embedding": (768,),
        "visual.positional_embedding": (197, 768),
        "visual.proj": (768, 512),
        "visual.conv1.weight": (768, 3, 16, 16),
        "token_embedding.weight": (49408, 512),
    }
    for name, width in (("visual.ln_pre", 768), ("visual.ln_post", 768), ("ln_final", 512)):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for tower, width in (("visual.", 768), ("", 512)):
        for i in range(12):
            block = f"{tower}transformer.resblocks.{i}"
            for part, rows, columns in (
                ("attn.in_proj_", 3 * width, width),
                ("attn.out_proj.", width, width),
                ("mlp.c_fc.", 4 * width, width),
                ("mlp.c_proj.", width, 4 * width),
            ):
                shapes |= {f"{block}.{part}weight": (rows, columns), f"{block}.{part}bias": (rows,)}
            for norm in ("ln_1", "ln_2"):
                shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
    return shapes


def make_models(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """ZS, and A and B near it."""
    base: dict[str, np.ndarray] = {}
    for seed, name in enumerate(("ZS", "A", "B")):
        rng = np.random.default_rng(seed)
        noise = {k: rng.standard_normal(shape, dtype=np.float32) for k, shape in shapes.items()}
        scale = 0.02 if name == "ZS" else 0.002
        model = {k: np.asarray(base.get(k, 0) + np.float32(scale) * v, np.float32) for k, v in noise.items()}
        base = base or model
        save_file(model, folder / f"{name}.safetensors")


def measure(command: list[str], folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Seconds, seconds of CPU, and peak megabytes of RssAnon and of RSS."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    anonymous = resident = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            anonymous = max(anonymous, int(status.split("RssAnon:")[1].split()[0]))
            resident = max(resident, int(status.split("VmHWM:")[1].split()[0]))
        except (OSError, IndexError):
            pass
        time.sleep(0.005)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {process.stderr.read()[-2000:]}")  # type: ignore[union-attr]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu": cpu, "anonymous": anonymous / 1024, "resident": resident / 1024}


def floor(folder: Path) -> float:
    """Seconds to copy one model and sync it."""
    began = time.perf_counter()
    shutil.copyfile(folder / "ZS.safetensors", folder / "floor")
    with open(folder / "floor") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    (folder / "floor").unlink()
    return seconds


def differences(ours: Path, theirs: Path, base: Path) -> str:
    """The largest difference between two merges, relative to the largest change from the base; and how much each changes."""
    largest = change = 0.0
    kept, mass = [0, 0], [0.0, 0.0]
    with safe_open(ours, "np") as a, safe_open(theirs, "np") as b, safe_open(base, "np") as start:
        for name in a.keys():  # noqa: SIM118
            x, y, z = (file.get_tensor(name) for file in (a, b, start))
            if x.size:
                largest = max(largest, float(np.abs(x - y).max()))
                change = max(change, float(np.abs(x - z).max()))
            for i, tensor in enumerate((x, y)):
                kept[i] += int(np.count_nonzero(tensor != z))
                mass[i] += float(np.abs(tensor - z).sum(dtype=np.float64))
    return f"max |ours - theirs| {largest:.1e} at max |ours - base| {change:.1e}; elements changed {kept[0] / kept[1]:.5f} of theirs, L1 change {mass[0] / mass[1]:.5f} of theirs"


def commands_of(folder: Path, given: argparse.Namespace) -> dict[tuple[str, str], list[str]]:
    """By row and tool the command that is measured; writes the recipes that they read."""
    mine = [sys.executable, "-m", "mergekit_vl.commands.app"]
    commands: dict[tuple[str, str], list[str]] = {}
    for method, config in METHODS.items():
        for model in ("ZS", "A", "B"):
            config = config.replace(f": {model}", f": {model}.safetensors")
        (folder / f"{method}.yaml").write_text(config)
        commands[method, "ours"] = [*mine, "merge", f"{method}.yaml", "-o", "OUT"]
        if given.mergekit:
            commands[method, "mergekit"] = [given.mergekit, f"{method}.yaml", "OUT"]
        if given.sd_mecha and method in MECHA:
            code = MECHA_CODE.format(recipe=MECHA[method], out="OUT.safetensors")
            commands[method, "sd-mecha"] = [given.sd_mecha, "-c", code]
    for row, (strategy, *options) in ({} if given.rivals_only else OWN).items():
        words = ["A.safetensors", "B.safetensors", "--base", "ZS.safetensors", "--strategy", strategy, *options]
        commands[row, "ours"] = [*mine, "merge", *words, "-o", "OUT"]
    commands["--help", "ours"] = [*mine, "--help"]
    if given.mergekit:
        commands["--help", "mergekit"] = [given.mergekit, "--help"]
    return commands


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--mergekit", help="mergekit's mergekit-pytorch")
    arguments.add_argument("--sd-mecha", help="a python that has sd-mecha")
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--only", nargs="*", help="rows that contain one of these words")
    arguments.add_argument("--rivals-only", action="store_true", help="leave out the rows that no rival has")
    arguments.add_argument("--json", type=Path, help="write every measurement here")
    given = arguments.parse_args()
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder, vit_b_16())
        commands = commands_of(folder, given)
        if given.only:
            commands = {key: c for key, c in commands.items() if any(word in key[0] for word in given.only)}
        measured: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in commands}
        floors = []
        for round_ in range(given.runs):
            floors.append(floor(folder))
            for (row, tool), command in commands.items():
                out = f"{tool}-{row}".replace(" ", "_").replace(",", "").replace("(", "").replace(")", "")
                shutil.rmtree(folder / out, ignore_errors=True)
                (folder / f"{out}.safetensors").unlink(missing_ok=True)
                command = [word.replace("OUT", out) for word in command]
                measured[row, tool].append(measure(command, folder, environment))
                if round_ < given.runs - 1 or row not in METHODS:
                    shutil.rmtree(folder / out, ignore_errors=True)
                    (folder / f"{out}.safetensors").unlink(missing_ok=True)
            print(f"round {round_ + 1} of {given.runs}", file=sys.stderr)
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}"
        )
        print(
            f"load {os.getloadavg()[0]:.1f}; disk floor {min(floors):.2f} to {max(floors):.2f} s; {given.runs} runs each, medians (lowest to highest)"
        )
        print("| | tool | s | CPU s | RssAnon, GB | RSS, GB |\n|---|---|---|---|---|---|")
        for (row, tool), runs in measured.items():
            times = sorted(run["seconds"] for run in runs)
            memory = [statistics.median(run[kind] for run in runs) / 1024 for kind in ("anonymous", "resident")]
            print(
                f"| {row} | {tool} | {statistics.median(times):.2f} ({times[0]:.2f} to {times[-1]:.2f}) | {statistics.median(run['cpu'] for run in runs):.2f} | {memory[0]:.2f} | {memory[1]:.2f} |"
            )
        for method in METHODS:
            if (method, "ours") not in commands:
                continue
            ours = next((folder / f"ours-{method}").glob("*.safetensors"))
            for tool in ("mergekit", "sd-mecha"):
                if (method, tool) in commands:
                    theirs = next(
                        iter((folder / f"{tool}-{method}").glob("*.safetensors")),
                        folder / f"{tool}-{method}.safetensors",
                    )
                    print(f"{method}, against {tool}: {differences(ours, theirs, folder / 'ZS.safetensors')}")
        if given.json:
            plain = {f"{row} | {tool}": runs for (row, tool), runs in measured.items()}
            given.json.write_text(json.dumps({"floors": floors, "runs": plain}, indent=1) + "\n")


if __name__ == "__main__":
    main()
