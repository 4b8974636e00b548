"""The loss barrier between two networks of different starts, with and without `--rebasin`: small ones, on microworld images.

python benchmarks/rebasin.py [--networks resnet vit] [--epochs 15] [--seeds 2]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mergekit_vl.commands.terminal import TerminalReporter
from mergekit_vl.merge_files import streaming
from mergekit_vl.microworld.tasks import MicroTask
from mergekit_vl.strategies.linear import Linear

CLASSES, SIZE, HEADS, SETS, GROUP = 10, 24, 4, 4, "fruit"


def resnet(width: int) -> torch.nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    channels = (width, width, 2 * width, 2 * width)
    return ResNet(
        BasicBlock, (1, 1, 1, 1), num_classes=CLASSES, channels=channels, stem_width=width, replace_stem_pool=False
    )


def vit(width: int) -> torch.nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=SIZE, patch_size=4, embed_dim=width, depth=2, num_heads=HEADS, num_classes=CLASSES, global_pool="avg"
    )


NETWORKS = {"resnet": (resnet, (16, 48), 3e-3), "vit": (vit, (64,), 2e-3)}


def fruit(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten glyphs of the microworld in their own colours on plain and textured grounds, 24 x 24 pixels."""
    tasks = [MicroTask(f"rebasin{i}", GROUP, (), habitat=0.0, classes=CLASSES) for i in range(SETS)]
    parts = [task.images(split) for task in tasks]
    x = torch.from_numpy(np.concatenate([images for images, _ in parts])).permute(0, 3, 1, 2).float() / 255
    return F.avg_pool2d(x, 2) * 4 - 2, torch.from_numpy(np.concatenate([labels for _, labels in parts])).long()


def train(model: torch.nn.Module, data: tuple, seed: int, epochs: int, lr: float) -> None:
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * -(-len(x) // 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(50):
            dx, dy = torch.randint(-2, 3, (2,), generator=generator).tolist()
            loss = F.cross_entropy(model(x[rows].roll((dx, dy), (2, 3))), y[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def score(model: torch.nn.Module, data: tuple) -> tuple[float, float]:
    logits = model.eval()(data[0])
    return float(F.cross_entropy(logits, data[1])), float((logits.argmax(1) == data[1]).float().mean())


@torch.no_grad()
def estimate_batch_norm(model: torch.nn.Module, images: torch.Tensor) -> None:
    """BatchNorm's statistics of the merged network, from training images."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    for batch in images.split(200):
        model(batch)


def measure(name: str, width: int, seed: int, epochs: int, folder: Path) -> dict[str, tuple[float, float]]:
    """Loss on training images and accuracy on others, of the two networks and of their midpoints."""
    make, _, lr = NETWORKS[name]
    fit, other = fruit("test"), fruit("train")  # the larger split to train on
    found, ends = {}, []
    for i in (0, 1):
        torch.manual_seed(1000 * seed + i)
        model = make(width)
        train(model, fit, 1000 * seed + i, epochs, lr)
        place = folder / f"{name}-{width}-{seed}-{i}"
        place.mkdir()
        save_file(model.state_dict(), place / "model.safetensors")
        (place / "config.json").write_text(json.dumps({"model_args": {"num_heads": HEADS}}))
        ends.append(str(place))
        found[f"network {i + 1}"] = (score(model, fit)[0], score(model, other)[1])
    for rebasin in (False, True):
        began = time.monotonic()
        plan = streaming.MergePlan("linear", Linear(), tuple(ends), rebasin=rebasin)
        streaming.merge(plan, folder / "mid", force=True, reporter=TerminalReporter(True))
        model.load_state_dict(load_file(folder / "mid/model.safetensors"))
        row = "midpoint, rebasin" if rebasin else "midpoint"
        print(f"  {row}: merged in {time.monotonic() - began:.1f} s")
        found[row] = (score(model, fit)[0], score(model, other)[1])
        if name == "resnet":
            estimate_batch_norm(model, fit[0])
            found[f"{row}, statistics estimated again"] = (score(model, fit)[0], score(model, other)[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    for name in args.networks:
        for width in NETWORKS[name][1]:
            with tempfile.TemporaryDirectory() as folder:
                runs = [measure(name, width, seed, args.epochs, Path(folder)) for seed in range(args.seeds)]
            print(
                f"{name}, width {width}: loss on training images (barrier), accuracy on other images; mean of {len(runs)} pairs"
            )
            ends = np.mean([[run["network 1"], run["network 2"]] for run in runs], (0, 1))
            for row in runs[0]:
                loss, accuracy = np.mean([run[row] for run in runs], 0)
                print(f"  {row:50s} {loss:6.3f} ({loss - ends[0]:+.3f})  {100 * accuracy:5.1f} %")


if __name__ == "__main__":
    main()
