"""Text towers: class names and context vectors in, raw text features out.

Every tower of open_clip goes one way: its own `encode_text` runs on token ids, and a hook on its token embedding puts the context
vectors into their slots. Three things differ between towers, and each is read off the model and its tokenizer, not off a name:

| | read from | classic, EVA, worldwide | SigLIP, CLIPA | MobileCLIP | CoCa | Hugging Face |
|---|---|---|---|---|---|---|
| slots begin at | tokenizer | 1 | 0 (CLIPA: 1) | 1 | 1 | as its tokenizer |
| cut at | model | the last end token | never | never | never | the longest text (padding is masked) |
| pooled at | model | end token | last position | end token | appended CLS | its pooler |

Cutting is exact only where nothing behind a text's answer can reach it: a causal mask, no appended CLS, and the answer read at the
end token. A bidirectional tower reads its padding, and CoCa's CLS stands behind it: cut short, both run and are wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from mergekit_vl.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from open_clip import CLIP

ACTIVATIONS = 2 << 30
"""Bytes of activations that a text forward may keep for its backward; more classes than that go in chunks with recomputation.
On a GPU an eighth of its memory, where that is more."""


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts: ids [K, L]; the context's `n_context` slots begin at position `start` of each."""

    ids: Tensor
    start: int
    n_context: int


class Tokenizer(Protocol):
    """open_clip's: texts to ids [K, L], padded; a length other than the tower's own where one is given."""

    def __call__(self, texts: list[str], context_length: int | None = None, /) -> Tensor: ...


class OpenClipText(nn.Module):
    """The text tower of any model that open_clip builds, with open_clip's tokenizer for it (or one that is called like it)."""

    def __init__(self, model: CLIP, tokenizer: Tokenizer, spec: str) -> None:
        super().__init__()
        self.encode = _EncodeText(model)
        self.tokenizer = tokenizer
        self.spec = spec
        tower = getattr(model, "text", model)  # CLIP holds the text tower's parts itself
        hugging_face = hasattr(tower, "pooler")
        self.capturable = not hugging_face
        """Whether a CUDA graph can hold its forward: it reads nothing back from the GPU."""
        self.width: int = self.embedding.weight.shape[1]
        """Of a token embedding, W."""
        self._end: Callable[[Tensor], Tensor] | None = None
        """Ids [K, L] to the last position [K] that a text's answer depends on; None: all of them."""
        self._sliced: tuple[str, ...] = ()
        """Names in `encode` of what is as long as the tower's longest text; looked up at each call, for `.to` replaces buffers."""
        if hugging_face and tower.config.pad_token_id is not None:
            self._end = lambda ids: _last(ids != tower.config.pad_token_id)
        elif _is_causal_and_pooled_at_the_end(tower):
            eos: int = getattr(tower, "eos_id", getattr(tower, "text_eos_id", -1))
            by_eos = getattr(tower, "text_pool_type", getattr(tower, "pool_type", "argmax")) == "eos"
            self._end = lambda ids: (ids.eq(eos).int() if by_eos else ids).argmax(-1)
            prefix = "model." if tower is model else "model.text."
            self._sliced = (f"{prefix}positional_embedding", f"{prefix}attn_mask")
        layers = tower if hugging_face else tower.transformer
        count = sum(p.numel() for p in layers.parameters()) - (self.embedding.weight.numel() if hugging_face else 0)
        self._floats_per_token = 2 * count / self.width  # measured: 1.7 for the frozen text tower of ViT-B-16

    @property
    def model(self) -> CLIP:
        return self.encode.model

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding; no attribute, so that the state dict names it once."""
        tower = getattr(self.model, "text", self.model)
        found: nn.Embedding
        found = tower.transformer.get_input_embeddings() if hasattr(tower, "pooler") else tower.token_embedding
        return found

    def tokenize(self, texts: Sequence[str], n_context: int = 0) -> Prompts:
        """Token ids with `n_context` slots before each text, cut where that is exact.

        Raises UserError for a text that is empty once tokenised, or too long for the tower.
        """
        start, filler = self._slots(n_context)
        words = " ".join(["x"] * n_context)
        rows = [f"{words} {text}".strip() for text in texts]
        ids, blank = self.tokenizer(rows), self.tokenizer([words])[0]
        length, padding = ids.shape[1], self.tokenizer([""])[0, -2]
        for text, row, line in zip(texts, ids, rows):
            if torch.equal(row, blank):
                raise UserError(f"the tokenizer maps {text!r} to nothing", hint="give the class a name in words")
            full = row[-2] != padding
            if full and (self.tokenizer([line], 2 * length) != padding).sum() > (row != padding).sum():
                raise UserError(
                    f"{text!r} is longer than the {length} tokens of {self.spec}",
                    hint="shorten the class name or the context",
                )
            if not torch.equal(row[start : start + n_context], filler):
                raise UserError(f"{text!r} leaves no place for a context", where=self.spec, hint="rename the class")
        if self._end is not None:
            ids = ids[:, : int(self._end(ids).max()) + 1]
        return Prompts(ids.to(self.embedding.weight.device), start, n_context)

    def _slots(self, n_context: int) -> tuple[int, Tensor]:
        """Where the context's slots begin, and the ids that fill them: the positions at which other filler words change the ids."""
        if n_context == 0:
            return 0, torch.zeros(0, dtype=torch.long)
        one, other = self.tokenizer([" ".join([word] * n_context + ["cat"]) for word in "xy"])
        differ = (one != other).nonzero().flatten()
        start = int(differ[0]) if len(differ) else 0
        if differ.tolist() != list(range(start, start + n_context)):
            raise UserError(
                f"the tokenizer has no place for a context of {n_context} words", where=self.spec, hint="use fewer"
            )
        return start, one[start : start + n_context]

    @torch.no_grad()
    def embed(self, text: str) -> Float[Tensor, "M W"]:
        """Token embeddings of a text without what the tokenizer puts around it, [M, W]."""
        start, _ = self._slots(1)
        ids, blank = self.tokenizer([text, ""])
        count = int(_last(ids != blank[-2])) - int(_last(blank != blank[-2]))
        return self.embedding.weight[ids[start : start + count].to(self.embedding.weight.device)].clone()

    @torch.no_grad()
    def before(self) -> Float[Tensor, "P W"]:
        """Embeddings of what the tokenizer puts before a text (CLIP: the start token), [P, W]; P may be 0."""
        start, _ = self._slots(1)
        return self.embedding.weight[self.tokenizer(["x"])[0, :start].to(self.embedding.weight.device)].clone()

    def forward(self, prompts: Prompts, context: Tensor | None = None) -> Tensor:
        """Prompts with context [M, W] (shared) or [K, M, W] (per class) in their slots -> raw text features [K, D].

        A leading sweep dimension, [S, K, M, W], gives [S, K, D]. More rows than fit into ACTIVATIONS go in chunks whose activations
        are computed again in the backward. Weights put in by `functional_call` are not there any more when that happens: whoever
        tunes the tower itself recomputes around the whole call instead.
        """
        ids = prompts.ids
        sweep: tuple[int, ...] = ()
        if context is not None:
            sweep = context.shape[:-3]
            context = context.expand(*sweep, len(ids), *context.shape[-2:]).flatten(0, -3)  # [S*K, M, W]
            ids = ids.repeat(len(context) // len(ids), 1)
        features = self._in_chunks(ids, context, prompts.start)
        return features.unflatten(0, (*sweep, -1)) if sweep else features

    def rows_at_once(self, length: int) -> int:
        """How many texts of `length` tokens keep their activations within ACTIVATIONS."""
        place, room = self.embedding.weight.device, ACTIVATIONS
        if place.type == "cuda":
            room = max(room, torch.cuda.get_device_properties(place).total_memory // 8)
        return max(1, int(room / (4 * length * self._floats_per_token)))

    def _in_chunks(self, ids: Tensor, context: Tensor | None, start: int) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        rows = self.rows_at_once(ids.shape[1])
        if len(ids) <= rows:
            return self._encode(ids, context, start)
        parts = []
        for i in range(0, len(ids), rows):
            chunk = (ids[i : i + rows], None if context is None else context[i : i + rows], start)
            if torch.is_grad_enabled():  # nothing is drawn in evaluation mode: no state of random numbers to keep
                parts.append(checkpoint(self._encode, *chunk, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._encode(*chunk))
        return torch.cat(parts)

    def _encode(
        self, ids: Int[Tensor, "R L"], context: Float[Tensor, "R M W"] | None, start: int
    ) -> Float[Tensor, "R D"]:
        """One forward, the hook within it: `checkpoint` wraps this call, so that the recomputation puts the context in again."""

        length = ids.shape[1]
        whole = {name: attrgetter(name)(self.encode) for name in self._sliced}
        short = {name: t[:length, :length] if name.endswith("mask") else t[:length] for name, t in whole.items()}
        with nullcontext() if context is None else self._placed(context, start):
            features: Tensor = torch.func.functional_call(self.encode, short, (ids,))
        return features

    @contextmanager
    def _placed(self, context: Tensor, start: int) -> Iterator[None]:
        """While this holds, the token embedding gives the context [B, M, W] in the place of the slots' words."""

        def place(module: nn.Module, args: object, words: Tensor) -> Tensor:
            return torch.cat([words[:, :start], context, words[:, start + context.shape[1] :]], 1)

        hook = self.embedding.register_forward_hook(place)
        try:
            yield
        finally:
            hook.remove()


class _EncodeText(nn.Module):
    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model: CLIP = model

    def forward(self, ids: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(ids, normalize=False)
        return features


def _is_causal_and_pooled_at_the_end(tower: nn.Module) -> bool:
    pooled = getattr(tower, "text_pool_type", getattr(tower, "pool_type", "argmax"))
    causal = getattr(tower, "attn_mask", None) is not None
    return causal and getattr(tower, "cls_emb", None) is None and pooled in ("argmax", "eos")


def _last(mask: Tensor) -> Tensor:
    """The last position where the mask [..., L] is set; -1 where it is nowhere."""
    positions = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
    return (mask * positions).amax(-1) - 1
