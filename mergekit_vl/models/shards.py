"""Features on disk as shards of rows. A file has a digest of its content, then key, position, shape and dtype, then the rows."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3

from mergekit_vl.errors import UserError
from mergekit_vl.system.atomic_files import write_bytes

ENDING = ".features"
MAGIC = b"mergekit-vl features 1 "
"""What a file begins with: then come a BLAKE3 of the rest and a line end, one line of JSON, and the rows, little-endian."""
START = len(MAGIC) + 64 + 1
DTYPE = np.dtype("<f4")


def default_folder() -> Path:
    """`$MERGEKIT_VL_CACHE`, or mergekit_vl in the user's cache folder."""
    if found := os.environ.get("MERGEKIT_VL_CACHE"):
        return Path(found)
    if found := os.environ.get("XDG_CACHE_HOME"):
        return Path(found) / "mergekit_vl"
    try:
        return Path.home() / ".cache" / "mergekit_vl"
    except RuntimeError:  # neither HOME nor an entry in the system's list of users
        raise UserError("there is no home folder for stored features", hint="set MERGEKIT_VL_CACHE") from None


@dataclass(frozen=True)
class Shards:
    """Rows [N, D] under a key, in files of `size` rows. A damaged file counts as missing."""

    folder: Path | None
    """None: nothing is kept."""
    key: str
    n: int
    size: int

    @property
    def starts(self) -> range:
        """The first row of each shard."""
        return range(0, self.n, self.size)

    def rows(self, start: int) -> int:
        """How many a shard has."""
        return min(self.size, self.n - start)

    def file(self, start: int) -> Path:
        assert self.folder is not None
        name = hashlib.sha256(self.key.encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}-{start // self.size:05d}{ENDING}"

    def write(self, start: int, rows: np.ndarray) -> None:
        if self.folder is None:
            return
        assert len(rows) == self.rows(start)
        header = json.dumps(self._told(start) | {"width": rows.shape[1]}).encode() + b"\n"
        rest = header + np.ascontiguousarray(rows, dtype=DTYPE).tobytes()
        digest = blake3(rest).hexdigest().encode() + b"\n"
        write_bytes(self.file(start), MAGIC + digest + rest, hint="set MERGEKIT_VL_CACHE to another folder")

    def read(self, start: int) -> np.ndarray | None:
        """The rows of a shard, or None: no such file, another key or place in it, or a digest that differs."""
        if self.folder is None:
            return None
        try:
            data = self.file(start).read_bytes()
        except OSError:
            return None
        rest = memoryview(data)[START:]
        if data[: START - 1] != MAGIC + blake3(rest).hexdigest().encode():
            return None
        end = data.index(b"\n", START)
        told = json.loads(data[START:end])
        if told | self._told(start) != told:
            return None
        return np.frombuffer(data, DTYPE, offset=end + 1).reshape(self.rows(start), told["width"])

    def read_all(self) -> np.ndarray | None:
        """All rows, or None where a shard is missing."""
        out = None
        for start in self.starts:
            if (rows := self.read(start)) is None:
                return None
            out = np.empty((self.n, rows.shape[1]), DTYPE) if out is None else out
            out[start : start + len(rows)] = rows
        return out

    def _told(self, start: int) -> dict[str, str | int]:
        return {"key": self.key, "start": start, "rows": self.rows(start), "of": self.n, "dtype": "float32"}
