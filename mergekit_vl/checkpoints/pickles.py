"""Pickled checkpoints (.pt, .pth, .bin): where each tensor's bytes lie, found without torch and without executing the file's code.

torch.save writes an uncompressed zip: `data.pkl` describes the objects, `data/<key>` holds each storage. `unpickler.py` builds
containers and tensors' descriptions; every other object becomes an inert placeholder, so optimizers, schedulers and the like in a
training checkpoint (Dassl pickles live ones) are skipped and none of their code runs. A whole module (`torch.save(model)`) is read for its tensors alone. A TorchScript archive (OpenAI's CLIP) is
such a zip too, whose objects are modules: their tensors are named by the path of attributes, and no code of it is read. Files
older than torch 1.6 are no zip but five pickles followed by the storages one after another.

Files may come from strangers, so bounds are checked: a tensor lies within its storage, and the storage within its member of the zip.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from mergekit_vl.checkpoints.archives import Archive, Member, read_archive
from mergekit_vl.checkpoints.checkpoint import (
    MOST_DIMENSIONS,
    Checkpoint,
    Recorded,
    TensorLocation,
)
from mergekit_vl.checkpoints.dtypes import STORED, Array, check_supported
from mergekit_vl.checkpoints.state_dicts import Taken, taken
from mergekit_vl.checkpoints.unpickler import MOST_BYTES, Damaged, Foreign, Pairs, Storage, Tensor, load
from mergekit_vl.errors import UserError

if TYPE_CHECKING:
    import torch

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
TORCH_DTYPES |= {"uint16": "U16", "uint32": "U32", "uint64": "U64"}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""How torch marks its files before 1.6 (torch/serialization.py, MAGIC_NUMBER)."""
EXPANDED, SPARE = 8, 32 << 20
"""All tensors take at most EXPANDED times the bytes of their file, and SPARE bytes: tied and expanded ones are written out."""
Place = Callable[[Storage], Member]
"""Where a storage's bytes lie."""


def open_pickle(path: Path, label: str, weights: str = "plain") -> Checkpoint:
    """The weights of a pickled checkpoint, of several in it those that `weights` asks for; raises UserError for a file that is not one."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if os.pread(descriptor, 2, 0) == b"PK":
            content, place, crcs = _read_zip(descriptor, path)
        else:
            (content, place), crcs = _read_legacy(descriptor, size, path), False
        found: Taken = taken(content, path, weights)
        tensors: dict[str, TensorLocation] = {}
        twins: dict[str, str] = {}
        owners: dict[TensorLocation, str] = {}
        members: dict[int, Member] = {}
        for name, tensor in found.tensors.items():
            stored, member = _placed(name, tensor, place, path)
            if stored.size and stored in owners:
                twins[name] = owners[stored]
            owners.setdefault(stored, name)
            tensors[name], members[member.start] = stored, member
        total = sum(tensor.bytes for tensor in tensors.values())
        if total > EXPANDED * size + SPARE:
            raise Damaged(f"its tensors expand to {total / 1e6:,.0f} MB, more than {EXPANDED} times the file")
    except Damaged as error:
        raise UserError(f"damaged checkpoint: {error}", where=str(path), hint="copy the file again") from None
    finally:
        os.close(descriptor)
    recorded = tuple(Recorded(path, m.start, m.size, m.crc) for m in members.values()) if crcs else ()
    return Checkpoint(
        label,
        path,
        tensors,
        (path,),
        twins=twins,
        passed_over=found.passed_over,
        recorded=recorded,
        notes=found.notes,
    )


def _read_zip(descriptor: int, path: Path) -> tuple[object, Place, bool]:
    """The objects, where their storages are, and whether their CRCs were recorded."""
    archive = read_archive(descriptor)
    if b"data.pkl" not in archive.members:
        raise UserError(
            "a TorchScript archive" if b"constants.pkl" in archive.members else "a zip, but no checkpoint",
            where=str(path),
            hint="save its state_dict, or name it as open_clip:ARCH/TAG",
        )
    if b"byteorder" in archive.members and _content(descriptor, archive, b"byteorder") != b"little":
        raise _big_endian(path)
    content, _ = load(_content(descriptor, archive, b"data.pkl"))

    def place(storage: Storage) -> Member:
        key = storage.key if isinstance(storage.key, str) else ""
        member = archive.members.get(b"data/" + key.encode())
        if member is None:
            raise Damaged("its bytes are missing")
        if not member.stored:
            raise Damaged("its bytes are compressed")
        return member

    return content, place, archive.crcs


def _big_endian(path: Path) -> UserError:
    return UserError("its numbers are big-endian", where=str(path), hint="save it on a little-endian machine")


def _content(descriptor: int, archive: Archive, name: bytes) -> bytes:
    """A whole member that is no tensor."""
    member, shown = archive.members[name], name.decode()
    if not member.stored:
        raise Damaged(f"its {shown} is compressed")
    if member.size > MOST_BYTES:
        raise Damaged(f"its {shown} has {member.size / 1e6:,.0f} MB, and {MOST_BYTES >> 20} MB are the most")
    content = os.pread(descriptor, member.size, member.start)
    if archive.crcs and zlib.crc32(content) != member.crc:
        raise Damaged(f"the CRC of its {shown} differs")
    return content


def _read_legacy(descriptor: int, size: int, path: Path) -> tuple[object, Place]:
    """As `_read_zip`, for torch before 1.6: magic number, protocol, system, objects, storage keys; then each storage: count, bytes."""
    data = os.pread(descriptor, min(size, MOST_BYTES), 0)
    magic, at = _load_magic(data)
    if magic != LEGACY_MAGIC:
        raise UserError(
            "not a checkpoint: neither safetensors nor what torch.save writes", where=str(path), hint="save it again"
        )
    _, at = load(data, at)
    system, at = load(data, at)
    if isinstance(system, Pairs) and system.named().get("little_endian") is False:
        raise _big_endian(path)
    met: list[Storage] = []
    content, at = load(data, at, met)
    keys, at = load(data, at)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise Damaged("its list of storages is broken")
    kinds = {storage.key: storage.kind for storage in met if isinstance(storage.key, str)}
    members = {}
    for key in keys:
        count = int.from_bytes(os.pread(descriptor, 8, at), "little", signed=True)
        code = STORAGES.get(kinds.get(key, ""))
        if code is None:
            raise UserError(
                f"dtype {kinds.get(key, 'unknown')} cannot be merged", where=str(path), hint="convert it to float32"
            )
        members[key] = Member(at + 8, count * STORED[code].itemsize, 0, True)
        at = members[key].start + members[key].size
        if count < 0 or at > size:
            raise Damaged("it ends in its tensors")

    def place(storage: Storage) -> Member:
        if not isinstance(storage.key, str) or storage.key not in members:
            raise Damaged("its bytes are missing")
        if kinds[storage.key] != storage.kind:
            raise Damaged("its bytes are of two dtypes")
        return members[storage.key]

    return content, place


def _load_magic(data: bytes) -> tuple[object, int]:
    try:
        return load(data) if data[:1] == b"\x80" else (None, 0)
    except Damaged:
        return None, 0


def _placed(name: str, tensor: Tensor | Foreign, place: Place, path: Path) -> tuple[TensorLocation, Member]:
    """A tensor within its storage, and that within its member; raises Damaged for one that reaches beyond."""
    if isinstance(tensor, Foreign):
        raise UserError(f"{name} is a {tensor.kind}, which cannot be merged", where=str(path), hint="save it dense")
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    if not isinstance(storage, Storage):
        raise Damaged(f"{name} has no storage")
    code = TORCH_DTYPES.get(tensor.dtype, tensor.dtype) if tensor.dtype else STORAGES.get(storage.kind, storage.kind)
    check_supported(code, where=f"{path}: {name}")
    item = STORED[code].itemsize
    unit = 1 if tensor.dtype else item
    """Bytes of an element as its storage counts them: a storage without a dtype counts bytes."""
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides):
        raise Damaged(f"{name} has no shape with as many strides")
    if len(shape) > MOST_DIMENSIONS:
        raise Damaged(f"{name} has {len(shape):,} dimensions, and {MOST_DIMENSIONS} are the most")
    offset, elements = tensor.offset, storage.elements
    if not (_whole(offset) and _whole(elements) and all(map(_whole, shape)) and all(map(_whole, strides))):
        raise Damaged(f"{name} has sizes, strides or an offset that are no whole numbers from 0")
    try:
        member = place(storage)
    except Damaged as error:
        raise Damaged(f"{name}: {error}") from None
    size = math.prod(shape)
    reach = offset + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides)) if size else 0
    if elements * unit > member.size:
        raise Damaged(f"the storage of {name} has {elements * unit} bytes, and {member.size} are there")
    if reach * item > elements * unit:
        raise Damaged(f"{name} reaches to byte {reach * item} of a storage of {elements * unit}")
    plain = () if not size or _contiguous(shape, strides) else strides
    return TensorLocation(code, shape, path, member.start + (offset * item if size else 0), plain), member


def _whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number from 0 that a size can be."""
    return type(value) is int and 0 <= value < 1 << 63


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for n, stride in zip(reversed(shape), reversed(strides)):
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True


def from_torch(state: Mapping[str, torch.Tensor], path: Path | str, label: str) -> Checkpoint:
    """A checkpoint in memory, of torch tensors."""
    import torch

    tensors: dict[str, TensorLocation] = {}
    arrays: dict[str, Array] = {}
    twins: dict[str, str] = {}
    owners: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in state.items():
        code = TORCH_DTYPES.get(str(tensor.dtype).removeprefix("torch."), str(tensor.dtype))
        check_supported(code, where=f"{path}: {name}")
        tensor = tensor.detach().cpu().contiguous()
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and place in owners:
            twins[name] = owners[place]
        owners.setdefault(place, name)
        flat = tensor.view(torch.uint16).numpy() if code == "BF16" else tensor.numpy()
        tensors[name], arrays[name] = TensorLocation(code, tuple(tensor.shape), Path(str(path)), 0), flat
    files = (path,) if isinstance(path, Path) else ()
    return Checkpoint(label, path, tensors, files, twins=twins, arrays=arrays)
