"""Pickled checkpoints (.pt, .pth, .bin) as headers: where each tensor's bytes lie, without torch and without running their code.

torch.save writes an uncompressed zip: `data.pkl` describes the objects, `data/<key>` holds each storage. The unpickler here builds
containers and tensors' descriptions; every other class becomes an inert placeholder, so optimizers, schedulers and the like in a
training checkpoint (Dassl writes live ones) are passed over and nothing of theirs runs. A TorchScript archive (OpenAI's CLIP) is
such a zip too, whose objects are modules: their tensors are named by the path of attributes, and no code of it is read. Files
older than torch 1.6 are no zip but five pickles followed by the storages one after another.
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
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""How torch marks its files before 1.6 (torch/serialization.py, MAGIC_NUMBER)."""
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


class _Script:
    """A module of a TorchScript archive: unpickling leaves its attributes in `__dict__`."""


def _tensor(storage: Any, offset: int, shape: Any, strides: Any, *rest: Any) -> Any:
    return _Tensor(storage, offset, tuple(shape), tuple(strides)) if isinstance(storage, _Storage) else _Inert()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, str] = {}
        """Key to dtype code of the storages met."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch._utils" and name.startswith("_rebuild_parameter"):
            return lambda data, *rest: data
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module.startswith("__torch__"):
            return _Script
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) >= 3 and pid[0] == "storage":
            storage = _Storage(pid[1] if isinstance(pid[1], str) else "unknown", str(pid[2]))
            self.storages[storage.key] = storage.code
            return storage
        return _Inert()


def open_pickle(path: Path, label: str) -> Checkpoint:
    """The weights of a pickled checkpoint; raises UserError for what is none."""
    try:
        content, starts = _read_zip(path) if _is_zip(path) else _read_legacy(path)
    except UserError:
        raise
    except Exception as error:  # an unpickler may raise anything for a file that is none
        first = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(f"damaged checkpoint: {first}", where=str(path), mend="copy the file again") from None
    tensors, twins, owners = {}, {}, {}
    taken, passed_over = _state_dict(content, path)
    for name, tensor in taken.items():
        check_supported(tensor.storage.code, where=f"{path}: {name}")
        item = STORED[tensor.storage.code].itemsize
        start = starts.get(tensor.storage.key)
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
    return Checkpoint(label, path, tensors, (path,), twins=twins, passed_over=passed_over)


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _read_zip(path: Path) -> tuple[Any, dict[str, int]]:
    """The objects, and where the bytes of each storage begin."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        members = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
        if "data.pkl" not in members:
            raise UserError(
                "a TorchScript archive" if "constants.pkl" in members else "a zip, but no checkpoint",
                where=str(path),
                mend="save its state_dict, or name it as open_clip:ARCH/TAG",
            )
        content = _Unpickler(io.BytesIO(archive.read(members["data.pkl"]))).load()
        return content, {
            name.removeprefix("data/"): _start(file, info) for name, info in members.items() if name.startswith("data/")
        }


def _read_legacy(path: Path) -> tuple[Any, dict[str, int]]:
    """As `_read_zip`, for torch before 1.6: magic number, protocol, system, objects, storage keys; then each storage: count, bytes."""
    with open(path, "rb") as file:
        if file.peek(1)[:1] != b"\x80" or _Unpickler(file).load() != LEGACY_MAGIC:
            raise UserError(
                "not a checkpoint: neither safetensors nor what torch.save writes",
                where=str(path),
                mend="save it again",
            )
        _Unpickler(file).load()
        _Unpickler(file).load()
        objects = _Unpickler(file)
        content = objects.load()
        keys, starts = _Unpickler(file).load(), {}
        for key in keys:
            (count,) = struct.unpack("<q", file.read(8))
            starts[str(key)] = file.tell()
            file.seek(count * STORED[objects.storages[str(key)]].itemsize, io.SEEK_CUR)
        if file.tell() > path.stat().st_size:
            raise ValueError("it ends in its tensors")
        return content, starts


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


def _state_dict(content: Any, path: Path) -> tuple[dict[str, Any], str]:
    """The mapping of names to tensors, looked for where training scripts put it; `module.` of data-parallel training is taken off.

    With it the name of averaged weights beside them, which timm's loader would take unless it is told not to.
    """
    passed_over = ""
    if isinstance(content, _Script):
        content = _script_tensors(content)
    for key in STATE_DICTS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            averaged = [k for k in content if "ema" in str(k) and k != key and isinstance(content[k], Mapping)]
            passed_over = str(averaged[0]) if averaged else ""
            content = content[key]
            break
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, _Tensor)}
    if not tensors:
        raise UserError(
            "no weights in it",
            where=str(path),
            mend=f"save a module's state_dict(): it needs plain tensors by name, or those under {', '.join(STATE_DICTS)}",
        )
    while all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return {name.replace("_orig_mod.", ""): value for name, value in tensors.items()}, passed_over


def _script_tensors(module: _Script, prefix: str = "") -> dict[str, _Tensor]:
    """The tensors of a TorchScript module, named as its state_dict names them."""
    out = {}
    for name, value in vars(module).items():
        if isinstance(value, _Script):
            out |= _script_tensors(value, f"{prefix}{name}.")
        elif isinstance(value, _Tensor):
            out[prefix + name] = value
    return out


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
