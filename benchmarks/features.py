"""Feature extraction against its two floors in the same run: the bare forward, and the bare decoding of the same images.

    python benchmarks/features.py --images FOLDER [--arch ViT-B-16] [--n 256] [--rounds 3] [--device cpu]

Each round times, in turn, the image tower on tensors that are in memory already, the decoding and transforming of the files with as
many threads as the store has, and the store itself from files to features. The ratio printed is store / min(forward, decode) in images
a second, a round's own; beside it store / (1 / (1 / forward + 1 / decode)), the floor where both want the same cores; then the growth of
the resident peak from N images to 4 N.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from mergekit_vl.backbones.clip import Clip
from mergekit_vl.backbones.micro import Micro
from mergekit_vl.datasets.base import Split
from mergekit_vl.datasets.folder import Folder
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.models.model import ImageEncoder
from mergekit_vl.models.views import THREADS, eval_view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--arch", default="ViT-B-16", help="an open_clip architecture with random weights, or micro")
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    backbone = (Micro() if args.arch == "micro" else Clip(args.arch)).build(args.device)
    encoder = ImageEncoder(backbone)
    split = Folder(str(Path(args.images).expanduser())).load().train
    few = Split(split.source, split.rows[: args.n], split.labels[: args.n])
    images = torch.stack([eval_view(few.source.load(int(row)), encoder) for row in few.rows[: backbone.block]])
    ratios, rates = [], []
    for number in range(args.rounds):
        began = time.perf_counter()
        for _ in range(0, len(few), len(images)):
            encoder.encode(images)
        forward = -(-len(few) // len(images)) * len(images) / (time.perf_counter() - began)
        began = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda row: eval_view(few.source.load(int(row)), encoder).sum(), few.rows))
        decode = len(few) / (time.perf_counter() - began)
        began = time.perf_counter()
        FeatureStore(None).features(encoder, few)
        ours = len(few) / (time.perf_counter() - began)
        rates.append((forward, decode, ours))
        ratios.append(ours / min(forward, decode))
        print(f"round {number + 1}: forward {forward:.1f}, decode {decode:.1f}, store {ours:.1f} images/s; ratio {ratios[-1]:.2f}", flush=True)  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    more = Split(split.source, split.rows[: 4 * args.n], split.labels[: 4 * args.n])
    FeatureStore(None).features(encoder, more)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    medians = [statistics.median(column) for column in zip(*rates)]
    both = medians[2] * (1 / medians[0] + 1 / medians[1])
    print(f"{args.arch}, {len(few)} images, {args.device}, {torch.get_num_threads()} threads: median ratio {statistics.median(ratios):.2f} "
          f"(forward {medians[0]:.1f}, decode {medians[1]:.1f}, store {medians[2]:.1f} images/s), {both:.2f} of one after the other; "
          f"peak memory grows by {grown:.0f} MiB from {len(few)} to {len(more)} images")  # fmt: skip


if __name__ == "__main__":
    main()
