"""Checkpoints as headers: which tensors a file or folder holds, where their bytes lie, and reading any stretch of them.

Nothing is loaded: a tensor is a place in a file, read with `preadv` when it is asked for. So memory does not depend on the size of
the models, a file that was cut short is an error and not a crash (a memory map would be), and what `ps` shows is what was used.
"""

from __future__ import annotations

import math
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_vl.dtypes import FLOATS, STORED, Array, check_supported, widen
from mergekit_vl.errors import UserError
from mergekit_vl.output import METADATA_KEY
from mergekit_vl.reading import check_regular, parse_json, read_regular, user_path

try:
    from isal.isal_zlib import crc32
except ImportError:  # a processor that it is not built for
    from zlib import crc32

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


MOST_HEADER = 16 << 20
MOST_DIMENSIONS = 64
LONGEST_NAME = 4096
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

        digest, buffer, at = blake3(), _buffer(), 0
        if not self.files:
            for name, array in sorted(self.arrays.items()):
                digest.update(f"{name} {self.tensors[name].code} {self.tensors[name].shape}".encode())
                digest.update(array.tobytes())
            return digest.hexdigest()
        for each in sorted((r for r in self.recorded if r.file == file), key=lambda each: each.start):
            for block in self._blocks(file, buffer, at, each.start):
                digest.update(block)
            self._check_crc(each, buffer, digest.update)
            at = each.start + each.size
        for block in self._blocks(file, buffer, at):
            digest.update(block)
        return digest.hexdigest()

    def check_recorded(self) -> None:
        """Raise UserError where a CRC that a file recorded is not that of its bytes."""
        buffer = _buffer()
        for each in self.recorded:
            self._check_crc(each, buffer)

    def _check_crc(
        self, recorded: Recorded, buffer: memoryview, tell: Callable[[memoryview], object] = lambda block: None
    ) -> None:
        crc, start, stop = 0, recorded.start, recorded.start + recorded.size
        for block in self._blocks(recorded.file, buffer, start, stop):
            crc = crc32(block, crc)
            tell(block)
        if crc != recorded.crc:
            inside = (n for n, t in self.tensors.items() if start <= t.offset < stop and t.file == recorded.file)
            raise UserError(
                f"damaged checkpoint: the CRC of {next(inside, 'a tensor')} differs",
                where=str(recorded.file),
                mend="copy the file again",
            )

    def _blocks(self, file: Path, buffer: memoryview, start: int, stop: int | None = None) -> Iterator[memoryview]:
        """The bytes start..stop of a file, to its end without `stop`; one after another in `buffer`."""
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


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What mergekit-vl wrote into the metadata of a file; nothing where it did not write it."""
    found = parse_json(
        checkpoint.metadata.get(METADATA_KEY, "{}"), where=str(checkpoint.path), what="its metadata are not JSON"
    )
    if not isinstance(found, dict):
        raise UserError("its metadata are not JSON of a merge or an adapter", where=str(checkpoint.path), mend=AGAIN)
    return found


def _buffer() -> memoryview:
    return memoryview(bytearray(1 << 20))


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
    try:
        if path.is_dir():
            return _open_folder(path, label)
        if path.exists():
            return _open_file(path, label)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=given, mend="check its permissions") from None
    raise UserError("no such model", where=given, mend="give a file, a folder, hf-hub:ORG/NAME or open_clip:ARCH/TAG")


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
    size = check_regular(path)

    def damaged(what: str) -> UserError:
        return UserError(f"damaged or truncated safetensors: {what}", where=str(path), mend="copy the file again")

    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if length > MOST_HEADER and _looks_like_safetensors(start + file.read(1)):
            raise damaged(f"a header of {length / 1e6:,.0f} MB, and {MOST_HEADER >> 20} MB are the most")
        if not 2 <= length <= size - 8:
            raise damaged("no header" if size >= 8 else "it is empty" if not size else "it ends in its header")
        file.seek(8)
        header = parse_json(file.read(length), where=str(path), what="damaged safetensors, its header is not JSON")
    if not isinstance(header, dict):
        raise damaged("its header is not JSON of tensors")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged("its metadata are not texts by name")
    if len(header) > MOST_TENSORS:
        raise damaged(f"{len(header):,} tensors, and {MOST_TENSORS:,} are the most")
    entries = []
    for name, entry in header.items():
        if len(name.encode()) > LONGEST_NAME:
            raise damaged(f"{name[:40]} ... is a name of more than {LONGEST_NAME} bytes")
        try:
            entries.append((*_place_of(entry), name))
        except ValueError as error:
            raise damaged(f"{name} has {error}") from None
    tensors, end = {}, 0
    for first, last, code, shape, name in sorted(entries, key=lambda entry: entry[:2]):
        check_supported(code, where=f"{path}: {name}")
        tensor = Stored(code, shape, path, 8 + length + first)
        if first != end or last - first != tensor.bytes:
            raise damaged(f"{name} does not fit its place")
        tensors[name], end = tensor, last
    if size != 8 + length + end:
        raise damaged(f"{size} bytes where its header tells of {8 + length + end}")
    return tensors, metadata


def _place_of(entry: Any) -> tuple[int, int, str, tuple[int, ...]]:
    """First and last byte, dtype code and shape of a header's entry; raises ValueError that tells what is wrong."""
    if not isinstance(entry, dict):
        raise ValueError("no dtype, shape and data_offsets")
    code, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(code, str):
        raise ValueError("no dtype")
    if not _whole_numbers(shape):
        raise ValueError("no shape of whole numbers from 0")
    if len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"{len(shape):,} dimensions, and {MOST_DIMENSIONS} are the most")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError("no data_offsets of two whole numbers from 0")
    return offsets[0], offsets[1], code, tuple(shape)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _open_index(path: Path, label: str) -> Checkpoint:
    places, told = _read_index(path)
    tensors: dict[str, Stored] = {}
    twins: dict[str, str] = {}
    recorded: list[Recorded] = []
    shards = {name: _shard(path, name) for name in dict.fromkeys(places.values())}
    for name, file in shards.items():
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
    found = sum(t.bytes for t in tensors.values())
    if told is not None and told != found:
        raise UserError(f"the shards hold {found} bytes, the index tells of {told}", where=str(path), mend=CHANGED)
    return Checkpoint(label, path, tensors, (path, *shards.values()), twins=twins, recorded=tuple(recorded))


def _read_index(path: Path) -> tuple[dict[str, str], float | None]:
    """The shard of each tensor, and the bytes of all where they are told."""

    def broken(what: str) -> UserError:
        return UserError(f"not an index of shards: {what}", where=str(path), mend="copy it again")

    index = parse_json(read_regular(path, most=MOST_HEADER), where=str(path), what="not an index of shards")
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise broken("it has no weight_map of files by tensor")
    metadata = index.get("metadata") or {}
    told = metadata.get("total_size") if isinstance(metadata, dict) else metadata
    if told is not None and type(told) not in (int, float):
        raise broken("its metadata have no total_size in bytes")
    return places, told


def _shard(index: Path, name: str) -> Path:
    """A shard's file; raises UserError for a name that leads out of the index' folder, or to another index."""
    parts = name.split("/")
    if "\0" in name or not all(part not in ("", ".", "..") for part in parts) or name.endswith(".index.json"):
        raise UserError(f"{name!r} is no file beside its index", where=str(index), mend="copy the model again")
    file = index.parent.joinpath(*parts)
    if not file.is_file():
        raise UserError(f"the shard {name} is missing", where=str(index), mend="copy it beside its index")
    return file


AGAIN = "copy the file again"
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
