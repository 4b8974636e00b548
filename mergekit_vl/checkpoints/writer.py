"""Writing a folder of safetensors that is complete or does not exist.

Everything is written into a hidden folder beside the target: space for all tensors first (so a full disk is an error before the
first byte), the tensors in any order, the header last, then fsync and one rename, in which an old folder changes places with the new
one. An error removes the hidden folder. A process that is killed by SIGKILL cannot; the next merge into the same place
removes it, under a lock that only one merge at a time can have.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mergekit_vl.checkpoints.configs import CONFIGS
from mergekit_vl.checkpoints.dtypes import STORED, Array
from mergekit_vl.errors import UserError
from mergekit_vl.system.atomic_files import exchange, made_parents, sync_folder
from mergekit_vl.system.locks import locked

METADATA_KEY = "mergekit_vl"
SYNC_EVERY = 0.02
"""Seconds between one round of syncing and the next."""
MERGING, REPLACED = "merging", "replaced"
"""Hidden folders beside an output: one that is being written or removed, and a whole one that has given up its name to it."""
MEND = "choose another -o"
OURS = ("README.md", *CONFIGS)


@dataclass(frozen=True)
class Slot:
    """A tensor to be written: name, dtype code and shape."""

    name: str
    code: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        n = STORED[self.code].itemsize
        for size in self.shape:
            n *= size
        return n


def shards(slots: Sequence[Slot], limit: int | None) -> list[list[Slot]]:
    """Slots by file: wide dtypes first, so that every tensor is aligned, then in the order given."""
    ordered = sorted(slots, key=lambda slot: -STORED[slot.code].itemsize)
    files: list[list[Slot]] = [[]]
    used = 0
    for slot in ordered:
        if limit is not None and files[-1] and used + slot.bytes > limit:
            files.append([])
            used = 0
        files[-1].append(slot)
        used += slot.bytes
    return files


def file_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def header(slots: Sequence[Slot], metadata: Mapping[str, str]) -> bytes:
    """The header of a file whose tensors follow each other in this order; its bytes depend on nothing else."""
    content: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    place = 0
    for slot in slots:
        content[slot.name] = {
            "dtype": slot.code,
            "shape": list(slot.shape),
            "data_offsets": [place, place + slot.bytes],
        }
        place += slot.bytes
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class Output:
    """Within `claimed`: `write` from any thread, then `finish`, or `discard`, which removes everything."""

    def __init__(
        self, folder: Path, slots: Sequence[Slot], metadata: str, *, stem: str, shard_size: int | None
    ) -> None:
        self.folder, self.stem = folder, stem
        self.files = shards(slots, shard_size)
        self.names = file_names(stem, len(self.files))
        self._metadata_size = len(metadata.encode())
        needed = sum(slot.bytes for slot in slots)
        self.hidden = _beside(folder, MERGING)
        try:
            self.hidden.mkdir()
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", where=str(folder), hint=MEND) from None
        self._places: dict[str, tuple[int, int, Slot]] = {}
        self._descriptors: list[int] = []
        try:
            for slots_of, name in zip(self.files, self.names):
                start = len(header(slots_of, self._keys(metadata)))
                descriptor = os.open(self.hidden / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                self._descriptors.append(descriptor)
                for slot in slots_of:
                    self._places[slot.name] = (descriptor, start, slot)
                    start += slot.bytes
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(descriptor, 0, max(1, start))
                else:  # macOS: a full disk is then met while writing
                    os.ftruncate(descriptor, start)
        except OSError as error:
            self.discard()
            free = shutil.disk_usage(folder.parent).free
            raise UserError(
                f"cannot be written: {error.strerror}; {needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free",
                where=str(folder),
                hint="make room, or choose another -o",
            ) from None
        except BaseException:
            self.discard()
            raise

    @staticmethod
    def _keys(metadata: str) -> dict[str, str]:
        return {METADATA_KEY: metadata, "format": "pt"}  # transformers refuses a file that does not tell its format

    def write(self, name: str, start: int, stored: Array) -> None:
        """Put the elements start.. of a tensor, as they are stored, in their place."""
        descriptor, place, slot = self._places[name]
        view = stored.reshape(-1).view("u1").data if stored.size else memoryview(b"")
        place += start * STORED[slot.code].itemsize
        while len(view):
            done = os.pwrite(descriptor, view, place)
            view, place = view[done:], place + done

    @contextmanager
    def syncing(self) -> Iterator[None]:
        """Bring what is written to the disk while more is being written, so that `finish` need not wait for all of it."""
        ended, failed = threading.Event(), list[BaseException]()

        def sync() -> None:
            try:
                while True:
                    last = ended.wait(SYNC_EVERY)
                    for descriptor in self._descriptors:
                        getattr(os, "fdatasync", os.fsync)(descriptor)
                    if last:
                        return
            except BaseException as error:
                failed.append(error)

        disk = threading.Thread(target=sync, daemon=True)
        disk.start()
        try:
            yield
        finally:
            ended.set()
            disk.join()
        if failed:
            raise failed[0]

    def finish(self, metadata: str, texts: Mapping[str, str]) -> None:
        """Write headers, index and the other files, sync, and give the folder its name."""
        assert len(metadata.encode()) == self._metadata_size, "the header's size was fixed before"
        for slots, descriptor in zip(self.files, self._descriptors):
            os.pwrite(descriptor, header(slots, self._keys(metadata)), 0)
        if len(self.files) > 1:
            places = {slot.name: name for slots, name in zip(self.files, self.names) for slot in slots}
            total = sum(slot.bytes for slots in self.files for slot in slots)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            texts = {**texts, f"{self.stem}.safetensors.index.json": json.dumps(index, indent=2) + "\n"}
        for name, text in texts.items():
            with open(self.hidden / name, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        self._close()
        sync_folder(self.hidden)
        _put_in_place(self.hidden, self.folder)

    def discard(self) -> None:
        self._close()
        shutil.rmtree(self.hidden, ignore_errors=True)

    def _close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def is_ours(folder: Path) -> bool:
    """Whether `merge` wrote everything in this folder, so that it may be replaced."""
    names = [path.name for path in folder.iterdir()]
    return all(name in OURS or ".safetensors" in name for name in names) and (
        not names or (folder / "README.md").is_file()
    )


def check_target(folder: Path, *, force: bool) -> None:
    """Raise UserError unless the folder may be written."""
    if folder.name in ("", ".."):
        raise UserError("is no name for a new folder", where=str(folder), hint="choose another -o")
    if folder.is_symlink():
        raise UserError("is a link", where=str(folder), hint=f"name what it leads to: {os.path.realpath(folder)}")
    if folder.is_file():
        raise UserError("is a file; the output is a folder", where=str(folder), hint="choose another -o")
    if not folder.exists():
        return
    if not is_ours(folder):
        raise UserError("holds files that no merge wrote", where=str(folder), hint="choose another -o")
    if not force and any(folder.iterdir()):
        raise UserError("exists", where=str(folder), hint="--force replaces it")


@contextmanager
def claimed(folder: Path, *, force: bool) -> Iterator[None]:
    """Hold the place of an output, put right first what killed merges left there; raises UserError unless it may be written."""
    check_target(folder, force=True)
    with made_parents(folder, hint=MEND), locked(_beside(folder, "lock"), where=folder, hint=MEND):
        _recover(folder)
        check_target(folder, force=force)
        yield


def restore(folder: Path) -> None:
    """Bring back an output that a kill between two renames left under a hidden name."""
    if not folder.exists() and _beside(folder, REPLACED).is_dir():
        with locked(_beside(folder, "lock"), where=folder, hint=MEND):
            _recover(folder)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def _put_in_place(hidden: Path, folder: Path) -> None:
    """Give a whole hidden folder its name, in one step where the system has one; else `_recover` ends what a kill interrupts."""
    if folder.exists() and not exchange(hidden, folder):
        old = _beside(folder, REPLACED)
        os.rename(folder, old)
        try:
            os.rename(hidden, folder)
        except BaseException:
            os.rename(old, folder)
            raise
        os.rename(old, hidden)
    elif not folder.exists():
        os.rename(hidden, folder)
    sync_folder(folder.parent)
    shutil.rmtree(hidden, ignore_errors=True)  # what was there before


def _recover(folder: Path) -> None:
    """Tidy up after a killed merge. The old output lies apart only while the new one is whole."""
    hidden, old = _beside(folder, MERGING), _beside(folder, REPLACED)
    if old.exists() and not folder.exists():
        os.rename(hidden if hidden.exists() else old, folder)
    for left in (hidden, old):
        shutil.rmtree(left, ignore_errors=True)
