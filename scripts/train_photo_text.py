"""Train the text tower of `photo` on the names of things (one CPU core, resumable) and write the file that ships in the package.

apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet
python scripts/train_photo_text.py --wordnet wordnet/usr/share/wordnet --state photo_text.pt

No picture is looked at. What is learnt are directions of EfficientNet-Lite0's own classifier (`backbones/photo.py`), by squared distance
of unit vectors; `photo_names.py` says which noun stands for which. Names come bare, in open_clip's templates, after random contexts as
CoOp learns them, as plurals, with articles and adjectives. The token embedding starts at the ridge regression of targets on names' tokens.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import open_clip
import photo_names
import torch
import torch.nn.functional as F
from photo_names import Noun, Relatives
from torch import Tensor, nn
from wordnet import Nouns

from mergekit_vl.backbones import known_rows, photo

PLAIN = "a photo of a {}."
PARTS = ("face", "head", "body", "side", "view", "picture", "photo", "drawing")
"""Words after a name that leave it what it is."""
ADJECTIVES = 300
RELATIVE = 0.9
"""Cosine of a relative's target with the mean of its classes: it is less sure than a class of its own. Chosen on the training and
validation images of Caltech101's base half: 61.0% at 1, 65.1 at 0.95, 66.7 at 0.9, 67.7 at 0.85, where helicopters are lost to aeroplanes."""
SIZE = 0.2
"""Of the residual stream as it is shipped: rows as large as CLIP's, so that a context moves as far at the learning rates of the field."""
CHUNK = 64
"""Texts in one forward."""


@dataclass(frozen=True)
class Lesson:
    """Names with targets [N, D] of unit length, how often each is drawn, the rows [V] of the vocabulary and words that change nothing."""

    nouns: list[Noun]
    targets: Tensor
    weights: Tensor
    rows: Tensor
    adjectives: list[str]


def projection(state: dict[str, Tensor], width: int = photo.WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    """Of a classifier [1000, 1280]: weight [D, 1280] and bias [D] of the linear layer, and every class's text direction [1000, D].

    With the centred classifier W = U S V', the layer is V'(f - c), where W c = -b: cosines with U S rank as the logits W f + b.
    """
    weight, bias = (state[f"classifier.{part}"].double() for part in ("weight", "bias"))
    weight, bias = weight - weight.mean(0), bias - bias.mean()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    left, values, right = left[:, :width], values[:width], right[:width]
    centre = -torch.linalg.pinv(weight, rtol=1e-6) @ bias
    sign = torch.sign(right[torch.arange(width), right.abs().argmax(1)])  # the largest entry is positive
    right, left = right * sign[:, None], left * sign
    return right.float(), -(right @ centre).float(), (left * values).float()


def lesson(folder: Path, size: int, directions: Tensor) -> Lesson:
    nouns = Nouns(folder)
    relatives = Relatives(nouns)
    core = photo_names.core_nouns(nouns, relatives)
    others = photo_names.other_nouns(nouns, relatives, core)
    worth = {name: photo_names.worth_of(nouns, name) for name in others}
    adjectives = nouns.adjectives(ADJECTIVES)
    tokenizer = photo.tokenizer()
    several = [form for form in map(photo_names.plural, core) if len(tokenizer.encode(form)) == 1]
    worth |= {form: 0.3 * worth[name] for name in others if (form := photo_names.plural(name)) not in worth}
    plain = [
        *core,
        *several,
        *adjectives,
        *PARTS,
        *(make("") for make in open_clip.OPENAI_IMAGENET_TEMPLATES),
        "an the this x",
    ]
    inner = photo_names.chosen_rows(plain, worth, tokenizer, size - 2)
    rows = torch.tensor([*inner, *tokenizer([""])[0, :2].tolist()])
    known = set(inner)
    kept = [*core.values(), *(noun for name, noun in others.items() if known.issuperset(tokenizer.encode(f"{name}.")))]
    shares = torch.zeros(len(kept), len(directions))
    for row, noun in enumerate(kept):
        shares[row, list(noun.leaves)] = torch.tensor(list(noun.leaves.values()))
    targets = F.normalize(shares @ directions, dim=1)
    relative = torch.tensor([not noun.core for noun in kept])
    targets[relative] *= RELATIVE
    targets[relative, -1] += (1 - RELATIVE**2) ** 0.5  # the weakest direction stands for all that is not a class
    weights = [0.0 if noun.core else worth[noun.name] ** 2 * (0.2 if " " in noun.name else 1) for noun in kept]
    drawn = torch.tensor(weights)
    drawn = drawn / drawn.sum() + torch.tensor(
        [float(noun.core) / len(core) for noun in kept]
    )  # half of all draws each
    return Lesson(kept, F.normalize(targets, dim=1), drawn / drawn.sum(), rows, adjectives)


def start(model: nn.Module, lesson: Lesson, index: Tensor) -> None:
    """Token embedding and projection from the ridge regression of targets [N, D] on the mean of each name's tokens."""
    count, width = len(lesson.rows), model.token_embedding.weight.shape[1]
    tokenizer = photo.tokenizer()
    gram, right = torch.eye(count), torch.zeros(count, lesson.targets.shape[1])
    for noun, target in zip(lesson.nouns, lesson.targets):
        tokens = index[torch.tensor(tokenizer.encode(noun.name))]
        weight = 3.0 if noun.core else 1.0
        gram[tokens[:, None], tokens[None]] += weight
        right[tokens] += weight * target * len(tokens) ** 0.5
    solved = torch.cholesky_solve(right, torch.linalg.cholesky(gram))
    basis = torch.linalg.svd(lesson.targets[:3000], full_matrices=False)[2][:width]
    table = solved @ basis.T
    noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.token_embedding.weight.copy_(0.05 * (table / table.std() + 0.1 * noise))
        model.text_projection.copy_(basis)
        first = model.transformer.resblocks[0].attn
        first.in_proj_weight[2 * width :].copy_(torch.eye(width))
        first.out_proj.weight.copy_(torch.eye(width))


def encode(model: nn.Module, ids: Tensor, context: Tensor | None) -> Tensor:
    """Ids [B, L] of the known rows, with context [B, M, W] after the start token -> unit vectors [B, D]; short texts apart from long ones."""
    ends, out = ids.argmax(-1), []
    order = ends.argsort(stable=True)
    for rows in order.split(CHUNK):
        length = int(ends[rows].max()) + 1
        x = model.token_embedding(ids[rows, :length])
        if context is not None:
            x = torch.cat([x[:, :1], context[rows], x[:, 1 + context.shape[1] :]], 1)
        x = model.transformer(x + model.positional_embedding[:length], attn_mask=model.attn_mask[:length, :length])
        out.append(model.ln_final(x)[torch.arange(len(rows)), ends[rows]] @ model.text_projection)
    return F.normalize(torch.cat(out)[order.argsort()], dim=-1)


def shipped(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the same text tower with its residual stream SIZE times as large, before its norms take the size out again."""
    writes = ("token_embedding.", "positional_embedding", ".attn.out_proj.", ".mlp.c_proj.")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "logit_scale"}
    return {name: t * SIZE if any(part in name for part in writes) else t for name, t in state.items()}


class Texts:
    """Names as training shows them."""

    def __init__(self, lesson: Lesson, index: Tensor) -> None:
        self.lesson, self.index = lesson, index
        self.tokenizer = photo.tokenizer()

    def ids(self, texts: list[str]) -> Tensor:
        ids = self.index[self.tokenizer(texts)]
        assert ids.min() >= 0, [text for text, row in zip(texts, ids) if row.min() < 0]
        return ids

    def _readable(self, text: str) -> bool:
        return bool((self.index[torch.tensor(self.tokenizer.encode(text))] >= 0).all())

    def noun(self, name: str, draw: random.Random) -> str:
        """The name, at times as a plural, after an adjective or before a part."""
        shown, dice = name, draw.random()
        if dice < 0.1:
            shown = name[:-1] if name.endswith("s") else photo_names.plural(name)
        elif dice < 0.25:
            shown = f"{draw.choice(self.lesson.adjectives)} {name}"
        elif dice < 0.3:
            shown = f"{name} {draw.choice(PARTS)}"
        return shown if self._readable(f"{shown}.") else name

    def bare(self, name: str, draw: random.Random) -> str:
        return draw.choice(("", "", "a ", "the ", "an ")) + self.noun(name, draw) + draw.choice(("", "."))

    def templated(self, name: str, draw: random.Random) -> str:
        shown = self.noun(name, draw)
        if draw.random() < 0.5:
            return PLAIN.format(shown)
        return draw.choice(open_clip.OPENAI_IMAGENET_TEMPLATES)(shown)


def contexts(model: nn.Module, count: int, length: int, plain: Tensor, generator: torch.Generator) -> Tensor:
    """[B, M, W]: half of them the words of the plain template, moved; half drawn like rows, small to large."""
    table = model.token_embedding.weight.detach()
    noise = torch.randn(count, length, table.shape[1], generator=generator)
    size = torch.rand(count, 1, 1, generator=generator)
    far = noise * table.std(0) * (0.2 + 1.3 * size)
    near = table[plain].repeat(-(-length // len(plain)), 1)[:length] + noise * table.std(0) * size
    return torch.where(torch.rand(count, 1, 1, generator=generator) < 0.5, near, far)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wordnet", type=Path, required=True, help="the folder with data.noun")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--batch", type=int, default=128, help="of each of the three kinds of text")
    parser.add_argument("--rows", type=int, default=10000, help="of the vocabulary")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path("photo_text.pt"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the same bytes on any machine of a kind

    weight, bias, directions = projection(photo.weights())
    learnt = lesson(args.wordnet, args.rows, directions)
    index = torch.full((photo.VOCABULARY,), -1)
    index[learnt.rows] = torch.arange(len(learnt.rows))
    index[0] = 0  # padding, behind the end
    print(f"{len(learnt.nouns)} nouns, {sum(n.core for n in learnt.nouns)} of them classes or above", flush=True)
    text = {**photo.TEXT, "vocab_size": len(learnt.rows)}
    model = open_clip.CLIP(**{**photo.CONFIG, "text_cfg": text})
    model.visual = None  # no picture is looked at
    start(model, learnt, index)
    moving = [p for name, p in model.named_parameters() if name != "logit_scale"]
    optimizer = torch.optim.AdamW(moving, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    done = 0
    if args.state.exists():
        saved = torch.load(args.state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    texts = Texts(learnt, index)
    plain = index[torch.tensor(texts.tokenizer.encode("a photo of a"))]
    began, running = time.time(), 0.0
    for step in range(done, args.steps):
        lr = (
            args.lr
            * min(1.0, (step + 1) / args.warmup)
            * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        )
        optimizer.param_groups[0]["lr"] = lr
        draw, generator = random.Random(f"{args.seed} {step}"), torch.Generator().manual_seed(args.seed * 10**6 + step)
        optimizer.zero_grad()
        for kind in ("bare", "templated", "context"):
            rows = torch.multinomial(learnt.weights, args.batch, generator=generator)
            names = [learnt.nouns[row].name for row in rows.tolist()]
            context, make = None, texts.templated if kind == "templated" else texts.bare
            shown = [make(name, draw) for name in names]
            if kind == "context":
                length = draw.choice((1, 2, 4, 4, 4, 4, 4, 8, 16))
                context = contexts(model, len(rows), length, plain, generator)
                shown = [f"{'x ' * length}{texts.noun(name, draw)}." for name in names]
            loss = (encode(model, texts.ids(shown), context) - learnt.targets[rows]).square().sum(-1).mean() / 3
            loss.backward()
            running += loss.item()
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
        if (step + 1) % 25 == 0:
            seconds = (time.time() - began) / (step + 1 - done)
            print(f"step {step + 1} loss {running / 25:.4f} {seconds:.2f} s/step", flush=True)
            running = 0.0
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            temporary = args.state.with_suffix(".tmp")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, temporary)
            temporary.rename(args.state)
            state = shipped(model) | {"visual.head.proj.weight": weight, "visual.head.proj.bias": bias}
            state["logit_scale"] = torch.tensor(photo.LOGIT_SCALE)
            words = sorted({word for noun in learnt.nouns for word in photo.words(noun.name)} | set(learnt.adjectives))
            known_rows.write(state, learnt.rows, args.state.with_suffix(".safetensors"), {"words": photo.packed(words)})
    print("to ship it: copy", args.state.with_suffix(".safetensors"), f"to mergekit_vl/assets/{photo.ASSET}")


if __name__ == "__main__":
    main()
