"""What a GPU gives: image features against the card's measured matrix peak, MergeTune's steps a second, SVD merges, a whole bench.

Weights are random, images are noise that is already on the device, so that the figure is the tower's and not the disk's. The peak is
that of a square matrix product in the tower's precision, measured here; the tower's work is counted, not taken from a table.

    python benchmarks/gpu.py                                                    on a GPU: 50,000 images, bfloat16
    python benchmarks/gpu.py --device cpu --images 64 --classes 10 --steps 3 --blocks 1    the same script, small
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mergekit_vl.backbones.clip import Clip
from mergekit_vl.closed_form import SERIAL, apply
from mergekit_vl.pieces import CHUNK, Arrays, Models, Tensor
from mergekit_vl.strategies.iso_c import IsoC
from mergekit_vl.strategies.mergetune import interpolate
from mergekit_vl.strategies.tsv_m import TsvM
from mergekit_vl.surrogates import cosine
from mergekit_vl.tuners.context import cross_entropy

ALPHAS = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])


def seconds(work, device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def peak(device: str, precision: str, size: int) -> float:
    """FLOP a second of a square matrix product, the best of 10."""
    dtype = getattr(torch, precision)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(10))


def encoding(backbone, images: int, device: str) -> tuple[float, float]:
    """Images a second and FLOP of an image."""
    block = torch.randn(backbone.block, 3, 224, 224, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.image(block[:1])
    backbone.encode_image(block)  # warms up

    def all_of_it() -> None:
        for _ in range(0, images, len(block)):
            backbone.encode_image(block)

    n = -(-images // len(block)) * len(block)
    return n / seconds(all_of_it, device), counter.get_total_flops()


def steps(backbone, classes: int, batch: int, count: int, device: str) -> float:
    """MergeTune's steps a second on stored features."""
    draw = torch.Generator().manual_seed(0)
    names = [f"thing number {i}" for i in range(classes)]
    start = backbone.embed("a photo of a")
    ctx = (start + 0.01 * torch.randn(start.shape, generator=draw).to(device)).requires_grad_(True)
    ctx2 = start + 0.01 * torch.randn(start.shape, generator=draw).to(device)
    prompts = backbone.tokenize([f"{name}." for name in names], len(start))
    with torch.no_grad():
        text1 = backbone.encode_texts([f"a photo of a {name}." for name in names])
        text2 = backbone.encode_prompts(prompts, ctx2)
    features = F.normalize(torch.randn(batch, text1.shape[1], generator=draw), dim=-1).to(device)
    labels = torch.randint(classes, (batch,), generator=draw).to(device)
    alphas = ALPHAS.to(device)
    optimizer = torch.optim.SGD([ctx], lr=0.002, momentum=0.9)

    def step() -> None:
        text = backbone.encode_prompts(prompts, ctx)
        loss = cross_entropy(backbone.scale, text, features, labels) + 8 * cosine(text, text1)
        loss = loss + 0.5 * cross_entropy(backbone.scale, interpolate(text, text2, alphas), features, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    return 1 / statistics.median(seconds(step, device) for _ in range(count))


def merges(device: str, blocks: int) -> dict[str, str]:
    """TSV-M and Iso-C of two models with this many of ViT-B's blocks: seconds on numpy and on the device, and how far apart they are."""
    rng = np.random.default_rng(0)
    sizes = {"attn.in_proj_weight": (2304, 768), "mlp.c_fc.weight": (3072, 768), "mlp.c_proj.weight": (768, 3072)}
    shapes = {f"visual.blocks.{i}.{name}": shape for i in range(blocks) for name, shape in sizes.items()}
    base = {name: 0.02 * rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    near = [{k: v + 0.002 * rng.standard_normal(v.shape, dtype=np.float32) for k, v in base.items()} for _ in range(2)]
    sources = [Arrays({k: (v, "F32") for k, v in model.items()}) for model in (base, *near)]
    given = Models(sources[0], tuple(sources[1:]), tuple(Tensor(k, s) for k, s in shapes.items()), ("A", "B"))
    told = {}
    for method in (TsvM(), IsoC()):
        made: dict[str, dict[str, np.ndarray]] = {}
        times = []
        for place in ("cpu", "cpu:0" if device == "cpu" else device):
            models, out = replace(given, device=place), made.setdefault(place, {})

            def merge(method=method, models=models, out=out) -> None:
                apply(method, models, lambda piece, merged: out.update({piece.tensor.name: merged}), SERIAL, CHUNK)

            times.append(seconds(merge, device))
        ours, theirs = made.values()
        apart = max(np.abs(ours[name] - theirs[name]).max() for name in shapes)
        told[type(method).__name__] = f"{times[0]:.1f} s by numpy, {times[1]:.1f} s on {device}, {apart:.1e} apart"
    return told


def bench(device: str, recipe: str) -> float:
    """Seconds of a whole bench, the process and an empty store included."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["bench", recipe, "--device", device, "--quiet", "--out", str(Path(folder) / "out")]
        environment = {**os.environ, "MERGEKIT_VL_CACHE": str(Path(folder) / "cache")}
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mergekit_vl.cli", *words], env=environment, check=True)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--arch", default="ViT-B-16")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--blocks", type=int, default=12, help="of the SVD merges; 0: none")
    parser.add_argument("--bench", default="bench_small", help="a recipe; empty: none")
    args = parser.parse_args()

    torch.backends.mha.set_fastpath_enabled(
        False
    )  # as in every run: its bits depend on grad mode, and its work is not counted
    backbone = Clip(arch=args.arch).build(args.device)
    card = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "cpu"
    matrix = peak(args.device, backbone.precision, 8192 if args.device.startswith("cuda") else 1024)
    rate, flop = encoding(backbone, args.images, args.device)
    told = {
        "card": card,
        "torch": torch.__version__,
        "precision": backbone.precision,
        "matrix peak, TFLOP/s": round(matrix / 1e12, 2),
        "images a second": round(rate, 1),
        "GFLOP an image": round(flop / 1e9, 2),
        "share of the matrix peak": round(rate * flop / matrix, 3),
        f"MergeTune steps a second ({args.classes} classes, batch {args.batch})": round(
            steps(backbone, args.classes, args.batch, args.steps, args.device), 2
        ),
    }
    if args.device.startswith("cuda"):
        told["peak GPU memory, GB"] = round(torch.cuda.max_memory_allocated(args.device) / 1e9, 2)
    if args.blocks:
        told |= merges(args.device, args.blocks)
    if args.bench:
        told[f"{args.bench}, seconds"] = round(bench(args.device, args.bench), 1)
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
