"""A checkpoint: the file, offset, shape and dtype of each tensor, and reading any range of elements with `preadv` on demand."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mergekit_vl.checkpoints.dtypes import FLOATS, STORED, Array, widen
from mergekit_vl.errors import UserError

MOST_DIMENSIONS = 64
LONGEST_NAME = 4096
MOST_TENSORS = 100_000
"""Tensors of one file: none has a tenth, and what is more costs more than its bytes."""


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor is stored: dtype code, shape, file, offset of its first byte; `strides` (in elements) only if it is not contiguous."""

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
    """A range of bytes of a file whose CRC-32 the file recorded."""

    file: Path
    start: int
    size: int
    crc: int


@dataclass
class Checkpoint:
    """A model on disk (`label` is its name in messages), or one held in memory (`arrays`) where no file could be mapped."""

    label: str
    path: Path | str
    tensors: dict[str, TensorLocation]
    files: tuple[Path, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    twins: Mapping[str, str] = field(default_factory=dict)
    """Tied weights: a tensor's name to the first name with the same storage."""
    arrays: Mapping[str, Array] = field(default_factory=dict)
    passed_over: str = ""
    """Averaged weights (EMA) in the same file, which were not taken."""
    notes: tuple[str, ...] = ()
    """How it was recognised, where it is not plain tensors by name: a line each."""
    config: Path | None = None
    """The folder whose open_clip_config.json or config.json belongs to it."""
    recorded: tuple[Recorded, ...] = ()
    """What `hash` and `check_recorded` compare, as they read the bytes."""
    _open: dict[Path, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _seen: dict[Path, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._seen = {file: _stamp(file) for file in self.files}

    def renamed(self, to: Mapping[str, str]) -> Checkpoint:
        """The same with these of its tensors alone, under other names."""
        return replace(
            self,
            tensors={to[name]: tensor for name, tensor in self.tensors.items() if name in to},
            twins={to[a]: to[b] for a, b in self.twins.items() if a in to and b in to},
            arrays={to[name]: array for name, array in self.arrays.items() if name in to},
        )

    def told(self) -> tuple[str, ...]:
        """What a user is told of how it was read, a line each."""
        over = f"it holds averaged weights too ({self.passed_over}), and the plain ones are taken: --weights ema takes those"
        return tuple(f"{self.path}: {note}" for note in (*self.notes, *([over] if self.passed_over else [])))

    @property
    def floats(self) -> list[str]:
        return [name for name, t in self.tensors.items() if t.code in FLOATS]

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in self.tensors.values())

    def read(self, name: str, start: int, stop: int, wide: np.dtype) -> Array:
        return widen(self.raw(name, start, stop), self.tensors[name].code, wide)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Elements start..stop of the flattened tensor, in the stored dtype; a new array."""
        tensor = self.tensors[name]
        stop = tensor.size if stop is None else stop
        if name in self.arrays:
            return self.arrays[name].reshape(-1)[start:stop].copy()
        kind = STORED[tensor.code]
        if not tensor.strides:
            return self._pread(tensor.file, tensor.offset + start * kind.itemsize, stop - start, kind)
        return self._strided(tensor, tensor.offset, tensor.shape, tensor.strides, start, stop)

    def _strided(
        self,
        tensor: TensorLocation,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        start: int,
        stop: int,
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
        view = array.view(np.uint8).data
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
            crc = _crc32(block, crc)
            tell(block)
        if crc != recorded.crc:
            inside = (n for n, t in self.tensors.items() if start <= t.offset < stop and t.file == recorded.file)
            raise UserError(
                f"damaged checkpoint: the CRC of {next(inside, 'a tensor')} differs",
                where=str(recorded.file),
                hint="copy the file again",
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
                raise UserError("changed while it was read", where=str(file), hint="merge again when it is complete")

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def _crc32(block: memoryview, crc: int) -> int:
    try:
        from isal.isal_zlib import crc32
    except ImportError:  # a processor that it is not built for
        from zlib import crc32
    return crc32(block, crc)


def _buffer() -> memoryview:
    return memoryview(bytearray(1 << 20))


def _stamp(file: Path) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(file)) from None
    return status.st_size, status.st_mtime_ns
