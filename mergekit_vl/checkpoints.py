"""Checkpoints as headers: which tensors a file or folder holds, where their bytes lie, and reading any stretch of them.

Nothing is loaded: a tensor is a place in a file, read with `preadv` when it is asked for. So memory does not depend on the size of
the models, a file that was cut short is an error and not a crash (a memory map would be), and what `ps` shows is what was used.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_vl.dtypes import FLOATS, STORED, Array, check_supported, widen
from mergekit_vl.errors import UserError
from mergekit_vl.reading import check_regular, user_path

INDEX_FILES = ("model.safetensors.index.json", "open_clip_model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl")
CONFIGS = ("open_clip_config.json", "config.json")


MOST_TENSORS = 100_000
"""Tensors of one file: none has a tenth, and what is more costs more than its bytes."""


@dataclass(frozen=True)
class Stored:
    """A tensor's place: dtype code, shape, file, offset of its first byte; `strides` (in elements) only where it is not contiguous."""

    code: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    strides: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * STORED[self.code].itemsize


@dataclass(frozen=True, slots=True)
class Recorded:
    """A stretch of a file whose CRC-32 was recorded when it was written."""

    file: Path
    start: int
    size: int
    crc: int


@dataclass
class Checkpoint:
    """A model on disk (`label` is its name in messages), or one held in memory (`arrays`) where no file could be mapped."""

    label: str
    path: Path | str
    tensors: dict[str, Stored]
    files: tuple[Path, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    twins: Mapping[str, str] = field(default_factory=dict)
    """Tied weights: a tensor's name to the first name with the same storage."""
    arrays: Mapping[str, Array] = field(default_factory=dict)
    passed_over: str = ""
    """Averaged weights (EMA) in the same file, which were not taken."""
    config: Path | None = None
    """The folder whose open_clip_config.json or config.json belongs to it."""
    recorded: tuple[Recorded, ...] = ()
    """What `hash` and `check_recorded` compare, as they read the bytes."""
    _open: dict[Path, int] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)
    _seen: dict[Path, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._seen = {file: _stamp(file) for file in self.files}

    @property
    def floats(self) -> list[str]:
        return [name for name, t in self.tensors.items() if t.code in FLOATS]

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in self.tensors.values())

    def read(self, name: str, start: int, stop: int, wide: np.dtype) -> Array:
        return widen(self.raw(name, start, stop), self.tensors[name].code, wide)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Elements start..stop of the flattened tensor as they are stored; a fresh array."""
        tensor = self.tensors[name]
        stop = tensor.size if stop is None else stop
        if name in self.arrays:
            return self.arrays[name].reshape(-1)[start:stop].copy()
        kind = STORED[tensor.code]
        if not tensor.strides:
            return self._pread(tensor.file, tensor.offset + start * kind.itemsize, stop - start, kind)
        return self._strided(tensor, tensor.offset, tensor.shape, tensor.strides, start, stop)

    def _strided(
        self, tensor: Stored, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], start: int, stop: int
    ) -> Array:
        """Elements start..stop of what lies in strides from a byte on: not much more is held than is asked for, however it expands."""
        kind = STORED[tensor.code]
        if start >= stop:
            return np.empty(0, kind)
        row = math.prod(shape[1:])
        first, last = start // row, -(-stop // row)
        if len(shape) > 1 and (last - first == 1 or row > stop - start):
            parts = []
            for i in range(first, last):
                inner = max(start, i * row) - i * row, min(stop, (i + 1) * row) - i * row
                place = offset + i * strides[0] * kind.itemsize
                parts.append(self._strided(tensor, place, shape[1:], strides[1:], *inner))
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        rows = (last - first, *shape[1:])
        extent = 1 + sum((n - 1) * stride for n, stride in zip(rows, strides))
        storage = self._pread(tensor.file, offset + first * strides[0] * kind.itemsize, extent, kind)
        view = np.lib.stride_tricks.as_strided(storage, rows, [stride * kind.itemsize for stride in strides])
        return view.reshape(-1)[start - first * row : stop - first * row].copy()

    def _pread(self, file: Path, offset: int, count: int, kind: np.dtype) -> Array:
        array = np.empty(count, kind)
        view = memoryview(array.view(np.uint8))
        done = 0
        while done < len(view):
            got = self._read_into(file, view[done:], offset + done)
            if not got:
                raise UserError("the file ended early: it was cut while it was read", where=str(file))
            done += got
        return array

    def _read_into(self, file: Path, view: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._descriptor(file), [view], offset)
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", where=str(file)) from None

    def _descriptor(self, file: Path) -> int:
        if file not in self._open:
            with self._lock:
                if file not in self._open:
                    self._open[file] = os.open(file, os.O_RDONLY)
        return self._open[file]

    @property
    def hashed(self) -> tuple[Path, ...]:
        """What identifies it: its files, or where it has none the tensors themselves."""
        return self.files or (Path(self.label, "tensors"),)

    def hash(self, file: Path) -> str:
        """The BLAKE3 of one of `hashed`: of a file as `b3sum` prints it. SHA-256 would take as long as many a merge.

        Raises UserError where a CRC that the file recorded differs.
        """
        from blake3 import blake3

        digest = blake3()
        if not self.files:
            for name, array in sorted(self.arrays.items()):
                digest.update(f"{name} {self.tensors[name].code} {self.tensors[name].shape}".encode())
                digest.update(array.tobytes())
            return digest.hexdigest()
        at = 0
        for each in sorted((r for r in self.recorded if r.file == file), key=lambda each: each.start):
            for block in self._blocks(file, at, each.start):
                digest.update(block)
            self._check_crc(each, digest.update)
            at = each.start + each.size
        for block in self._blocks(file, at):
            digest.update(block)
        return digest.hexdigest()

    def check_recorded(self) -> None:
        """Raise UserError where a CRC that a file recorded is not that of its bytes."""
        for each in self.recorded:
            self._check_crc(each)

    def _check_crc(self, recorded: Recorded, tell: Callable[[memoryview], object] = lambda block: None) -> None:
        crc = 0
        for block in self._blocks(recorded.file, recorded.start, recorded.start + recorded.size):
            crc = zlib.crc32(block, crc)
            tell(block)
        if crc != recorded.crc:
            where = next(
                (
                    n
                    for n, t in self.tensors.items()
                    if recorded.start <= t.offset < recorded.start + recorded.size and t.file == recorded.file
                ),
                "",
            )
            raise UserError(
                f"damaged checkpoint: the CRC of {where} differs", where=str(recorded.file), mend="copy the file again"
            )

    def _blocks(self, file: Path, start: int, stop: int | None = None) -> Iterator[memoryview]:
        """The bytes start..stop of a file, to its end without `stop`; one after another in the same memory."""
        buffer = memoryview(bytearray(1 << 20))
        while stop is None or start < stop:
            wanted = len(buffer) if stop is None else min(len(buffer), stop - start)
            got = self._read_into(file, buffer[:wanted], start)
            if not got and stop is None:
                return
            if not got:
                raise UserError("the file ended early: it was cut while it was read", where=str(file))
            yield buffer[:got]
            start += got

    def check_unchanged(self) -> None:
        """Raise UserError where a file is not the one whose header was read."""
        for file, stamp in self._seen.items():
            if _stamp(file) != stamp:
                raise UserError("changed while it was read", where=str(file), mend="merge again when it is complete")

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def _stamp(file: Path) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(file)) from None
    return status.st_size, status.st_mtime_ns


def open_checkpoint(given: str, label: str = "") -> Checkpoint:
    """Read the headers of a file, a folder, an index, an `hf-hub:` name or an `open_clip:ARCH/TAG`."""
    if given.startswith(("hf-hub:", "open_clip:")):
        return _from_open_clip(given, label or given.split(":", 1)[1].replace("/", "-"))
    path = user_path(given)
    label = label or label_of(given)
    if path.is_dir():
        return _open_folder(path, label)
    if not path.exists():
        raise UserError(
            "no such model", where=given, mend="give a file, a folder, hf-hub:ORG/NAME or open_clip:ARCH/TAG"
        )
    return _open_file(path, label)


def label_of(given: str) -> str:
    """A model's short name: the folder's name, or the file's without its ending."""
    path = Path(given)
    name = path.parent.name if path.name in (*WEIGHT_FILES, *INDEX_FILES) and path.parent.name else path.name
    for ending in (".index.json", ".safetensors", *PICKLES):
        name = name.removesuffix(ending)
    return name


def _open_folder(path: Path, label: str) -> Checkpoint:
    config = path if any((path / name).is_file() for name in CONFIGS) else None
    chosen = next((path / name for name in (*INDEX_FILES, *WEIGHT_FILES) if (path / name).is_file()), None)
    if chosen is None:
        found = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", *PICKLES))
        found = [p for p in found if p.suffix == ".safetensors"] or found
        if len(found) != 1:
            names = ", ".join(p.name for p in found[:5]) or "none"
            raise UserError(f"which weights? found {names}", where=str(path), mend="name the file itself")
        chosen = found[0]
    checkpoint = _open_file(chosen, label)
    checkpoint.path, checkpoint.config = path, config
    return checkpoint


def _open_file(path: Path, label: str) -> Checkpoint:
    if path.name.endswith(".index.json"):
        return _open_index(path, label)
    size = check_regular(path)
    with open(path, "rb") as file:
        start = file.read(min(size, 16))
    if (
        start[:2] == b"PK"
        or (  # what it is before what it is called: Dassl writes model.pth.tar-50
            not _looks_like_safetensors(start) and (start[:1] == b"\x80" or path.suffix in PICKLES)
        )
    ):
        from mergekit_vl.pickles import open_pickle

        return open_pickle(path, label)
    tensors, metadata = read_header(path)
    return Checkpoint(label, path, tensors, (path,), metadata)


def _looks_like_safetensors(start: bytes) -> bool:
    return len(start) > 8 and start[8:9] == b"{"


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors and metadata of a safetensors file, in the order of their bytes; raises UserError for a damaged one."""
    size = path.stat().st_size

    def damaged(what: str) -> UserError:
        return UserError(f"damaged or truncated safetensors: {what}", where=str(path), mend="copy the file again")

    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise damaged("no header" if size >= 8 else "it is empty" if not size else "it ends in its header")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise damaged("its header is not JSON of tensors") from None
    tensors, end = {}, 0
    for name, entry in entries:
        check_supported(entry["dtype"], where=f"{path}: {name}")
        first, last = entry["data_offsets"]
        tensor = Stored(entry["dtype"], tuple(entry["shape"]), path, 8 + length + first)
        if first != end or last - first != tensor.bytes:
            raise damaged(f"{name} does not fit its place")
        tensors[name], end = tensor, last
    if size != 8 + length + end:
        raise damaged(f"{size} bytes where its header tells of {8 + length + end}")
    return tensors, metadata


def _open_index(path: Path, label: str) -> Checkpoint:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        places: dict[str, str] = index["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise UserError("not an index of shards", where=str(path), mend="it needs a weight_map") from None
    tensors: dict[str, Stored] = {}
    twins: dict[str, str] = {}
    recorded: list[Recorded] = []
    shards = {name: path.parent / name for name in dict.fromkeys(places.values())}
    for name, file in shards.items():
        if not file.is_file():
            raise UserError(f"the shard {name} is missing", where=str(path), mend="copy it beside its index")
        shard = _open_file(file, label)
        tensors |= {key: tensor for key, tensor in shard.tensors.items() if places.get(key) == name}
        twins |= shard.twins
        recorded += shard.recorded
        extra = [key for key in shard.tensors if places.get(key) != name]
        if extra:
            raise UserError(f"{name} holds {extra[0]}, which its index does not tell", where=str(path), mend=CHANGED)
    lost = [key for key in places if key not in tensors]
    if lost:
        raise UserError(f"{places[lost[0]]} holds no {lost[0]}, as its index tells", where=str(path), mend=CHANGED)
    told, found = (index.get("metadata") or {}).get("total_size"), sum(t.bytes for t in tensors.values())
    if told is not None and told != found:
        raise UserError(f"the shards hold {found} bytes, the index tells of {told}", where=str(path), mend=CHANGED)
    return Checkpoint(label, path, tensors, (path, *shards.values()), twins=twins, recorded=tuple(recorded))


CHANGED = "a shard was changed after its index was written: copy the model again"


def _from_open_clip(given: str, label: str) -> Checkpoint:
    """A model by open_clip's own loader, which may download it; held in memory."""
    import open_clip

    kind, _, name = given.partition(":")
    arch, _, tag = name.partition("/")
    try:
        if kind == "hf-hub":
            model = open_clip.create_model(given)
        else:
            model = open_clip.create_model(arch, pretrained=tag or None, require_pretrained=True)
    except Exception as error:  # whatever open_clip, its hub client or the network raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"open_clip cannot load it: {first}", where=given, mend="see open_clip.list_pretrained()"
        ) from None
    from mergekit_vl.pickles import from_torch

    return from_torch(model.state_dict(), given, label)
