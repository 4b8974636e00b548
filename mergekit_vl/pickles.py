"""Pickled checkpoints (.pt, .pth, .bin) as headers: where each tensor's bytes lie, without torch and without running their code.

torch.save writes an uncompressed zip: `data.pkl` describes the objects, `data/<key>` holds each storage. The unpickler here builds
containers and tensors' descriptions; every other class becomes an inert placeholder, so optimizers, schedulers and the like in a
training checkpoint are passed over and nothing of theirs runs. Files older than torch 1.6 are no zip: torch reads them, weights
only, into memory.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_vl.checkpoints import Checkpoint, Stored
from mergekit_vl.dtypes import STORED, check_supported
from mergekit_vl.errors import UserError

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
TORCH_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
}
TORCH_DTYPES |= {"int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}
STATE_DICTS = ("state_dict", "model_state_dict", "model", "module", "state_dict_ema")
"""Where training checkpoints keep the weights: open_clip and timm write `state_dict`."""


@dataclass(frozen=True)
class _Storage:
    code: str
    key: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Inert:
    """Stands for an object of a class that is not ours to build."""

    def __init__(self, *args: Any, **options: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def append(self, value: Any) -> None: ...
    def extend(self, values: Any) -> None: ...
    def __call__(self, *args: Any, **options: Any) -> _Inert:
        return self


def _tensor(storage: Any, offset: int, shape: Any, strides: Any, *rest: Any) -> Any:
    return _Tensor(storage, offset, tuple(shape), tuple(strides)) if isinstance(storage, _Storage) else _Inert()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch._utils" and name.startswith("_rebuild_parameter"):
            return lambda data, *rest: data
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) >= 3 and pid[0] == "storage":
            return _Storage(pid[1] if isinstance(pid[1], str) else "unknown", str(pid[2]))
        return _Inert()


def open_pickle(path: Path, label: str) -> Checkpoint:
    """The weights of a pickled checkpoint; raises UserError for what is none."""
    if not zipfile.is_zipfile(path):
        return _open_legacy(path, label)
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            members = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
            if "constants.pkl" in members or "data.pkl" not in members:
                raise UserError(
                    "a TorchScript archive" if "constants.pkl" in members else "a zip, but no checkpoint",
                    where=str(path),
                    mend="save its state_dict, or name it as open_clip:ARCH/TAG",
                )
            content = _Unpickler(io.BytesIO(archive.read(members["data.pkl"]))).load()
            starts = {name: _start(file, info) for name, info in members.items() if name.startswith("data/")}
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        EOFError,
        ValueError,
        IndexError,
        TypeError,
        AttributeError,
    ) as error:
        raise UserError(f"damaged checkpoint: {error}", where=str(path), mend="copy the file again") from None
    tensors, twins, owners = {}, {}, {}
    for name, tensor in _state_dict(content, path).items():
        check_supported(tensor.storage.code, where=f"{path}: {name}")
        item = STORED[tensor.storage.code].itemsize
        start = starts.get(f"data/{tensor.storage.key}")
        if start is None:
            raise UserError(
                f"damaged checkpoint: the bytes of {name} are missing", where=str(path), mend="copy it again"
            )
        strides = () if _contiguous(tensor.shape, tensor.strides) else tensor.strides
        stored = Stored(tensor.storage.code, tensor.shape, path, start + tensor.offset * item, strides)
        if stored in owners:
            twins[name] = owners[stored]
        owners.setdefault(stored, name)
        tensors[name] = stored
    return Checkpoint(label, path, tensors, (path,), twins=twins)


def _start(file: Any, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: its own header, just before them, tells the length of its name and extra field."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("its tensors are compressed")
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + name + extra


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for n, stride in zip(reversed(shape), reversed(strides)):
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True


def _state_dict(content: Any, path: Path) -> dict[str, Any]:
    """The mapping of names to tensors, looked for where training scripts put it; `module.` of data-parallel training is taken off."""
    for key in STATE_DICTS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {
            str(name): value
            for name, value in content.items()
            if isinstance(value, _Tensor) or hasattr(value, "untyped_storage")
        }
    if not tensors:
        raise UserError(
            "no weights in it", where=str(path), mend=f"it needs tensors, or one of {', '.join(STATE_DICTS)}"
        )
    while all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return {name.replace("_orig_mod.", ""): value for name, value in tensors.items()}


def _open_legacy(path: Path, label: str) -> Checkpoint:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler may raise anything for a file that is none
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"not a checkpoint that can be read safely: {first}", where=str(path), mend="save its state_dict"
        ) from None
    return from_torch(_state_dict(content, path), path, label)


def from_torch(state: Mapping[str, Any], path: Path | str, label: str) -> Checkpoint:
    """A checkpoint in memory, of torch tensors."""
    import torch

    tensors, arrays, twins, owners = {}, {}, {}, {}
    for name, tensor in state.items():
        code = TORCH_DTYPES.get(str(tensor.dtype).removeprefix("torch."), str(tensor.dtype))
        check_supported(code, where=f"{path}: {name}")
        tensor = tensor.detach().cpu().contiguous()
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and place in owners:
            twins[name] = owners[place]
        owners.setdefault(place, name)
        flat = tensor.view(torch.uint16).numpy() if code == "BF16" else tensor.numpy()
        tensors[name], arrays[name] = Stored(code, tuple(tensor.shape), Path(str(path)), 0), flat
    files = (path,) if isinstance(path, Path) else ()
    return Checkpoint(label, path, tensors, files, twins=twins, arrays=arrays)
