"""Peak memory and time of a CoOp step: text forward and backward of all classes, as `tuners/coop.py` takes it.

    python scripts/coop_memory.py --arch ViT-B-16 --classes 1000 --device cpu

Weights are random (memory and time do not depend on them); class names are ImageNet's, longest first where fewer are asked for.
On a CPU the peak is the process's resident memory, on a GPU what torch allocated there.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import open_clip
import torch

from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.backbones import text
from mergekit_vl.backbones.clip import Clip
from mergekit_vl.models.model import Classes
from mergekit_vl.tuners.sgd import cross_entropy


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default="ViT-B-16")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--context", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--whole", action="store_true", help="no chunks: what it would take without them")
    given = parser.parse_args()
    torch.backends.mha.set_fastpath_enabled(False)

    backbone = Clip(given.arch).build(given.device)
    built = peak(given.device)
    if given.whole:
        text.ACTIVATIONS = 1 << 60
    names = tuple(sorted(open_clip.IMAGENET_CLASSNAMES, key=len, reverse=True)[: given.classes])
    prompt = Prompt.start(backbone, init=None, n_context=given.context, seed=0)
    (network,) = prompt.networks(backbone, [Classes(names)], training=False)
    ctx = prompt.ctx.clone().requires_grad_(True)
    optimizer = torch.optim.SGD([ctx], lr=0.002, momentum=0.9)
    draw = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(32, backbone.model.visual.output_dim, generator=draw), dim=-1)
    images, labels = images.to(given.device), torch.randint(0, len(names), (32,), generator=draw).to(given.device)
    began = time.perf_counter()
    for _ in range(given.steps):
        loss = cross_entropy(network({"ctx": ctx}, images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    seconds = (time.perf_counter() - began) / given.steps
    length = prompt.tokenize(backbone, Classes(names)).ids.shape[1]
    print(
        json.dumps(
            vars(given)
            | {
                "tokens": length,
                "rows_at_once": backbone.text.rows_at_once(length),
                "gib_built": round(built / 2**30, 2),
                "gib_peak": round(peak(given.device) / 2**30, 2),
                "seconds_a_step": round(seconds, 2),
                "gradient_norm": ctx.grad.norm().item(),
            }
        )
    )


def peak(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
