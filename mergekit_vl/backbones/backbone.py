"""A frozen backbone: images to features, texts (where it has a text tower) to features, and what its classifier does with both."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Protocol, TypedDict

import torch
from torch import Tensor, nn

from mergekit_vl.checkpoints.torch_io import cast
from mergekit_vl.errors import Failed, UserError
from mergekit_vl.system.memory import out_of_memory, reuse_freed_memory

if TYPE_CHECKING:
    from jaxtyping import Float

    from mergekit_vl.backbones.text import OpenClipText, Prompts

BLOCK = 128
"""Images are encoded in blocks of this many rows, the last one padded with zeros: the batch size changes bits, so it is fixed."""
CPU_PIXELS = 8 * 224 * 224
"""Of the images that go through a convolutional tower at once on a CPU: with more, most of the time goes into clearing fresh pages for
its activations (EfficientNet-Lite0, one thread, milliseconds an image: 39 at 4 images, 48 at 8, 84 at 32, 97 at 64; transformers do not care)."""


@dataclass(frozen=True)
class Classifier:
    """The classifier that a backbone came with: logits = features @ weight.T + bias; weight [K, D], bias [K]."""

    weight: Tensor
    bias: Tensor


class Preprocess(TypedDict):
    """How the backbone's library prepares images."""

    image_size: int | Sequence[int]
    """A number, or (height, width)."""
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: NotRequired[str]
    """By default bicubic."""
    resize_mode: NotRequired[str]
    """As open_clip names it; by default shortest."""
    crop_pct: NotRequired[float]
    """timm's models have it: the share of the resized image that is kept."""
    fill_color: NotRequired[int | Sequence[int]]
    """Of borders; by default black."""


class HasState(Protocol):
    """What has tensors by name: a module."""

    def state_dict(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Backbone:
    """Towers in evaluation mode, without gradients of their own; weights, features and logits are float32."""

    image: nn.Module
    """Images [B, 3, H, W] -> raw features [B, D]; of a tuple, the first."""
    text: OpenClipText | None
    """None for an image classifier: whatever needs class names refuses it."""
    preprocess: Preprocess
    spec: str
    """How messages call it."""
    pretrained: str = ""
    """Which weights were loaded, as results tell it: a tag, a file, a hub's name, `random`; empty where nothing tells."""
    width: int | None = None
    """Of the image features, D, where it is known."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What the library builds the model from: open_clip's `model_cfg`, or timm's `architecture` and names of its `classifier`."""
    read: Callable[[Mapping[str, Tensor]], tuple[Mapping[str, Tensor], Classifier | None]] = lambda state: (state, None)
    """A checkpoint of this architecture, in any names that are known, to `model`'s names and its classifier, where it has one."""
    settings: str = ""
    """What the image features depend on besides weights and preprocessing (the activation, say); part of the key."""
    device: str = "cpu"
    logit_scale: Tensor | None = None
    """Logarithm of the scale of the cosine in the logits."""
    logit_bias: Tensor | None = None
    """Added to the logits: SigLIP's. It is one number for all classes, so probabilities over classes do not depend on it."""
    warn: Callable[[tuple[str, ...]], tuple[str, ...]] = lambda names: ()
    """Words of class names that this model was never trained on."""
    notes: tuple[str, ...] = ()
    """What the user should know about how it was loaded."""
    classifier: Classifier | None = None
    classes: tuple[str, ...] = ()
    """The names of the classifier's rows, where the model's own config tells them."""
    block: int = BLOCK
    precision: Literal["float32", "bfloat16"] | None = None
    """Of the image tower's own arithmetic, weights and features staying float32; none: bfloat16 on a GPU, float32 elsewhere."""
    at_once: int = field(init=False, repr=False)
    """Images in one forward of the image tower: the block, or fewer where device and tower make that faster."""
    key: str = field(init=False, repr=False)
    """Hash of what the image features depend on: image weights, settings, preprocessing."""
    digest: str = field(init=False, repr=False)
    """Hash of everything: the key, the text tower's weights, the scale."""

    def __post_init__(self) -> None:
        if self.precision is None:
            object.__setattr__(self, "precision", "bfloat16" if self.device.startswith("cuda") else "float32")
        if self.device.startswith("cpu"):
            reuse_freed_memory()
        self.image.to(self.device).eval().requires_grad_(False)
        if self.text is not None:
            self.text.to(self.device).eval().requires_grad_(False)
        object.__setattr__(self, "at_once", _at_once(self.image, self.preprocess, self.device, self.block))
        parts = [self.settings, self.preprocess, *([self.at_once] if self.at_once != BLOCK else [])]
        image = _hash(self.image, json.dumps(parts, sort_keys=True), self.spec)
        object.__setattr__(self, "key", image)
        text = _hash(self.text, f"{image} {float(self.scale)!r}", self.spec) if self.text is not None else image
        object.__setattr__(self, "digest", text)

    def autocast(self) -> torch.autocast:
        """The context in which the image tower computes in its precision."""
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.precision == "bfloat16")

    @property
    def model(self) -> nn.Module:
        """The library's own model: open_clip's or timm's."""
        return _library_model(self.image, self.text)

    def image_weights(self) -> dict[str, Tensor]:
        """Copies of the image tower's tensors, by their names in `model`."""
        own = {name: tensor.data_ptr() for name, tensor in self.image.state_dict().items()}
        return {name: t.clone() for name, t in self.model.state_dict().items() if t.data_ptr() in own.values()}

    def with_weights(self, weights: Mapping[str, Tensor]) -> Backbone:
        """The same architecture with other tensors for these of `model`'s names; they are shared, not copied."""
        memo: dict[int, object] = {} if self.text is None else {id(self.text.tokenizer): self.text.tokenizer}
        image, text = copy.deepcopy((self.image, self.text), memo)
        model = _library_model(image, text)
        own = model.state_dict()
        for name, tensor in weights.items():
            if name not in own or own[name].shape != tensor.shape:
                found = tuple(own[name].shape) if name in own else "missing"
                raise UserError(
                    f"weights of another architecture: {name} is {tuple(tensor.shape)} in them, {found} in the model",
                    where=self.spec,
                    hint="use the backbone they were tuned on",
                )
        given = {
            name: cast(t, own[name].dtype, name=name, where=self.spec).to(own[name]) for name, t in weights.items()
        }
        model.load_state_dict(given, strict=False, assign=True)
        return replace(
            self,
            image=image,
            text=text,
            notes=(),
            classifier=None,
            logit_scale=_tensor_of(model, "logit_scale"),
            logit_bias=_tensor_of(model, "logit_bias"),
        )

    @property
    def scale(self) -> Tensor:
        """Of the cosine in the logits; 1 where there is no text tower."""
        return torch.ones(()) if self.logit_scale is None else self.logit_scale.exp().reshape(())

    @property
    def bias(self) -> Tensor:
        return torch.zeros_like(self.scale) if self.logit_bias is None else self.logit_bias.reshape(())

    @torch.no_grad()
    def encode_image(self, images: Float[Tensor, "B 3 H W"], block: int | None = None) -> Float[Tensor, "B D"]:
        """[B, 3, H, W] -> raw features [B, D] in float32, in fixed blocks; another `block` changes the last bits.

        Raises UserError where memory ends, with the largest halving of the block that fits.
        """
        try:
            return self._encode_image(images, min(block or self.at_once, self.at_once))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        fits = self.at_once // 2
        while fits:
            try:
                self._encode_image(images[:1], fits)
                break
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                fits //= 2
        raise Failed(
            f"out of memory with {self.at_once} images at once on {self.device}; "
            + (f"{fits} fitted" if fits else "not even one fits"),
            where=self.spec,
            hint=f"set backbone.batch={fits}" if fits else "choose a smaller model or another --device",
        )

    def _encode_image(self, images: Tensor, size: int) -> Tensor:
        out = []
        for block in images.split(size):
            padded = block.to(self.device)
            if len(block) < size:
                padded = torch.cat([padded, padded.new_zeros(size - len(block), *block.shape[1:])])
            with self.autocast():
                features = self.image(padded)
            features = features[0] if isinstance(features, tuple) else features
            out.append(features.float()[: len(block)])
        return torch.cat(out)

    def require_text(self) -> OpenClipText:
        """The text tower; raises UserError where there is none."""
        if self.text is None:
            raise UserError(
                "an image classifier has no text tower, so it knows no class names: no zero-shot rows, no prompts",
                where=self.spec,
                hint="use a backbone with a text tower (clip, micro), or tune a linear head: protocol few_shot, tuner linear_probe",
            )
        return self.text

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "K D"]:
        """Texts to raw features [K, D]."""
        return self.encode_prompts(self.tokenize(texts), None)

    def tokenize(self, texts: Sequence[str], n_context: int = 0) -> Prompts:
        """Prompts with `n_context` slots before each text, see `OpenClipText`."""
        return self.require_text().tokenize(texts, n_context)

    def embed(self, text: str) -> Float[Tensor, "M W"]:
        """Token embeddings of a text without what stands around it, [M, W]."""
        return self.require_text().embed(text)

    @property
    def token_width(self) -> int:
        return self.require_text().width

    def encode_prompts(
        self, prompts: Prompts, context: Float[Tensor, "*S M W"] | None
    ) -> Float[Tensor, "K D"] | Float[Tensor, "S K D"]:
        """Prompts with context [M, W], [K, M, W] or [S, K, M, W] in their slots -> raw text features [K, D] or [S, K, D]."""
        features: Tensor = self.require_text()(prompts, context)
        return features


def _at_once(tower: nn.Module, preprocess: Preprocess, device: str, block: int) -> int:
    """Images in one forward. Any `block` that is a multiple of the choice gives the same bytes."""
    if not device.startswith("cpu") or not any(map(_overlaps, tower.modules())):
        return block
    size = preprocess["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    most = max(1, CPU_PIXELS // (height * width))
    return min(block, 1 << (most.bit_length() - 1))


def _overlaps(module: nn.Module) -> bool:
    """Whether it is a convolution whose windows overlap: a transformer's patches do not."""
    return isinstance(module, nn.Conv2d) and module.kernel_size > module.stride


def _library_model(image: nn.Module, text: OpenClipText | None) -> nn.Module:
    return text.model if text is not None else image.get_submodule("model")


def _tensor_of(module: nn.Module, name: str) -> Tensor | None:
    found = getattr(module, name, None)
    return found if isinstance(found, Tensor) else None


def _hash(module: HasState, settings: str, spec: str) -> str:
    """Of a module's tensors (a text tower's without the image tower and the captioner beside it); raises UserError for values that are not finite."""
    digest = hashlib.sha256(settings.encode())
    for name, tensor in module.state_dict().items():
        if ".visual." in name or ".text_decoder." in name:
            continue
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{name} has values that are not finite", where=spec, hint="use an undamaged checkpoint")
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
