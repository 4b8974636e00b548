"""Pretrain the embedded micro CLIP on the microworld (CPU, resumable) and write it into the package.

python scripts/pretrain_micro.py --steps 2500 --state micro.pt
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mergekit_vl.backbones import micro
from mergekit_vl.microworld.pretraining import sample_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path("micro_pretraining.pt"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = micro.untrained().to(memory_format=torch.channels_last).train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.98)
    )
    start = 0
    if args.state.exists():
        saved = torch.load(args.state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    encode = torch.compile(model.visual) if args.compile else model.visual
    tokenize = micro.tokenizer()
    began, running = time.time(), 0.0
    for step in range(start, args.steps):
        warm = min(1.0, (step + 1) / args.warmup)
        lr = args.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, captions = sample_batch(np.random.default_rng((args.seed, step)))
        ids = tokenize(captions)
        images = micro.normalise(images).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            image = F.normalize(encode(images).float(), dim=-1)
            text = F.normalize(micro.encode_short(model, ids).float(), dim=-1)
        logits = model.logit_scale.exp() * image @ text.T
        target = torch.arange(len(ids))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        running += loss.item()
        if (step + 1) % 50 == 0:
            acc = (logits.argmax(1) == target).float().mean().item()
            print(
                f"step {step + 1} loss {running / 50:.3f} batch accuracy {acc:.3f} scale {model.logit_scale.exp().item():.1f} {(time.time() - began) / (step + 1 - start):.2f} s/step",
                flush=True,
            )
            running = 0.0
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            temporary = args.state.with_suffix(".tmp")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, temporary)
            temporary.rename(args.state)
            micro.export(model, args.state.with_suffix(".safetensors"))
    print("to ship it: copy", args.state.with_suffix(".safetensors"), "to mergekit_vl/assets/micro_clip.safetensors")


if __name__ == "__main__":
    main()
