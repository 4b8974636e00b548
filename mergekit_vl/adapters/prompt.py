"""Prompts: learnt context vectors before the class name (CoOp, Zhou et al. 2022, arXiv 2109.01134, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mergekit_vl.adapters import stored, usage
from mergekit_vl.adapters.graphs import graphed
from mergekit_vl.adapters.text_network import TextNetwork
from mergekit_vl.errors import Unsuitable, UserError
from mergekit_vl.models.adapter import About
from mergekit_vl.models.classifier import ImageEncoder, cosine_head

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.backbones.text import Prompts
    from mergekit_vl.models.adapter import Adapter, Usage
    from mergekit_vl.models.classifier import Classes, Head

DASSL_KEYS = ("ctx", "token_prefix", "token_suffix")
DASSL_INIT = "a photo of a"
FILES = "give a run's merged.safetensors or tuned model, or the prompt_learner/model.pth.tar-N of CoOp or KgCoOp"


@dataclass(frozen=True, eq=False)
class Prompt:
    """Context vectors `ctx`: [M, W] shared by all classes, or [K, M, W] one per class of `names` (refused for other classes)."""

    ctx: Tensor
    init: str = "a photo of a"
    names: tuple[str, ...] = ()
    before: Tensor | None = None
    """What stood before the context when it was tuned, [K, 1, W]: the start token's embedding. Only Dassl's files tell it."""

    space = "ctx"
    about = About("a prompt", "contexts", makes_texts=True, lr=0.002, weight_decay=5e-4)
    chosen: ClassVar[Mapping[str, float]] = {}

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

    def text_features(self, backbone: Backbone, classes: Classes) -> Float[Tensor, "K D"]:
        if self.names and self.names != classes.names:
            novel = [name for name in classes.names if name not in self.names]
            raise Unsuitable(
                f"a class-specific prompt knows nothing of {novel[0] if novel else 'this order of classes'!r}",
                hint="tune with class_specific=false",
            )
        self.check(backbone)
        return backbone.encode_prompts(self.tokenize(backbone, classes), self.ctx)

    def networks(self, backbone: Backbone, classes: Sequence[Classes], *, training: bool) -> list[TextNetwork[Prompt]]:
        return [self._network(backbone, each, training) for each in classes]

    def _network(self, backbone: Backbone, classes: Classes, training: bool) -> TextNetwork[Prompt]:
        """Class names are tokenised once; on a GPU, a training step's text forward is one launch."""
        prompts = self.tokenize(backbone, classes)
        shared = self.ctx.ndim == 2

        encode: Callable[[Tensor], Tensor] = partial(backbone.encode_prompts, prompts)
        if training and backbone.device.startswith("cuda") and backbone.require_text().capturable:
            encode = graphed(encode)

        def of(tensors: Mapping[str, Tensor]) -> Tensor:
            ctx = tensors["ctx"]
            return encode(ctx[:, None] if shared and ctx.ndim == 3 else ctx)  # [S, M, W] -> [S, 1, M, W]

        return TextNetwork(self, backbone, classes, of)

    def tokenize(self, backbone: Backbone, classes: Classes) -> Prompts:
        """`ctx class.`: no template, as the field tests prompts."""
        return backbone.tokenize([f"{name}." for name in classes.names], self.ctx.shape[-2])

    def check(self, backbone: Backbone) -> None:
        """Raise UserError unless the prompt is as wide as the backbone's tokens, and was tuned on it where its file tells."""
        if self.ctx.shape[-1] != backbone.token_width:
            raise UserError(
                f"the prompt is {self.ctx.shape[-1]} wide, {backbone.spec} needs {backbone.token_width}",
                hint="use the backbone it was tuned on",
            )
        if self.before is not None:
            own = backbone.require_text().before()
            if (self.before - own).norm() > 0.01 * self.before.norm():  # Dassl may store float16
                raise UserError(
                    f"the prompt was tuned on another model than {backbone.spec}: their start tokens differ",
                    hint="use the backbone it was tuned on",
                )

    def image_encoder(self, backbone: Backbone) -> ImageEncoder:
        return ImageEncoder(backbone)

    def bind(self, backbone: Backbone, classes: Classes) -> Head:
        return cosine_head(backbone, self.text_features(backbone, classes))

    def untuned(self, backbone: Backbone) -> Prompt:
        """The embeddings of the words that the context started from."""
        if not self.init:
            raise Unsuitable(
                "a prompt that started at random has no zero-shot point in context space",
                hint="tune with init: a photo of a; for a checkpoint, add its words: {checkpoint: FILE, init: a photo of a}",
            )
        ctx = backbone.embed(self.init)
        if ctx.shape[0] != self.ctx.shape[-2]:
            raise Unsuitable(
                f"{self.init!r} is {ctx.shape[0]} tokens, the prompt has {self.ctx.shape[-2]}",
                hint="give the words it started from as init",
            )
        return replace(self, ctx=ctx.expand_as(self.ctx).clone())

    def aligned(self, others: Sequence[Prompt]) -> Sequence[Prompt]:
        names = [other.names for other in others]
        if len(set(names)) > 1 and all(names):
            raise Unsuitable(
                "class-specific prompts of different classes, or of another order, cannot be merged",
                where=f"classes of the first: {', '.join(names[0][:5])}",
                hint="tune them on the same classes, or with class_specific=false",
            )
        return others

    def linear_maps(self, features: Tensor) -> Mapping[str, Tensor]:
        return {}

    def with_chosen(self, chosen: Mapping[str, float]) -> Prompt:
        """Its file has no place for what was chosen."""
        return self

    def started_from(self, base: Adapter, backbone: Backbone, classes: Classes) -> Prompt:
        return self

    def usage(self, backbone: Backbone) -> Usage:
        return usage.of_prompt()

    def whole(self, backbone: Backbone) -> None:
        return None

    def save(self, path: Path, *, backbone: str) -> None:
        facts = {"adapter": "prompt", "backbone": backbone, "init": self.init, "names": list(self.names)}
        stored.write(path, self.tensors, facts)

    @classmethod
    def recognises(cls, names: Collection[str]) -> bool:
        from mergekit_vl.checkpoints.foreign import OWN_PROMPTS

        return not set(DASSL_KEYS).isdisjoint(names) or (bool(names) and OWN_PROMPTS.issuperset(names))

    @classmethod
    def read(cls, path: Path, backbone: Backbone) -> Prompt:
        return cls.load(path, device=backbone.device)

    def with_init(self, init: str) -> Prompt:
        """Started from these words; from none, that is at random, where they are empty."""
        return replace(self, init=init)

    @classmethod
    def load(cls, path: Path, *, device: str = "cpu") -> Prompt:
        """A prompt that `save` wrote, or one of CoOp or KgCoOp as Dassl writes them (`prompt_learner/model.pth.tar-50`).

        Dassl's files do not tell the words that the context started from: they are taken to be "a photo of a" where the context is as
        long as that (`with_init` tells others). Raises UserError for a file that is missing, cut short, of another kind or not finite.
        """
        import torch

        from mergekit_vl.checkpoints.foreign import OWN_PROMPTS
        from mergekit_vl.checkpoints.reader import open_checkpoint
        from mergekit_vl.checkpoints.torch_io import cast, check_finite, tensors

        if not path.exists():
            raise UserError("no such checkpoint", where=str(path), hint=FILES)
        checkpoint = open_checkpoint(str(path))
        if OWN_PROMPTS.issuperset(checkpoint.tensors):
            checkpoint = checkpoint.renamed({name: name.rpartition(".")[2] for name in checkpoint.tensors})
        meta = stored.facts(checkpoint)
        more = [name for name in checkpoint.tensors if name not in DASSL_KEYS]
        if "ctx" not in checkpoint.tensors or meta.get("adapter", "prompt") != "prompt" or more:
            what = f"this is not a prompt: it holds {', '.join([*more, *checkpoint.tensors][:3])}"
            raise UserError(what, where=str(path), hint=FILES)
        given = tensors(checkpoint, [name for name in ("ctx", "token_prefix") if name in checkpoint.tensors])
        checkpoint.close()
        check_finite(given, where=str(path), hint="tune again with a lower learning rate")
        found = {
            name: cast(tensor, torch.float32, name=name, where=str(path)).to(device) for name, tensor in given.items()
        }
        ctx = found["ctx"]
        if not meta and ctx.ndim != 2:
            raise UserError(
                f"one context per class, {list(ctx.shape)}, and the file does not tell which classes",
                where=str(path),
                hint="use a prompt that all classes share (CSC False)",
            )
        names, before = tuple(meta.get("names", ())), found.get("token_prefix")
        if (
            ctx.ndim != (3 if names else 2)
            or (names and len(names) != len(ctx))
            or (before is not None and before.ndim != 3)
        ):
            raise UserError("its context has another shape than a prompt's", where=str(path), hint=FILES)
        init = meta.get("init", DASSL_INIT if len(ctx) == len(DASSL_INIT.split()) else "")
        return cls(ctx, init, names, before)
