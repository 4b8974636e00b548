"""The forms of checkpoints: those that are read, and those that are recognised by their first bytes or names and told with the next step."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

SNIFFED = 512
"""Bytes at a file's start that are looked at."""


@dataclass(frozen=True)
class Foreign:
    """A format by what it is called, how it is recognised, and what to do with it."""

    what: str
    sign: str
    """How it is recognised, in words."""
    step: str
    is_one: Callable[[bytes, str], bool]
    """Of a file's first bytes and its name in lower case."""


def _starts(*starts: bytes) -> Callable[[bytes, str], bool]:
    return lambda start, name: start.startswith(starts)


def _ends(*endings: str) -> Callable[[bytes, str], bool]:
    return lambda start, name: name.endswith(endings)


def _is_onnx(start: bytes, name: str) -> bool:
    return name.endswith((".onnx", ".ort")) or (
        start[:1] == b"\x08" and b"\x12" in start[1:4] and b"onnx" in start[:64]
    )


PLAIN = "save the model's state_dict() as safetensors where it came from, and give that"
FORMATS = (
    Foreign("a Git LFS pointer, and not the file", "the line `version https://git-lfs`", "run `git lfs pull` in its repository, or download the file itself", _starts(b"version https://git-lfs")),
    Foreign("a web page, and not the file", "`<!DOCTYPE html` or `<html`", "download the file itself: the link led to a page", lambda start, name: start.lstrip().lower().startswith((b"<!doctype html", b"<html"))),
    Foreign("an ONNX graph", "the ending .onnx, or its first field", PLAIN, _is_onnx),
    Foreign("a Keras or HDF5 file", "the bytes `\\x89HDF`", f"weights of TensorFlow: convert them to PyTorch, and {PLAIN}", _starts(b"\x89HDF\r\n\x1a\n")),
    Foreign("a GGUF file of llama.cpp", "the bytes `GGUF`", "its weights are quantised: give the model that it was made from", _starts(b"GGUF", b"GGML", b"ggjt", b"tjgg")),
    Foreign("a TensorFlow Lite file", "the bytes `TFL3` at 4", f"convert it to PyTorch, and {PLAIN}", lambda start, name: start[4:8] == b"TFL3"),
    Foreign("a TensorFlow model", "the ending .pb, or a TensorFlow checkpoint's .index, .data-00000-of-00001 or .meta", f"convert it to PyTorch, and {PLAIN}", lambda start, name: bool(re.search(r"\.(pb|meta|ckpt\.index|data-\d{5}-of-\d{5})$", name))),
    Foreign("Flax weights", "the ending .msgpack", "load them with transformers (from_flax=True) and save_pretrained()", _ends(".msgpack")),
    Foreign("a Core ML model", "the ending .mlmodel or .mlpackage", PLAIN, _ends(".mlmodel", ".mlpackage")),
    Foreign("a TensorRT engine", "the ending .engine, .plan or .trt", "give the model that it was built from", _ends(".engine", ".plan", ".trt")),
    Foreign("numpy arrays", "the bytes `\\x93NUMPY`, or the ending .npz", "save them by name: safetensors.numpy.save_file(dict(numpy.load(FILE)), 'model.safetensors')", lambda start, name: start.startswith(b"\x93NUMPY") or name.endswith(".npz")),
    Foreign("a shard of torch.distributed.checkpoint", "the ending .distcp", "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt", _ends(".distcp")),
    Foreign("a state of DeepSpeed's optimizer", "the ending _optim_states.pt", "python zero_to_fp32.py . model.pt, in the folder of the checkpoint", _ends("_optim_states.pt")),
    Foreign("a compressed archive", "the magic bytes of gzip, bzip2, xz, Zstandard, 7-Zip or RAR", "unpack it, and give the file in it", _starts(b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")),
    Foreign("a tar archive", "`ustar` at byte 257", "unpack it, and give the file in it", lambda start, name: start[257:262] == b"ustar"),
    Foreign("a picture", "the magic bytes of JPEG, PNG or GIF", "give a model", _starts(b"\xff\xd8\xff", b"\x89PNG", b"GIF8")),
    Foreign("a text file, and no weights", "the ending .json, .txt, .md, .csv, .py, .yaml or .yml", "give the file of weights beside it, or their folder", lambda start, name: name.endswith((".json", ".txt", ".md", ".csv", ".py", ".yaml", ".yml")) and not name.endswith(".index.json")),
)  # fmt: skip


READ = (
    ("safetensors, one file", "its header, whatever its name", ""),
    ("shards with an index", "`*.index.json` with a weight_map", "a shard that is missing, changed or not in the index"),
    ("shards without their index", "names that end in -00001-of-00003", "how many; a single shard is no model"),
    ("torch.save of a state_dict, zip or older", "`PK`, or a pickle's first byte", ""),
    ("a training checkpoint", "mappings under state_dict, model, net, teacher, params or any other key", "under which key; of several models, which there are (`--weights KEY`)"),
    ("averaged weights beside plain ones", "keys with ema, swa, averaged, shadow", "which are taken (`--weights ema`)"),
    ("a whole module, torch.save(model)", "an object with _parameters, _buffers and _modules", "its class; none of its code is run"),
    ("a TorchScript archive (OpenAI's CLIP)", "a zip whose objects are modules", ""),
    ("names behind one prefix", "names and shapes of the other models or of the backbone: `model.`, `clip.`, `module.`", "the prefix, and what stands beside it and is left out"),
    ("AveragedModel", "n_averaged beside module.", "that both are taken off"),
    ("a folder of open_clip, timm or transformers (CLIPModel)", "open_clip_config.json, config.json", "where the models' configs differ, and whose the result gets"),
    ("classifiers whose configs name classes", "id2label, label_names", "that rows are merged by name; of `predict`, names that differ from `--classes`"),
    ("masks, position_ids, [1] against []", "their names and shapes", "from which model they are taken"),
    ("another image size or context length", "shapes of position embeddings", "which; `--resize-pos-embed` interpolates"),
    ("a CLIPModel of transformers beside open_clip's names", "text_model.final_layer_norm against ln_final", "that its names are mapped"),
    ("prompts of CoOp and KgCoOp", "ctx, token_prefix, token_suffix, perhaps behind prompt_learner.", "other backbones and classes"),
    ("a name of the hub", "hf-hub:ORG/NAME[@REVISION]", "a name without hf-hub:"),
)  # fmt: skip
"""What is read, how it is recognised, what is told."""


def recognised(start: bytes, name: str) -> Foreign | None:
    """The foreign format of a file by its first bytes and its name; None where it is none of them."""
    return next((each for each in FORMATS if each.is_one(start, name.lower())), None)


def among(names: list[str]) -> Foreign | None:
    """The first foreign format among the names of a folder's files that is one of weights."""
    weights = [each for each in FORMATS if not each.what.startswith(("a text", "a picture"))]
    return next((each for name in names for each in weights if each.is_one(b"", name.lower())), None)


@dataclass(frozen=True)
class Method:
    """Tensors of a method that is not here, by their names."""

    what: str
    words: tuple[str, ...]
    """One of them stands in each of the names: quicker to look for than the pattern."""
    sign: str
    """A pattern of a name."""
    alone: bool = False
    """Whether every name must fit."""


METHODS = (
    Method("MaPLe's prompts of both towers", ("prompt",), r"compound_prompt|prompt_learner\.proj\."),
    Method("PromptSRC's or IVLP's prompts of both towers", ("VPT",), r"(?:^|[._])VPT(?:_shallow)?(?:$|[._])"),
    Method("CoCoOp's prompts and meta-network", ("meta_net.",), r"(?:^|\.)meta_net\."),
    Method("TaskRes's text residuals", ("text_feature_residuals",), r"text_feature_residuals"),
    Method("Tip-Adapter's cache", ("cache_", "adapter.weight"), r"(?:^|\.)(?:cache_keys|cache_values)$|^adapter\.weight$", alone=True),
    Method("CLIP-Adapter's bottleneck", ("fc.0.weight", "fc.2.weight"), r"^(?:adapter\.)?fc\.[02]\.weight$", alone=True),
    Method("prompts of another method", ("prompt",), r"(?:^|[._])(?:prompts?|prompt_learner|prompt_embeddings?)(?:$|[._\d])"),
)  # fmt: skip
OWN_PROMPTS = frozenset(
    f"{prefix}{name}" for prefix in ("", "prompt_learner.") for name in ("ctx", "token_prefix", "token_suffix")
)
"""CoOp's and KgCoOp's, which are read."""


def method_of(names: Collection[str]) -> Method | None:
    """The method of whose files these names are, where it is none that is read here."""
    if OWN_PROMPTS.issuperset(names):
        return None
    text = "\n".join(names)
    likely = (m for m in METHODS if any(word in text for word in m.words))
    return next((m for m in likely if (all if m.alone else any)(re.search(m.sign, name) for name in names)), None)


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:@[\w.-]+)?")


def hub_hint(given: str) -> str:
    """What to write where a path that does not exist may be a name of the hub; empty where it cannot be one."""
    return (
        f"a model of the hub is hf-hub:{given}" if HUB_ID.fullmatch(given) and not Path(given).parent.exists() else ""
    )
