"""Prompts: learnt context vectors before the class name (CoOp, Zhou et al. 2022, arXiv 2109.01134, section 3.2)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_vl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.backbones.classic import Backbone, Prompts
    from mergekit_vl.model import Classes

METADATA_KEY = "mergekit_vl"


@dataclass(frozen=True, eq=False)
class Prompt:
    """Context vectors `ctx`: [M, W] shared by all classes, or [K, M, W] one per class of `names` (refused for other classes)."""

    ctx: Tensor
    init: str = "a photo of a"
    names: tuple[str, ...] = ()

    space = "ctx"

    @classmethod
    def start(
        cls, backbone: Backbone, *, init: str | None, n_context: int, seed: int, names: tuple[str, ...] = ()
    ) -> Prompt:
        """From words (`init`), or at random with standard deviation 0.02; class-specific where `names` are given."""
        import torch

        if init:
            ctx = backbone.embed(init)
        else:
            generator = torch.Generator().manual_seed(seed)
            ctx = (torch.randn(n_context, backbone.token_width, generator=generator) * 0.02).to(backbone.device)
        if names:
            ctx = ctx.expand(len(names), -1, -1).clone()
        return cls(ctx, init or "", names)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"ctx": self.ctx}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Prompt:
        return replace(self, ctx=tensors["ctx"])

    def text_features(self, backbone: Backbone, classes: Classes) -> Tensor:
        if self.names and self.names != classes.names:
            novel = [name for name in classes.names if name not in self.names]
            raise UserError(
                f"a class-specific prompt knows nothing of {novel[0] if novel else 'this order of classes'!r}",
                mend="tune with class_specific=false",
            )
        self.check(backbone)
        return backbone.encode_prompts(self.tokenize(backbone, classes), self.ctx)

    def tokenize(self, backbone: Backbone, classes: Classes) -> Prompts:
        """`ctx class.`: no template, as the field tests prompts."""
        return backbone.tokenize([f"{name}." for name in classes.names], self.ctx.shape[-2])

    def check(self, backbone: Backbone) -> None:
        """Raise UserError unless the prompt is as wide as the backbone's tokens."""
        if self.ctx.shape[-1] != backbone.token_width:
            raise UserError(
                f"the prompt is {self.ctx.shape[-1]} wide, {backbone.spec} needs {backbone.token_width}",
                mend="use the backbone it was tuned on",
            )

    def anchor(self, backbone: Backbone) -> Prompt:
        """The embeddings of the words that the context started from."""
        if not self.init:
            raise UserError(
                "a prompt that started at random has no zero-shot point in context space",
                mend="tune with init: a photo of a",
            )
        ctx = backbone.embed(self.init)
        if ctx.shape[0] != self.ctx.shape[-2]:
            raise UserError(
                f"{self.init!r} is {ctx.shape[0]} tokens, the prompt has {self.ctx.shape[-2]}",
                mend="give the words it started from",
            )
        return replace(self, ctx=ctx.expand_as(self.ctx).clone())

    def save(self, path: Path, *, backbone: str) -> None:
        from safetensors.torch import save

        # one metadata key with canonical JSON: several keys come out in any order
        meta = json.dumps(
            {"adapter": "prompt", "backbone": backbone, "init": self.init, "names": list(self.names)}, sort_keys=True
        )
        from mergekit_vl.files import write_bytes

        write_bytes(path, save({"ctx": self.ctx.detach().cpu().contiguous()}, metadata={METADATA_KEY: meta}))

    @classmethod
    def load(cls, path: Path, *, device: str = "cpu") -> Prompt:
        """A prompt written by `save`; raises UserError for a file that is missing, cut short, of another kind or not finite."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise UserError("no such checkpoint", where=str(path), mend="give a .safetensors file")
        try:
            with safe_open(path, framework="pt") as file:
                meta = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
                if meta.get("adapter") != "prompt" or "ctx" not in file.keys():  # noqa: SIM118
                    raise UserError(
                        "this is not a prompt written by mergekit-vl",
                        where=str(path),
                        mend="give the merged.safetensors or a tuned anchor of a run",
                    )
                ctx = file.get_tensor("ctx").float().to(device)
        except SafetensorError as error:
            raise UserError(
                f"damaged or truncated safetensors: {error}", where=str(path), mend="copy the file again"
            ) from None
        if not ctx.isfinite().all():
            raise UserError(
                "ctx has values that are not finite", where=str(path), mend="tune again with a lower learning rate"
            )
        return cls(ctx, meta["init"], tuple(meta["names"]))
