"""One MergeTune training step: ours on stored features against a literal transcription of the released code's step.

The literal step does what the released code does at each step: six image forwards (one for the task term, one for each of five
alphas), three text forwards (w, w2, zero-shot) at 77 tokens, and backpropagation through the text tower. Both steps compute the
same loss on the same images; both are timed in turn in this process, on ViT-B-16 shapes with random weights.

    python benchmarks/step.py --classes 24 --batch 32 --rounds 3
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.backbones.clip import Clip
from mergekit_vl.models.inputs import MergeInputs, TaskData
from mergekit_vl.models.model import Classes, Single
from mergekit_vl.strategies.mergetune import MergeTune

ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)
LAMBDA, BETA = 8.0, 0.5


def literal_step(model, tokenizer, ctx, ctx2, names, images, labels):
    """The released step, in its own order of work."""
    ids = tokenizer([f"x x x x {name}." for name in names]).to(ctx.device)
    zero_shot_ids = tokenizer([f"a photo of a {name}." for name in names]).to(ctx.device)

    def text(context, ids):
        x = model.token_embedding(ids)
        if context is not None:
            x = torch.cat([x[:, :1], context.expand(len(ids), -1, -1), x[:, 1 + len(context) :]], 1)
        x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
        return model.ln_final(x)[torch.arange(len(ids), device=ids.device), ids.argmax(-1)] @ model.text_projection

    def logits(features):
        image = F.normalize(model.encode_image(images), dim=-1)
        return model.logit_scale.exp() * image @ F.normalize(features, dim=-1).T

    w = text(ctx, ids)
    w2 = text(ctx2, ids)
    w1 = text(None, zero_shot_ids)
    loss = F.cross_entropy(logits(w), labels) + LAMBDA * (1 - F.cosine_similarity(w, w1, dim=-1)).mean()
    for alpha in ALPHAS:
        loss = loss + BETA / len(ALPHAS) * F.cross_entropy(logits(w2 + alpha * (w - w2)), labels)
    loss.backward()
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="ViT-B-16")
    parser.add_argument("--classes", type=int, default=24)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    backbone = Clip(arch=args.arch).build("cpu")
    model, size = backbone.model, backbone.preprocess["image_size"]
    generator = torch.Generator().manual_seed(0)
    names = [f"thing number {i}" for i in range(args.classes)]
    images = torch.randn(args.batch, 3, size, size, generator=generator)
    labels = torch.randint(args.classes, (args.batch,), generator=generator)
    start = backbone.embed("a photo of a")
    ctx2 = start + 0.01 * torch.randn(start.shape, generator=generator)
    ctx = (start + 0.01 * torch.randn(start.shape, generator=generator)).requires_grad_(True)

    began = time.perf_counter()
    features = F.normalize(backbone.encode_image(images), dim=-1)
    once = time.perf_counter() - began
    prompt, classes = Prompt(ctx2, "a photo of a"), Classes(tuple(names))
    inputs = MergeInputs(Single(backbone, ZeroShot()), (Single(backbone, prompt),), (TaskData(classes, None),), None)  # type: ignore[arg-type]
    strategy = MergeTune(lambda_=LAMBDA, beta=BETA, alphas=ALPHAS)
    (network,) = prompt.networks(backbone, [classes], training=True)
    objective = strategy.objective(network, features[None], *strategy.ends(inputs), inputs)

    def our_step():
        loss = sum(objective.terms({"ctx": ctx}, features, labels, None))
        loss.backward()
        return loss

    ratios, ours_s, theirs_s = [], [], []
    our_step()
    for round_ in range(args.rounds):
        ctx.grad = None
        began = time.perf_counter()
        theirs = literal_step(model, backbone.text.tokenizer, ctx, ctx2, names, images, labels)
        theirs_s.append(time.perf_counter() - began)
        their_grad = ctx.grad.clone()
        ctx.grad = None
        began = time.perf_counter()
        ours = our_step()
        ours_s.append(time.perf_counter() - began)
        gap = (ctx.grad - their_grad).norm() / their_grad.norm()
        ratios.append(theirs_s[-1] / ours_s[-1])
        print(f"round {round_ + 1}: literal {theirs_s[-1]:.2f} s, ours {ours_s[-1]:.3f} s, ratio {ratios[-1]:.0f}; "
              f"losses {theirs.item():.6f} {ours.item():.6f}, relative gradient gap {gap:.1e}", flush=True)  # fmt: skip
        assert abs(theirs.item() - ours.item()) < 1e-5 * max(1, abs(theirs.item())), "the losses differ"
    print(f"{args.arch}, {args.classes} classes, batch {args.batch}, {torch.get_num_threads()} threads: median ratio {statistics.median(ratios):.0f} "
          f"(literal {statistics.median(theirs_s):.2f} s, ours {statistics.median(ours_s):.3f} s); one-off features of a batch: {once:.2f} s")  # fmt: skip


if __name__ == "__main__":
    main()
