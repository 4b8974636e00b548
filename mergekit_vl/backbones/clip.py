"""Any model with two towers that open_clip builds: by architecture and pretrained tag, `hf-hub:` name, or local file or folder.

The text tower, its context slots, pooling and logits are read off the model (see `backbones/text.py`), so classic CLIP, EVA,
SigLIP and SigLIP 2, CoCa, MobileCLIP, CLIPA and towers of Hugging Face go one way. Weights are read without running anything in
them: safetensors, open_clip's training checkpoints (`state_dict`, `module.`), OpenAI's TorchScript `.pt`, CLIPModels of transformers, folders of these.

QuickGELU: weights trained with it lose about 4 points under GELU and the other way round (open_clip issue 1109). A pretrained tag,
a folder's open_clip_config.json and an OpenAI `.pt` say which it was, and that is what is built; other files do not say.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypeVar

from typing_extensions import TypedDict

from mergekit_vl.backbones.huggingface_names import config_of_clip_model
from mergekit_vl.checkpoints.reader import taking
from mergekit_vl.errors import UserError, first_line, unknown
from mergekit_vl.options import option
from mergekit_vl.system.atomic_files import is_a_path
from mergekit_vl.system.memory import physical_memory
from mergekit_vl.system.regular_files import MOST_TEXT, check_shape, parse_json, read_regular, user_path

if TYPE_CHECKING:
    from open_clip import CLIP
    from torch import Tensor

    from mergekit_vl.backbones.backbone import Backbone, Preprocess
    from mergekit_vl.backbones.text import Tokenizer

T = TypeVar("T")
CONFIG = "open_clip_config.json"
OPENAI_ONLY = ("input_resolution", "context_length", "vocab_size")
"""What OpenAI's files hold besides weights."""


@dataclass(frozen=True)
class Clip:
    """A CLIP, SigLIP, CoCa, MobileCLIP or another two-tower model of open_clip; weights by tag, from the hub or from disk."""

    arch: str = option(help="open_clip architecture (ViT-B-16), hf-hub:org/name, or local-dir:FOLDER")
    pretrained: str | None = option(
        None,
        "open_clip tag, or a local checkpoint or folder of one; none: the folder's or hub's own, else random weights",
    )
    quick_gelu: bool | None = option(
        None, "activation that the weights were trained with; none: as tag, folder or file say"
    )
    tokenizer: str | None = option(
        None, "folder of the tokenizer's files, where the architecture takes one from the hub"
    )
    hf_text: str | None = option(
        None, "folder with config.json of the text tower, where the architecture takes one from the hub"
    )
    batch: int = option(128, "images encoded at once")
    precision: Literal["float32", "bfloat16"] | None = option(
        None, "arithmetic of the image tower; none: bfloat16 on a GPU, float32 elsewhere"
    )
    weights: str | None = option(
        None, "of a checkpoint with several sets of weights, which: plain, ema, or the key of one; none: plain"
    )

    def __post_init__(self) -> None:
        if not self.pretrained or user_path(self.pretrained).exists():
            return
        where = f"backbone clip arch={self.arch} pretrained={self.pretrained}"
        if self.arch.partition(":")[0] in ("local-dir", "hf-hub"):
            raise UserError(
                "no such file, and the model has weights of its own", where=where, hint="set pretrained=null"
            )
        if is_a_path(self.pretrained):
            raise UserError("no such checkpoint", where=where, hint="give a file, a folder or a tag")

    def build(self, device: str) -> Backbone:
        from mergekit_vl.checkpoints import torch_io

        where = f"backbone clip arch={self.arch}" + (f" pretrained={self.pretrained}" if self.pretrained else "")
        source = self._source(where)
        with taking(self.weights):
            state, told_of = torch_io.read_told(source.weights) if source.weights else (None, ())
        if state is not None and not state.keys().isdisjoint(OPENAI_ONLY):
            source = replace(source, quick_gelu=True)
        quick_gelu, notes = self._activation(source)
        config = {**source.config, "quick_gelu": quick_gelu}
        for key, given, name in (
            ("tokenizer", self.tokenizer, "hf_tokenizer_name"),
            ("hf_text", self.hf_text, "hf_model_name"),
        ):
            if given and not config["text_cfg"].get(name):
                raise UserError(
                    f"{key} is of no use: {self.arch} takes none from the hub", where=where, hint="remove it"
                )
        told = dict(config)  # as open_clip knows it, without folders of this machine
        if self.hf_text:
            config["text_cfg"] = {**config["text_cfg"], "hf_model_name": str(user_path(self.hf_text))}
        tokenizer = load_tokenizer(config["text_cfg"], self.tokenizer or self.hf_text or source.folder, where)
        model = construct(config, where)
        notes = (*told_of, *notes)
        if state is not None:
            state, more = converted(model, state, where=str(source.weights))
            notes += more
            torch_io.load_into(model, state, where=str(source.weights), hint=f"give arch={self.arch} its own weights")
        return backbone_of(
            model,
            tokenizer,
            spec=f"clip:{self.arch}" + (f":{self.pretrained}" if self.pretrained else ""),
            pretrained=self.pretrained or (self.arch if source.weights else "random"),
            config=told,
            preprocess=source.preprocess,
            settings=json.dumps([config["vision_cfg"], config["embed_dim"], quick_gelu], sort_keys=True),
            device=device,
            notes=notes,
            block=self.batch,
            precision=self.precision,
        )

    def _source(self, where: str) -> _Source:
        import open_clip

        from mergekit_vl.backbones.huggingface_names import has_quick_gelu

        given = user_path(self.pretrained) if self.pretrained else None
        kind, _, name = self.arch.partition(":")
        if kind == "local-dir" or (kind == self.arch and user_path(self.arch).is_dir()):
            folder = user_path(name if kind == "local-dir" else self.arch)
            source = _from_folder(folder, where)
            return replace(source, weights=given or folder)
        if kind == "hf-hub":
            from open_clip.pretrained import download_pretrained_from_hf as fetch

            ask = "copy the model's folder here and set backbone.arch=local-dir:FOLDER"
            config = _fetched(lambda: fetch(name, filename=CONFIG), f"{CONFIG} of {name}", ask, where)
            weights = given or Path(_fetched(lambda: fetch(name), f"the weights of {name}", ask, where))
            return replace(_from_folder(Path(config).parent, where), weights=weights, folder=None)
        config = open_clip.get_model_config(self.arch)
        if config is None:
            known = open_clip.list_models()
            raise unknown("arch", self.arch, known, where="backbone clip", see="open_clip.list_models()")
        if given is None:
            return _Source(config, _usual_preprocessing(self.arch))
        tag = open_clip.get_pretrained_cfg(self.arch, self.pretrained)
        if not tag:
            if given.exists():
                told = _from_folder(given, where) if (given / CONFIG).is_file() else None
                preprocess = told.preprocess if told else _usual_preprocessing(self.arch)
                return _Source(config, preprocess, given, told.quick_gelu if told else has_quick_gelu(given))
            raise unknown(
                "pretrained tag", self.pretrained, open_clip.list_pretrained_tags_by_model(self.arch), where=where
            )
        what = (tag.get("hf_hub") or tag.get("url")).rstrip("/")
        hint = "download it elsewhere and set backbone.pretrained=FILE"
        file = _fetched(lambda: open_clip.download_pretrained(tag), what, hint, where)
        return _Source(config, tag, Path(file), quick_gelu=bool(tag.get("quick_gelu", config.get("quick_gelu"))))

    def _activation(self, source: _Source) -> tuple[bool, tuple[str, ...]]:
        """Whether to build with QuickGELU, and what to tell the user about it."""
        import open_clip

        named = bool(source.config.get("quick_gelu", False))
        names = {True: "QuickGELU", False: "GELU"}
        what = f"{self.arch} with {self.pretrained}"
        if self.quick_gelu is not None:
            if source.quick_gelu not in (None, self.quick_gelu):
                return self.quick_gelu, (
                    f"{what} was trained with {names[not self.quick_gelu]}, and backbone.quick_gelu asks for the other: expect worse accuracy",
                )
            return self.quick_gelu, ()
        if source.quick_gelu is not None:
            notes = (f"{what} was trained with {names[source.quick_gelu]} and is built with it",)
            return source.quick_gelu, notes if source.quick_gelu != named else ()
        if source.weights and not named and f"{self.arch}-quickgelu" in open_clip.list_models():
            return named, (
                f"{source.weights} does not say which activation it was trained with; built with {names[named]}. Say it with one of\n"
                "    backbone.quick_gelu=true     # OpenAI's weights, DFN, MetaCLIP and what was tuned from them\n"
                "    backbone.quick_gelu=false    # LAION, DataComp, CommonPool and what was tuned from them",
            )
        return named, ()


class ModelConfig(TypedDict):
    embed_dim: int
    vision_cfg: dict[str, Any]
    text_cfg: dict[str, Any]


class Config(TypedDict):
    """What open_clip_config.json must hold; what else is there goes to open_clip as it is."""

    model_cfg: ModelConfig
    preprocess_cfg: NotRequired[dict[str, Any] | None]


@dataclass(frozen=True)
class _Source:
    """Where a model comes from: open_clip's config, preprocessing, weights on disk and what is known of their activation."""

    config: Mapping[str, Any]
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    quick_gelu: bool | None = None
    folder: Path | None = None
    """Where its tokenizer's files are, if it is a folder with its own."""


def _from_folder(folder: Path, where: str) -> _Source:
    file = folder / CONFIG
    if not file.exists() and (told := config_of_clip_model(folder)) is not None:
        return _Source(*told, quick_gelu=bool(told[0]["quick_gelu"]))
    if not file.exists():
        raise UserError(
            f"no {CONFIG}",
            where=str(folder),
            hint="give a folder that open_clip wrote, or name the architecture: clip:ARCH:FOLDER",
        )
    content = parse_json(read_regular(file, most=MOST_TEXT), where=str(file))
    checked = check_shape(content, Config, what="is no config of open_clip", where=str(file))
    config: Mapping[str, Any] = {**checked["model_cfg"]}
    return _Source(
        config, checked.get("preprocess_cfg") or {}, quick_gelu=bool(config.get("quick_gelu")), folder=folder
    )


def _usual_preprocessing(arch: str) -> dict[str, Any]:
    """What all of an architecture's pretrained tags agree on: a local file does not tell how its images were prepared."""
    import open_clip

    tags = [open_clip.get_pretrained_cfg(arch, tag) for tag in open_clip.list_pretrained_tags_by_model(arch)]
    out = {}
    for key in ("mean", "std", "interpolation", "resize_mode"):
        values = {tag.get(key) for tag in tags}
        if len(values) == 1:
            out[key] = values.pop()
    return out


def _fetched(get: Callable[[], T], what: str, hint: str, where: str) -> T:
    """What the hub or a server gives; raises UserError that names the file wanted."""
    try:
        return get()
    except Exception as error:  # hub clients raise many kinds
        first = first_line(error)
        raise UserError(
            f"{what} is not on this machine and cannot be fetched: {first[:200]}", where=where, hint=hint
        ) from None


def construct(config: Mapping[str, Any], where: str) -> CLIP:
    """The model of an open_clip config, with random weights that are the same each time; on the device of the context."""
    import open_clip
    import torch

    _check_size(config, where)
    own = copy.deepcopy(dict(config))
    if "timm_model_name" in own["vision_cfg"]:
        own["vision_cfg"]["timm_model_pretrained"] = False
    hugging_face = own["text_cfg"].get("hf_model_name")
    if hugging_face:
        own["text_cfg"]["hf_model_pretrained"] = False
    custom = own.pop("custom_text", False) or hugging_face
    kind = (open_clip.CoCa if "multimodal_cfg" in own else open_clip.CustomTextCLIP) if custom else open_clip.CLIP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if not hugging_face:
            try:
                return kind(**own)
            except Exception as error:  # a config from elsewhere may fail anywhere in open_clip, timm or torch
                first = first_line(error)
                raise UserError(f"open_clip cannot build it: {first}", where=where, hint="correct its config") from None
        hint = f"copy config.json of {hugging_face} into a folder and set backbone.hf_text=FOLDER"
        return _fetched(lambda: kind(**own), f"config.json of {hugging_face}", _with_transformers(hint), where)


MOST_LAYERS = 1000
"""Of a tower; the deepest of open_clip have 64."""


def _check_size(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config whose towers alone would not fit into this machine's memory, before anything is built. Raises UserError."""
    towers = [config.get(key) or {} for key in ("vision_cfg", "text_cfg", "multimodal_cfg")]
    total = sum(_least_bytes(tower, config.get("embed_dim"), where) for tower in towers)
    if total > physical_memory():
        raise UserError(
            f"its config asks for towers of at least {total >> 30:,} GiB, more than this machine has",
            where=where,
            hint="correct its config",
        )


def _least_bytes(tower: Mapping[str, object], outputs: object, where: str) -> int:
    """A lower bound on the bytes of a tower of float32: a transformer's layer holds 4 width^2 numbers and its hidden layer's, a table
    width numbers for each word, place, patch and output.
    """

    def largest(value: object) -> int:
        return max((v for v in (value if isinstance(value, list) else [value]) if type(v) is int), default=0)

    layers, width = largest(tower.get("layers")), largest(tower.get("width"))
    if layers > MOST_LAYERS:
        raise UserError(
            f"its config asks for {layers:,} layers", where=where, hint=f"at most {MOST_LAYERS:,}: correct its config"
        )
    patch = largest(tower.get("patch_size"))
    patches = (largest(tower.get("image_size")) // patch) ** 2 if patch > 0 else 0
    rows = largest(tower.get("vocab_size")) + largest(tower.get("context_length")) + patches + largest(outputs)
    return 4 * width * ((4 + 2 * largest(tower.get("mlp_ratio"))) * width * layers + rows)


def _with_transformers(hint: str) -> str:
    from importlib.util import find_spec

    return hint if find_spec("transformers") else "install it: pip install 'mergekit-vl[hf]'"


def load_tokenizer(text: Mapping[str, Any], folder: str | Path | None, where: str) -> Tokenizer:
    """open_clip's tokenizer for a text config; from `folder` where it is one of Hugging Face."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    options = dict(context_length=text.get("context_length", 77), **(text.get("tokenizer_kwargs") or {}))
    name = text.get("hf_tokenizer_name")
    tokenizer: Tokenizer
    if not name:
        tokenizer = SimpleTokenizer(**options)
        return tokenizer
    source = str(user_path(str(folder))) if folder else name
    hint = f"copy the tokenizer's files of {name} into a folder and set backbone.tokenizer=FOLDER"
    tokenizer = _fetched(
        lambda: HFTokenizer(source, tokenizer_mode=text.get("tokenizer_mode"), **options),
        f"the tokenizer {source}",
        _with_transformers(hint),
        where,
    )
    return tokenizer


def convert(model: CLIP, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Foreign and older names to open_clip's for this model; shapes stay as they are."""
    import torch
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    from mergekit_vl.backbones.huggingface_names import from_clip_model, is_clip_model

    state = {name: tensor for name, tensor in state.items() if name not in OPENAI_ONLY}
    state = from_clip_model(state) if is_clip_model(state) else convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    state.pop("text.transformer.embeddings.position_ids", None)
    for name in ("logit_scale", "logit_bias"):
        own = getattr(model, name, None)
        if own is None:
            continue
        if name in state and state[name].numel() == own.numel():
            state[name] = state[name].reshape(own.shape)
        elif name == "logit_bias":  # as open_clip does: it is the same for every class
            state.setdefault(name, torch.zeros_like(own))
    return state


def converted(model: CLIP, state: dict[str, Tensor], *, where: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """As `convert`, with one prefix over all names taken off and what stands beside the model left out; and what was done in words."""
    from mergekit_vl.backbones.huggingface_names import prefix_of_clip_model
    from mergekit_vl.checkpoints.torch_io import under_names_of

    told: tuple[str, ...] = ()
    if prefix := prefix_of_clip_model(state):
        told = (f"{where}: its names begin with {prefix!r}, which is taken off",)
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    found, more = under_names_of(model.state_dict(), convert(model, state), where=where)
    return convert(model, found) if more else found, (*told, *more)


def backbone_of(
    model: CLIP,
    tokenizer: Tokenizer,
    *,
    spec: str,
    pretrained: str = "",
    preprocess: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    settings: str = "",
    device: str = "cpu",
    notes: tuple[str, ...] = (),
    warn: Callable[[tuple[str, ...]], tuple[str, ...]] = lambda names: (),
    block: int = 128,
    precision: Literal["float32", "bfloat16"] | None = None,
) -> Backbone:
    """A Backbone of a model of open_clip's classes; `config` is its model_cfg, `preprocess` what departs from CLIP's own."""
    import open_clip

    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.backbones.text import OpenClipText

    if block < 1:
        raise UserError(f"batch={block}", where=spec, hint="at least 1")
    full = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    full |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    full |= {key: preprocess[key] for key in full if preprocess.get(key) is not None}

    size = model.visual.image_size
    if not isinstance(size, int):
        size = tuple(size) if len(set(size)) > 1 else size[0]
    settled: Preprocess = {
        "image_size": size,
        "mean": list(full["mean"]),
        "std": list(full["std"]),
        "interpolation": full["interpolation"],
        "resize_mode": full["resize_mode"],
    }
    if fill := preprocess.get("fill_color"):
        settled["fill_color"] = fill
    return Backbone(
        image=model.visual,
        text=OpenClipText(model, tokenizer, spec),
        preprocess=settled,
        spec=spec,
        pretrained=pretrained,
        width=config.get("embed_dim") if config else None,
        config={"model_cfg": dict(config)} if config else {},
        read=lambda state: (_told(*converted(model, dict(state), where=spec)), None),
        settings=settings,
        device=device,
        logit_scale=model.logit_scale,
        logit_bias=model.logit_bias,
        warn=warn,
        notes=notes,
        block=block,
        precision=precision,
    )


def _told(state: dict[str, Tensor], lines: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors, once what was done to them is told."""
    import warnings

    for line in lines:
        warnings.warn(line, stacklevel=2)
    return state
