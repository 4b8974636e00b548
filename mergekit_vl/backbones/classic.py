"""Frozen CLIP backbones over open_clip: image features, and text features with context vectors in place of words."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_vl.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BLOCK = 128
"""Images are encoded in blocks of this many rows, the last one padded with zeros: the batch size changes bits, so it is fixed."""


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts, cut at the longest: ids [K, L] whose positions 1..M are the context's slots, and where each ends [K]."""

    ids: Tensor
    ends: Tensor
    n_context: int


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen CLIP of open_clip's classic kind: causal text tower, pooled at the end token."""

    model: nn.Module
    tokenizer: Any
    preprocess: dict[str, Any]
    """image_size, mean, std."""
    spec: str
    device: str = "cpu"
    warn: Callable[[tuple[str, ...]], tuple[str, ...]] = field(default=lambda names: ())
    """Words of class names that this model was never trained on."""

    def __post_init__(self) -> None:
        model = self.model
        if (
            not hasattr(model, "token_embedding")
            or getattr(model, "attn_mask", None) is None
            or getattr(model, "text_pool_type", "argmax") != "argmax"
        ):
            raise UserError(
                f"{self.spec}: only CLIP's classic text tower (causal, pooled at the end token) is supported so far",
                mend="choose another arch",
            )
        model.to(self.device).eval().requires_grad_(False)
        digest = hashlib.sha256(self.spec.encode())
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise UserError(
                    f"{name} has values that are not finite", where=self.spec, mend="use an undamaged checkpoint"
                )
            if name != "token_embedding.weight" or tensor.numel() < 1 << 24:
                digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        object.__setattr__(self, "_key", digest.hexdigest()[:16])

    @property
    def key(self) -> str:
        """Hash of the spec and the weights."""
        return self._key  # type: ignore[attr-defined]

    @property
    def scale(self) -> Tensor:
        return self.model.logit_scale.exp()

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> raw features [B, D] in float32, in fixed blocks."""
        out = []
        for block in images.split(BLOCK):
            padded = torch.zeros(BLOCK, *block.shape[1:])
            padded[: len(block)] = block
            out.append(self.model.encode_image(padded.to(self.device)).float()[: len(block)])
        return torch.cat(out)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to raw features [K, D]."""
        prompts = self.tokenize(texts)
        return self.encode_prompts(prompts, None)

    def tokenize(self, texts: Sequence[str], n_context: int = 0) -> Prompts:
        """Token ids with `n_context` slots after the start token, cut at the longest text.

        Raises UserError for a text that is empty once tokenised, or too long for the tower.
        """
        filler = " ".join(["x"] * n_context)
        ids = self.tokenizer([f"{filler} {text}".strip() for text in texts])
        ends = ids.argmax(-1)
        for text, end in zip(texts, ends):
            if int(end) <= 1 + n_context:
                raise UserError(f"the tokenizer maps {text!r} to nothing", mend="give the class a name in words")
            if int(end) == ids.shape[1] - 1 and len(self.tokenizer.encode(f"{filler} {text}")) > ids.shape[1] - 2:
                raise UserError(
                    f"{text!r} is longer than the {ids.shape[1]} tokens of {self.spec}",
                    mend="shorten the class name or the context",
                )
        length = int(ends.max()) + 1
        return Prompts(ids[:, :length].to(self.device), ends.to(self.device), n_context)

    def embed(self, text: str) -> Tensor:
        """Token embeddings of a text without start and end, [M, W]."""
        ids = torch.tensor(self.tokenizer.encode(text), device=self.device)
        return self.model.token_embedding(ids).detach().clone()

    @property
    def token_width(self) -> int:
        return self.model.token_embedding.weight.shape[1]

    def encode_prompts(self, prompts: Prompts, context: Tensor | None) -> Tensor:
        """Prompts with context [M, W] (shared) or [K, M, W] (per class) in their slots -> raw text features [K, D].

        A leading sweep dimension, [S, K, M, W], gives [S, K, D] in one forward.

        Cutting at the longest prompt is exact here: the tower is causal and reads its answer at the end token, so what
        follows cannot change it; positions and mask are sliced.
        """
        model = self.model
        length = prompts.ids.shape[1]
        x = model.token_embedding(prompts.ids)  # [K, L, W]
        ends, sweep = prompts.ends, ()
        if context is not None:
            sweep = context.shape[:-3]
            x = x.expand(*sweep, *x.shape)
            context = context.expand(*x.shape[:-2], *context.shape[-2:])
            x = torch.cat([x[..., :1, :], context, x[..., 1 + prompts.n_context :, :]], -2).flatten(
                0, -3
            )  # [S*K, L, W]
            ends = ends.repeat(len(x) // len(ends))
        x = x + model.positional_embedding[:length]
        x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
        x = model.ln_final(x)[torch.arange(len(x), device=x.device), ends]
        projection = model.text_projection
        x = projection(x) if isinstance(projection, nn.Module) else x @ projection
        return x.unflatten(0, (*sweep, -1)) if sweep else x
