"""Our merges against mergekit's from the same YAML, and against fusion_bench's and PEFT's, on random tensors.

    python benchmarks/agreement.py OTHER_VENV/bin/mergekit-pytorch [A_PYTHON_WITH_FUSION_BENCH_AND_PEFT]

Prints the largest difference relative to the largest value for every method that both have. Random drops cannot agree element by
element: DARE and DELLA are compared at density 1, and at density 0.5 by the share that is kept and the L1 norm. The methods on
singular vectors, those on TALL-masks and EMR are compared with fusion_bench's on the task vectors of three models, given to it in float64:
in float32 its own rounding is 0.5e-6 to 3e-6 for singular vectors. Its TIES keeps one element more than the share says, hence that density.
PEFT's functions merge task vectors; they are given ours. Its random drops take the elements that ours drop: its generator is replaced.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from mergekit_vl.merging.chunks import Chunk, Models, Tensor
from mergekit_vl.merging.task_vectors import keep_at_random

SHAPES = {"visual.blocks.0.w": (64, 96), "visual.blocks.1.w": (96, 64), "b": (96,), "conv": (8, 3, 4, 4)}
TWO = "models: [{model: A.safetensors, parameters: {weight: 0.3}}, {model: B.safetensors, parameters: {weight: 0.9}}]\n"
BASE = "base_model: ZS.safetensors\n"
THREE = BASE + "models: [{model: ZS.safetensors}, " + TWO.partition("[")[2]
DENSE = THREE.replace("weight: 0.3", "weight: 0.3, density: 0.5").replace("weight: 0.9", "weight: 0.9, density: 0.7")
PAIR = BASE + "models: [{model: ZS.safetensors}, {model: A.safetensors}]\n"
CASES = {
    "linear": "merge_method: linear\n" + TWO,
    "linear, normalize: false": "merge_method: linear\nparameters: {normalize: false}\n" + TWO,
    "slerp": "merge_method: slerp\nparameters: {t: 0.3}\n" + PAIR,
    "nuslerp": "merge_method: nuslerp\n" + TWO,
    "nuslerp, task vectors": "merge_method: nuslerp\n" + THREE,
    "nuslerp, rows": "merge_method: nuslerp\nparameters: {nuslerp_flatten: false}\n" + TWO,
    "nuslerp, row_wise": "merge_method: nuslerp\nparameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n" + TWO,
    "multislerp": "merge_method: multislerp\n" + TWO,
    "multislerp, base": "merge_method: multislerp\n" + THREE,
    "karcher": "merge_method: karcher\nmodels: [{model: A.safetensors}, {model: B.safetensors}, {model: ZS.safetensors}]\n",
    "model_stock": "merge_method: model_stock\n"
    + THREE.replace(", parameters: {weight: 0.3}", "").replace(", parameters: {weight: 0.9}", ""),
    "model_stock, filter_wise": "merge_method: model_stock\nparameters: {filter_wise: true}\n"
    + THREE.replace(", parameters: {weight: 0.3}", "").replace(", parameters: {weight: 0.9}", ""),
    "task_arithmetic": "merge_method: task_arithmetic\n" + THREE,
    "task_arithmetic, lambda, normalize": "merge_method: task_arithmetic\nparameters: {lambda: 0.7, normalize: true}\n"
    + THREE,
    "ties": "merge_method: ties\n" + DENSE,
    "ties, normalize: false": "merge_method: ties\nparameters: {normalize: false, lambda: 0.5}\n" + DENSE,
    "breadcrumbs": "merge_method: breadcrumbs\nparameters: {gamma: 0.05}\n" + DENSE,
    "breadcrumbs_ties": "merge_method: breadcrumbs_ties\nparameters: {gamma: 0.05}\n" + DENSE,
    "sce": "merge_method: sce\nparameters: {select_topk: 0.3}\n"
    + THREE.replace(", parameters: {weight: 0.3}", "").replace(", parameters: {weight: 0.9}", ""),
    "sce, all": "merge_method: sce\n"
    + THREE.replace(", parameters: {weight: 0.3}", "").replace(", parameters: {weight: 0.9}", ""),
    "dare_linear, density 1": "merge_method: dare_linear\n" + THREE,
    "dare_ties, density 1": "merge_method: dare_ties\n" + THREE,
    "della, density 1": "merge_method: della\n" + THREE,
    "dare_linear": "merge_method: dare_linear\n" + DENSE,
    "dare_ties": "merge_method: dare_ties\n" + DENSE,
    "della": "merge_method: della\n" + DENSE,
    "della_linear": "merge_method: della_linear\n" + DENSE,
}
FUSION_BENCHS = {
    "tsv_m": (["tsv_m"], "tsv.compute_and_sum_svd_mem_reduction(vectors, accelerator='cpu')"),
    "iso_c": (["iso_c"], "iso.iso_c(vectors, accelerator='cpu')"),
    "iso_cts": (["iso_cts"], "iso.iso_cts(vectors, 0.8, accelerator='cpu')"),
    "iso_cts, common=0.5": (["iso_cts", "common=0.5"], "iso.iso_cts(vectors, 0.5, accelerator='cpu')"),
    "consensus": (["consensus", "scale=1"], "shaped(rows.sum(0) * (tall(rows.sum(0)).sum(0) >= 2))"),
    "consensus, ties": (
        ["consensus", "vector=ties", "density=0.20007", "scale=1"],
        "shaped(disjoint() * (tall(disjoint()).sum(0) >= 2))",
    ),
    "tall_mask": (["tall_mask", "task=B"], "shaped(rows.sum(0) * tall(rows.sum(0))[1])"),
    "emr": (["emr", "task=B", "norm=tensors"], "emr(1)"),
}
"""Our options, and what fusion_bench computes of the task vectors."""
FUSION_BENCH = """
import torch
from fusion_bench.method.emr_merging.utils import emr_merge
from fusion_bench.method.isotropic_merging import iso_utils as iso
from fusion_bench.method.tall_mask.utils import generate_task_masks
from fusion_bench.method.task_singular_vector.utils import TSVM_utils as tsv
from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
from safetensors.torch import load_file, save_file
base, *tuned = (load_file(f"{name}.safetensors") for name in ("ZS", "A", "B", "C"))
vectors = [{k: (model[k] - base[k]).double() for k in base} for model in tuned]
rows = torch.stack([torch.cat([v[k].flatten() for k in base]) for v in vectors])
tall = lambda total: generate_task_masks(rows, rows, 0 * rows[0], total, 0.4)
disjoint = lambda: ties_merging(rows, reset_thresh=20, merge_func="dis-sum")
shaped = lambda row: {k: part.reshape(base[k].shape) for k, part in zip(base, row.split([v.numel() for v in base.values()]))}
def emr(task):
    vector, masks, rescalers = emr_merge(vectors)
    return {k: vector[k] * masks[k][task] * rescalers[task] for k in base}
merged = CALL
save_file({k: (base[k] + merged[k]).float().contiguous() for k in base}, "theirs.safetensors")
"""

PEFTS = {
    "task_arithmetic": (["task_arithmetic", "A=0.3", "B=0.9", "C=-0.2"], "task_arithmetic(vectors, weights)"),
    "magnitude_prune": (
        ["breadcrumbs", "gamma=0", "density=0.3", "scale=1", "A=0.3", "B=0.9", "C=-0.2"],
        "magnitude_prune(vectors, weights, 0.3)",
    ),
    "ties": (["ties", "trim=tensor", "density=0.3"], "ties(vectors, ones, 0.3)"),
    "dare_linear": (
        ["dare_linear", "density=0.3", "scale=1", "A=0.3", "B=0.9", "C=-0.2"],
        "dare_linear(vectors, weights, 0.3)",
    ),
    "dare_ties": (["dare_ties", "density=0.3"], "dare_ties(vectors, ones, 0.3)"),
}
"""Our options, and PEFT's function of the task vectors of one tensor."""
PEFT = """
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
base, *tuned = (load_file(f"{name}.safetensors") for name in ("ZS", "A", "B", "C"))
kept = load_file("kept.safetensors")
weights, ones, merged = torch.tensor([0.3, 0.9, -0.2]), torch.ones(3), {}
for k in base:
    masks = iter(kept[f"{k} {i}"] for i in range(3))
    torch.bernoulli = lambda given: next(masks).reshape(given.shape)
    vectors = [model[k] - base[k] for model in tuned]
    merged[k] = (base[k] + merge_utils.CALL).contiguous()
save_file(merged, "theirs.safetensors")
"""


def kept_by_us(density: float) -> dict[str, np.ndarray]:
    """What our random drops keep of each tensor of three models."""
    tensors = tuple(Tensor(name, shape) for name, shape in SHAPES.items())
    models = Models(None, (), tensors, ())
    chunks = [(t, i, Chunk(models, t, 0, t.size)) for t in tensors for i in range(3)]
    return {f"{t.name} {i}": keep_at_random(chunk, i, density).astype(np.float32) for t, i, chunk in chunks}


def of_task_vectors(
    title: str,
    python: str,
    code: str,
    cases: dict[str, tuple[list[str], str]],
    folder: Path,
    environment: dict[str, str],
) -> None:
    """Our merge of three models against what another tool computes of their task vectors."""
    ours = [sys.executable, "-m", "mergekit_vl.commands.app", "merge"]
    words = ["A.safetensors", "B.safetensors", "C.safetensors", "--base", "ZS.safetensors", "-o", "ours", "--force"]
    for row, ((strategy, *options), call) in cases.items():
        row = f"{title} {row}"
        for command in (
            [python, "-c", code.replace("CALL", call)],
            [*ours, *words, "--strategy", strategy, *options],
        ):
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode:
                print(f"{row}: failed: {done.stderr.strip().splitlines()[-1]}")
                break
        else:
            a, b = load_file(folder / "ours" / "model.safetensors"), load_file(folder / "theirs.safetensors")
            print(f"{row}: {max(np.abs(a[k] - b[k]).max() / np.abs(b[k]).max() for k in b):.1e}")


def main() -> None:
    mergekit = sys.argv[1]
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = {}
        for seed, model in enumerate(("ZS", "A", "B", "C")):
            rng = np.random.default_rng(seed)
            noise = {k: rng.standard_normal(shape, dtype=np.float32) for k, shape in SHAPES.items()}
            tensors = {k: np.asarray(base.get(k, 0) + noise[k] * (0.3 if base else 1), np.float32) for k in noise}
            base = base or tensors
            save_file(tensors, folder / f"{model}.safetensors")
        for row, config in CASES.items():
            (folder / "config.yaml").write_text(config)
            for command, out in (
                ([mergekit], "theirs"),
                ([sys.executable, "-m", "mergekit_vl.commands.app", "merge"], "ours"),
            ):
                words = ["config.yaml", *(["-o", out, "--force"] if out == "ours" else [out])]
                done = subprocess.run([*command, *words], cwd=folder, env=environment, capture_output=True, text=True)
                if done.returncode:
                    print(f"{row}: {out} failed: {done.stderr.strip().splitlines()[-1]}")
                    break
            else:
                ours, theirs = (load_file(next((folder / out).glob("*.safetensors"))) for out in ("ours", "theirs"))
                if row in ("dare_linear", "dare_ties", "della", "della_linear"):
                    kept = [np.mean([np.mean(t[k] != base[k]) for k in base]) for t in (ours, theirs)]
                    mass = [sum(np.abs(t[k] - base[k]).sum() for k in base) for t in (ours, theirs)]
                    print(f"{row}: changed {kept[0]:.3f} against {kept[1]:.3f}, L1 {mass[0]:.0f} against {mass[1]:.0f}")
                else:
                    worst = max(np.abs(ours[k] - theirs[k]).max() / np.abs(theirs[k]).max() for k in base)
                    print(f"{row}: {worst:.1e}")
        if len(sys.argv) > 2:
            of_task_vectors("fusion_bench", sys.argv[2], FUSION_BENCH, FUSION_BENCHS, folder, environment)
            save_file(kept_by_us(0.3), folder / "kept.safetensors")
            of_task_vectors("PEFT", sys.argv[2], PEFT, PEFTS, folder, environment)


if __name__ == "__main__":
    main()
