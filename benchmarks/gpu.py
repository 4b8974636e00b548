"""What a GPU gives: encoders against the card's matrix peak, MergeTune's step against the released one, SVD merges, a whole bench.

Weights are random and images are noise that is already on the device, so that a figure is the tower's and not the disk's; one row says
what is left of it when the images come from JPEG files. The peak is that of a square matrix product in the tower's precision, measured
here; the tower's work is counted, not taken from a table. Before a step is timed, its loss and gradient are compared with the released
step's in float64 on the CPU. Times are medians of device events after a warm-up.

    python benchmarks/gpu.py --json gpu.json --page docs/gpu.md                  on a GPU: under six minutes
    python benchmarks/gpu.py --device cpu --small                                the same script at a small size
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from step import ALPHAS, BETA, LAMBDA, literal_step
from torch.utils.flop_counter import FlopCounterMode

from mergekit_vl.adapters.graphs import graphed
from mergekit_vl.adapters.lines import cosine_logits, interpolate
from mergekit_vl.backbones.backbone import Backbone
from mergekit_vl.backbones.clip import Clip
from mergekit_vl.backbones.micro import Micro
from mergekit_vl.datasets.folder import Folder
from mergekit_vl.estimators.surrogates import cosine
from mergekit_vl.merging.chunks import CHUNK_SIZE, Arrays, Models, Tensor
from mergekit_vl.merging.engine import SERIAL, apply
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.models.model import ImageEncoder
from mergekit_vl.strategies.iso_c import IsoC
from mergekit_vl.strategies.iso_cts import IsoCTS
from mergekit_vl.strategies.tsv_m import TsvM
from mergekit_vl.system.reproducible import make_reproducible
from mergekit_vl.tuners.sgd import cross_entropy

SHAPES = {"DTD, base classes": 24, "ImageNet, base classes": 500}
"""Data set to number of classes."""
NOT_TIMED = "Not measured in this run of the script."


def seconds(work: Callable[[], object], device: str, rounds: int = 1) -> float:
    """Median time of `rounds` calls after one that warms up; by events on a GPU."""
    work()
    times = []
    for _ in range(rounds):
        if device.startswith("cuda"):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def matrix_peak(device: str, precision: str, size: int) -> float:
    """FLOP a second of a square matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device, 10)


def build(arch: str, device: str) -> Backbone:
    return Micro().build(device) if arch == "micro" else Clip(arch=arch).build(device)


def encoder(arch: str, device: str, images: int, size: int, pictures: Path) -> dict[str, Any]:
    """Throughput of an image tower in each precision, and from files."""
    told: dict[str, Any] = {"arch": arch}
    built = build(arch, device)
    side = built.preprocess["image_size"]
    block = torch.randn(built.block, 3, side, side, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built.image(block[:1])
    told["GFLOP an image"] = counter.get_total_flops() / 1e9
    for precision in dict.fromkeys((built.precision, "float32")):
        backbone = replace(built, precision=precision)
        many = images if precision == built.precision else min(images, 10 * len(block))
        blocks = max(1, many // len(block))
        rate = len(block) / seconds(lambda backbone=backbone: backbone.encode_image(block), device, blocks)
        peak = matrix_peak(device, precision, size)
        told[precision] = {
            "images": blocks * len(block),
            "images a second": rate,
            "peak TFLOP a second": peak / 1e12,
            "share of peak": rate * told["GFLOP an image"] * 1e9 / peak,
        }
    split = Folder(path=str(pictures)).load().train
    store = FeatureStore(None)
    store.features(
        ImageEncoder(built), replace(split, rows=split.rows[: built.block], labels=split.labels[: built.block])
    )
    began = time.perf_counter()
    store.features(ImageEncoder(built), split)
    told["images a second from JPEG files"] = len(split) / (time.perf_counter() - began)
    return told


def write_pictures(folder: Path, count: int) -> None:
    """JPEG files of 500 x 375, smooth as photographs are, in two class folders."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for i in range(count):
        place = folder / ("a", "b")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(place / f"{i}.jpg", quality=90)


class Steps:
    """Our training step and the released one at the same point, on one model."""

    def __init__(self, backbone: Backbone, classes: int, batch: int, dtype: torch.dtype = torch.float32) -> None:
        draw = torch.Generator().manual_seed(0)
        self.backbone, self.device = backbone, backbone.device
        side = backbone.preprocess["image_size"]
        self.names = [f"thing number {i}" for i in range(classes)]
        self.images = torch.randn(batch, 3, side, side, generator=draw).to(self.device, dtype)
        self.labels = torch.randint(classes, (batch,), generator=draw).to(self.device)
        start = backbone.embed("a photo of a")
        first, second = (0.01 * torch.randn(start.shape, generator=draw).to(start) for _ in range(2))
        self.ctx2 = start + first
        self.ctx = (start + second).requires_grad_(True)
        self.optimizer = torch.optim.SGD([self.ctx], lr=0.0, momentum=0.9)
        """Its steps cost what steps cost and leave the point where it is."""
        with torch.no_grad():
            self.features = F.normalize(backbone.model.encode_image(self.images), dim=-1)
            self.prompts = backbone.tokenize([f"{name}." for name in self.names], len(start))
            self.text1 = backbone.encode_texts([f"a photo of a {name}." for name in self.names])
            self.text2 = backbone.encode_prompts(self.prompts, self.ctx2)
        self.alphas = torch.tensor(ALPHAS).to(start)
        encode = lambda ctx: backbone.encode_prompts(self.prompts, ctx)  # noqa: E731
        self.encode = graphed(encode) if self.device.startswith("cuda") else encode

    def ours(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        text = self.encode(self.ctx)
        scale, points = self.backbone.scale, interpolate(text, self.text2, self.alphas)
        loss = cross_entropy(cosine_logits(scale, text, self.features), self.labels) + LAMBDA * cosine(text, self.text1)
        loss = loss + BETA * cross_entropy(cosine_logits(scale, points, self.features), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def released(self, precision: torch.dtype | None = None) -> torch.Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.split(":")[0], precision, enabled=precision is not None):
            loss = literal_step(
                self.backbone.model,
                self.backbone.text.tokenizer,
                self.ctx,
                self.ctx2,
                self.names,
                self.images,
                self.labels,
            )
        self.optimizer.step()
        return loss.detach()

    def gradient(self) -> torch.Tensor:
        return self.ctx.grad.double().cpu().clone()


def parity(arch: str, device: str, classes: int, batch: int) -> dict[str, float]:
    """How far our float32 step on the device is from the released step in float64 on the CPU."""
    exact = build(arch, "cpu")
    exact.model.double()
    reference = Steps(exact, classes, batch, torch.float64)
    there = Steps(build(arch, device), classes, batch)
    with torch.no_grad():  # float32 draws, in float64 too
        reference.ctx.copy_(there.ctx.double().cpu())
        reference.ctx2.copy_(there.ctx2.double().cpu())
    right, ours = reference.released().item(), there.ours().item()
    gap = (there.gradient() - reference.gradient()).norm() / reference.gradient().norm()
    told = {"loss": abs(ours - right) / abs(right), "gradient": gap.item()}
    if not (told["loss"] < 1e-5 and told["gradient"] < 1e-3):
        raise SystemExit(f"our step is not the released one: {told}")
    return told


def steps(arch: str, device: str, batch: int, rounds: int, shapes: dict[str, int]) -> list[dict[str, Any]]:
    backbone = build(arch, device)
    told = []
    for name, classes in shapes.items():
        both = Steps(backbone, classes, batch)
        row = {"shape": name, "classes": classes, "batch": batch, "ours": seconds(both.ours, device, 5 * rounds)}
        row["released, float32"] = seconds(both.released, device, rounds)
        row["released, bfloat16"] = seconds(lambda both=both: both.released(torch.bfloat16), device, rounds)
        told.append(row)
    return told


def merges(device: str, blocks: int, width: int) -> list[dict[str, Any]]:
    """SVD methods on two models with this many of ViT-B's blocks, by numpy and on the device, and how far apart the results are."""
    rng = np.random.default_rng(0)
    sizes = {
        "attn.in_proj_weight": (3 * width, width),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_proj.weight": (width, 4 * width),
    }
    shapes = {f"visual.blocks.{i}.{name}": shape for i in range(blocks) for name, shape in sizes.items()}
    base = {name: 0.02 * rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    near = [{k: v + 0.002 * rng.standard_normal(v.shape, dtype=np.float32) for k, v in base.items()} for _ in range(2)]
    sources = [Arrays({k: (v, "F32") for k, v in model.items()}) for model in (base, *near)]
    given = Models(sources[0], tuple(sources[1:]), tuple(Tensor(k, s) for k, s in shapes.items()), ("A", "B"))
    told = []
    for method in (TsvM(), IsoC(), IsoCTS()):
        made: dict[str, dict[str, np.ndarray]] = {"cpu": {}, "there": {}}
        times = {}
        for place, where in (("cpu", "cpu"), ("there", "cpu:0" if device == "cpu" else device)):
            models, out = replace(given, device=where), made[place]

            def merge(method=method, models=models, out=out) -> None:
                apply(method, models, lambda chunk, merged: out.update({chunk.tensor.name: merged}), SERIAL, CHUNK_SIZE)

            began = time.perf_counter()
            merge()
            times[place] = time.perf_counter() - began
        apart = max(float(np.abs(made["cpu"][name] - made["there"][name]).max()) for name in shapes)
        told.append({"method": type(method).__name__, "numpy": times["cpu"], "device": times["there"], "apart": apart})
    return told


def bench(device: str, recipe: str) -> tuple[float, dict[str, float]]:
    """Seconds of a whole bench, the process and an empty store included, and its scores by cell and row."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        words = ["bench", recipe, "--device", device, "--quiet", "--out", str(out)]
        environment = {**os.environ, "MERGEKIT_VL_CACHE": str(Path(folder) / "cache")}
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mergekit_vl.commands.app", *words], env=environment, check=True)
        took = time.perf_counter() - began
        with open(out / "results.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["status"] == "done"]
    return took, {f"{row['dataset']}: {row['row']}": float(row["score"]) for row in rows}


def benches(device: str, recipe: str) -> dict[str, Any]:
    with ThreadPoolExecutor(2) as both:
        (here, scores), (there, others) = both.map(lambda place: bench(place, recipe), ("cpu", device))
    apart = {row: others[row] - score for row, score in scores.items() if row in others}
    return {
        "recipe": recipe,
        "cpu": here,
        "device": there,
        "rows": len(scores),
        "equal to 0.05 points": sum(abs(each) < 0.05 for each in apart.values()),
        "rows of one device alone": sorted(scores.keys() ^ others.keys()),
        "largest differences": dict(sorted(apart.items(), key=lambda item: -abs(item[1]))[:5]),
    }


def page(told: dict[str, Any]) -> str:
    """The figures as a page of the documentation."""
    lines = [
        "# On a GPU",
        "",
        f"Measured with `python benchmarks/gpu.py` on one {told['card']} with {told['cpus']} CPU cores, torch {told['torch']}. The script writes the tables.",
        "Weights are random. Times are medians of device events after a warm-up.",
        "",
        "## Image features",
        "",
        "The operations per image are counted, a multiplication and an addition as two. The peak is a square matrix product in the same precision on this card.",
        "",
        "| tower | precision | images | images/s | peak, TFLOP/s | share of the peak |",
        "|---|---|---|---|---|---|",
    ]
    for tower in told["encoders"]:
        for precision in [p for p in ("bfloat16", "float32") if p in tower]:
            row = tower[precision]
            lines.append(
                f"| {tower['arch']} ({tower['GFLOP an image']:.1f} GFLOP) | {precision} | {row['images']:,} | {row['images a second']:,.0f} "
                f"| {row['peak TFLOP a second']:.0f} | {row['share of peak']:.0%} |"
            )
    lines += [
        "",
        "From JPEG files of 500 x 375 through the feature store (decoding and resizing on the CPU included): ",
    ]
    lines[-1] += ", ".join(
        f"{t['arch']} {t['images a second from JPEG files']:,.0f} images/s" for t in told["encoders"]
    )
    lines[-1] += ". The CPU limits this, not the card."
    gap = told["parity"]
    lines += [
        "",
        "## A training step of MergeTune",
        "",
        f"The step of mergekit-vl in float32 on the card differs from the released step in float64 on a CPU by {gap['loss']:.1e} (loss) and {gap['gradient']:.1e} (gradient), relative.",
        "The released step (transcribed in `benchmarks/step.py`) is timed in float32, and in bfloat16, which favours it. The step of mergekit-vl is float32.",
        "",
        "| shape (ViT-B-16) | classes | batch | mergekit-vl, ms | mergekit-vl, steps/s | released float32, ms | ratio | released bfloat16, ms | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in told["steps"]:
        ours, single, half = row["ours"], row["released, float32"], row["released, bfloat16"]
        lines.append(
            f"| {row['shape']} | {row['classes']} | {row['batch']} | {1e3 * ours:.1f} | {1 / ours:.0f} "
            f"| {1e3 * single:.0f} | {single / ours:.0f} | {1e3 * half:.0f} | {half / ours:.0f} |"
        )
    lines += ["", "## Merges that take SVDs", ""]
    if "merges" not in told:
        return "\n".join([*lines, NOT_TIMED, ""])
    lines += [
        f"Two models with {told['blocks']} blocks of ViT-B; numpy on the CPU against the card, both in float64.",
        "",
        "| method | numpy, s | card, s | ratio | largest difference |",
        "|---|---|---|---|---|",
    ]
    for row in told["merges"]:
        lines.append(
            f"| {row['method']} | {row['numpy']:.1f} | {row['device']:.1f} | {row['numpy'] / row['device']:.1f} | {row['apart']:.1e} |"
        )
    lines += ["", "## A whole bench", ""]
    if "bench" not in told:
        return "\n".join([*lines, NOT_TIMED, ""])
    both = told["bench"]
    lines += [
        f"`{both['recipe']}`: "
        f"{both['cpu']:.0f} s on the CPU, {both['device']:.0f} s on the card, both at once, start and an empty store included. "
        f"Of {both['rows']} scores {both['equal to 0.05 points']} are the same to 0.05 points; the largest differences:",
        "",
        "| cell and row | card - CPU, points |",
        "|---|---|",
        *(f"| {row} | {apart:+.2f} |" for row, apart in both["largest differences"].items()),
    ]
    if both["rows of one device alone"]:
        lines += ["", "On one of the two alone: " + ", ".join(both["rows of one device alone"]) + "."]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small models and few rounds: shows that the script works")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--page", type=Path, help="write them as a page here")
    args = parser.parse_args()

    make_reproducible(args.device)
    gpu, small = args.device.startswith("cuda"), args.small
    archs = ("micro",) if small else ("ViT-B-16", "ViT-L-14")
    told: dict[str, Any] = {
        "card": torch.cuda.get_device_name(args.device) if gpu else "cpu",
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "blocks": 1 if small else 3,
    }

    def keep(name: str, value: Any) -> None:
        """Told and written at once, so that a script that is stopped leaves what it has."""
        told[name] = value
        print(f"{time.perf_counter() - began:6.1f} s  {name}: {json.dumps(value)}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(told, indent=2) + "\n")

    began = time.perf_counter()
    keep("parity", parity(archs[0], args.device, 3 if small else 24, 2 if small else 4))
    shapes = {"small": 3} if small else SHAPES
    keep("steps", steps(archs[0], args.device, 2 if small else 128, 1 if small else 10, shapes))
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), 16 if small else 3000)
        size, images = (512, 128) if small else (8192, args.images)
        keep("encoders", [encoder(arch, args.device, images, size, Path(folder)) for arch in archs])
    if gpu:
        told["peak GPU memory, GB"] = round(torch.cuda.max_memory_allocated(args.device) / 1e9, 2)
        torch.cuda.empty_cache()
    keep("merges", merges(args.device, told["blocks"], 96 if small else 768))
    if not small:
        keep("bench", benches(args.device, "bench_small"))
    if args.page:
        args.page.write_text(page(told))


if __name__ == "__main__":
    main()
