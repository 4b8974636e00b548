"""Opening checkpoints by their headers: which tensors a file, folder, index or hub name contains, and at which bytes.

No tensor is loaded: it is a place in a file, read with `preadv` on demand. So memory does not depend on the size of
the models, a truncated file is an error (with a memory map it would be a crash), and `ps` shows the memory that was really used.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeGuard

from mergekit_vl.checkpoints.checkpoint import (
    LONGEST_NAME,
    MOST_DIMENSIONS,
    MOST_TENSORS,
    Checkpoint,
    Recorded,
    TensorLocation,
)
from mergekit_vl.checkpoints.configs import CONFIGS
from mergekit_vl.checkpoints.dtypes import check_supported
from mergekit_vl.checkpoints.foreign import SNIFFED, among, hub_hint, recognised
from mergekit_vl.checkpoints.writer import METADATA_KEY
from mergekit_vl.errors import UserError, first_line
from mergekit_vl.system.regular_files import check_regular, parse_json, read_regular, user_path

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


SHARD = re.compile(r"[-_.](\d{1,6})-of-(\d{1,6})(?=\.[a-z.]+$)")
"""What ends the name of a part of a model."""
MOST_HEADER = 16 << 20


WEIGHTS: ContextVar[str] = ContextVar("weights", default="plain")
"""Of files that hold several sets of weights, which are taken: `plain`, `ema`, or the key of one."""


@contextmanager
def taking(weights: str | None) -> Iterator[None]:
    """Inside, files are opened for these of their weights; None changes nothing."""
    token = WEIGHTS.set(weights or WEIGHTS.get())
    try:
        yield
    finally:
        WEIGHTS.reset(token)


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What mergekit-vl wrote into the metadata of a file; nothing where it did not write it."""
    found = parse_json(
        checkpoint.metadata.get(METADATA_KEY, "{}"), where=str(checkpoint.path), what="its metadata are not JSON"
    )
    if not isinstance(found, dict):
        raise UserError("its metadata are not JSON of a merge or an adapter", where=str(checkpoint.path), hint=AGAIN)
    return found


def open_checkpoint(given: str, label: str = "") -> Checkpoint:
    """Read the headers of a file, a folder, an index, an `hf-hub:` name or an `open_clip:ARCH/TAG`."""
    kind, _, name = given.partition(":")
    if kind == "open_clip":
        return _from_open_clip(given, label or name.replace("/", "-"))
    if kind == "hf-hub":
        from mergekit_vl.checkpoints.hub import fetched_folder

        folder = fetched_folder(name, INDEX_FILES, WEIGHT_FILES, CONFIGS, _shards_of)
        return _open_folder(folder, label or name.replace("/", "-").replace("@", "-"))
    path = user_path(given)
    label = label or label_of(given)
    try:
        if path.is_dir():
            return _open_folder(path, label)
        if path.exists():
            return _open_file(path, label)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=given, hint="check its permissions") from None
    hint = hub_hint(given) or "give a file, a folder, hf-hub:ORG/NAME or open_clip:ARCH/TAG"
    raise UserError("no such model", where=given, hint=hint)


def label_of(given: str) -> str:
    """A model's short name: the folder's name, or the file's without its ending."""
    path = Path(given)
    name = path.parent.name if path.name in (*WEIGHT_FILES, *INDEX_FILES) and path.parent.name else path.name
    for ending in (".index.json", ".safetensors", *PICKLES):
        name = name.removesuffix(ending)
    return name


def distinct(labels: Sequence[str]) -> list[str]:
    """The labels, each that is there already with the first free number: checkpoint-500, checkpoint-500-2."""
    out: list[str] = []
    for label in labels:
        free, number = label, 2
        while free in out:
            free, number = f"{label}-{number}", number + 1
        out.append(free)
    return out


def _open_folder(path: Path, label: str) -> Checkpoint:
    config = path if any((path / name).is_file() for name in CONFIGS) else None
    chosen = next((path / name for name in (*INDEX_FILES, *WEIGHT_FILES) if (path / name).is_file()), None)
    if chosen is None and (shards := _unlisted_shards(path)):
        return _open_shards(path, shards, label, config)
    if chosen is None:
        found = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", *PICKLES))
        found = [p for p in found if p.suffix == ".safetensors"] or found
        if len(found) != 1:
            if not found and (other := among(sorted(p.name for p in path.iterdir()))):
                raise UserError(
                    f"it holds {other.what}, and no weights that are read here", where=str(path), hint=other.step
                )
            names = ", ".join(p.name for p in found[:5]) or "none"
            raise UserError(f"which weights? found {names}", where=str(path), hint="name the file itself")
        chosen = found[0]
    checkpoint = _open_file(chosen, label)
    checkpoint.path, checkpoint.config = path, config
    return checkpoint


def _unlisted_shards(folder: Path) -> list[Path]:
    """The shards of a model whose index is not there; safetensors before pickles. Raises UserError where one is missing."""
    found = [(p, shard) for p in sorted(folder.iterdir()) if (shard := SHARD.search(p.name)) and p.is_file()]
    found = [each for each in found if each[0].suffix == ".safetensors"] or found
    if not found:
        return []
    stem, count = found[0][0].name[: found[0][1].start()], int(found[0][1][2])
    paths = [p for p, shard in found if p.name[: shard.start()] == stem and int(shard[2]) == count]
    if len(paths) < count:
        what = f"{len(paths)} of {count} shards of {stem}, and no index"
        raise UserError(what, where=str(folder), hint="copy all shards, with their .index.json, into one folder")
    return paths if count > 1 else []


def _open_shards(folder: Path, paths: Sequence[Path], label: str, config: Path | None) -> Checkpoint:
    tensors: dict[str, TensorLocation] = {}
    twins: dict[str, str] = {}
    recorded: list[Recorded] = []
    for path in paths:
        shard = _open_file(path, label, part=True)
        if both := [name for name in shard.tensors if name in tensors]:
            raise UserError(f"{both[0]} is in two shards", where=str(path), hint=CHANGED)
        tensors |= shard.tensors
        twins |= shard.twins
        recorded += shard.recorded
    notes = (f"{len(paths)} shards without an index, read together",)
    return Checkpoint(
        label, folder, tensors, tuple(paths), twins=twins, recorded=tuple(recorded), notes=notes, config=config
    )


def _open_file(path: Path, label: str, *, part: bool = False) -> Checkpoint:
    """A file that is a whole model, or, where `part`, a shard of one."""
    if not part and (shard := SHARD.search(path.name)) and int(shard[2]) > 1:
        raise UserError(
            f"it is shard {int(shard[1])} of {int(shard[2])} of a model, and not the model",
            where=str(path),
            hint=f"give the folder, {path.parent}, or the index of the shards",
        )
    if path.name.endswith(".index.json"):
        return _open_index(path, label)
    size = check_regular(path)
    with open(path, "rb") as file:
        start = file.read(min(size, SNIFFED))
    if (
        start[:2] == b"PK"
        or (  # what it is before what it is called: Dassl writes model.pth.tar-50
            not _looks_like_safetensors(start) and (start[:1] == b"\x80" or path.suffix in PICKLES)
        )
    ):
        if other := recognised(start, path.name):
            raise UserError(f"it is {other.what}", where=str(path), hint=other.step)
        from mergekit_vl.checkpoints.pickles import open_pickle

        return open_pickle(path, label, WEIGHTS.get())
    if not _looks_like_safetensors(start) and (other := recognised(start, path.name)):
        raise UserError(f"it is {other.what}", where=str(path), hint=other.step)
    tensors, metadata = read_header(path)
    return Checkpoint(label, path, tensors, (path,), metadata)


def _looks_like_safetensors(start: bytes) -> bool:
    return len(start) > 8 and start[8:9] == b"{"


def read_header(path: Path) -> tuple[dict[str, TensorLocation], dict[str, str]]:
    """The tensors and metadata of a safetensors file, in the order of their bytes; raises UserError for a damaged one."""
    size = check_regular(path)
    header, start = _header(path, size)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its metadata are not texts by name")
    return _located(path, header, start, size), metadata


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"damaged or truncated safetensors: {what}", where=str(path), hint="copy the file again")


def _header(path: Path, size: int) -> tuple[dict[str, object], int]:
    """The header of a file of `size` bytes as JSON, and where the tensors' bytes start."""
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if length > MOST_HEADER and _looks_like_safetensors(start + file.read(1)):
            raise _damaged(path, f"a header of {length / 1e6:,.0f} MB, and {MOST_HEADER >> 20} MB are the most")
        if not 2 <= length <= size - 8:
            what = "no header" if size >= 8 else "it is empty" if not size else "it ends in its header"
            raise _damaged(path, what)
        file.seek(8)
        header = parse_json(file.read(length), where=str(path), what="damaged safetensors, its header is not JSON")
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not JSON of tensors")
    return header, 8 + length


def _located(path: Path, header: Mapping[str, object], start: int, size: int) -> dict[str, TensorLocation]:
    """The tensors of a header: one after the other from `start` on, to the end of the file."""
    if len(header) > MOST_TENSORS:
        raise _damaged(path, f"{len(header):,} tensors, and {MOST_TENSORS:,} are the most")
    entries = []
    for name, entry in header.items():
        if len(name.encode()) > LONGEST_NAME:
            raise _damaged(path, f"{name[:40]} ... is a name of more than {LONGEST_NAME} bytes")
        try:
            entries.append((*_place_of(entry), name))
        except ValueError as error:
            raise _damaged(path, f"{name} has {error}") from None
    tensors, end = {}, 0
    for first, last, code, shape, name in sorted(entries, key=lambda entry: entry[:2]):
        check_supported(code, where=f"{path}: {name}")
        tensor = TensorLocation(code, shape, path, start + first)
        if first != end or last - first != tensor.bytes:
            raise _damaged(path, f"{name} does not fit its place")
        tensors[name], end = tensor, last
    if size != start + end:
        raise _damaged(path, f"{size} bytes where its header tells of {start + end}")
    return tensors


def _place_of(entry: object) -> tuple[int, int, str, tuple[int, ...]]:
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


def _whole_numbers(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _open_index(path: Path, label: str) -> Checkpoint:
    places, told = _read_index(path)
    tensors: dict[str, TensorLocation] = {}
    twins: dict[str, str] = {}
    recorded: list[Recorded] = []
    shards = {name: _shard(path, name) for name in dict.fromkeys(places.values())}
    for name, file in shards.items():
        shard = _open_file(file, label, part=True)
        tensors |= {key: tensor for key, tensor in shard.tensors.items() if places.get(key) == name}
        twins |= shard.twins
        recorded += shard.recorded
        extra = [key for key in shard.tensors if places.get(key) != name]
        if extra:
            raise UserError(f"{name} holds {extra[0]}, which its index does not tell", where=str(path), hint=CHANGED)
    lost = [key for key in places if key not in tensors]
    if lost:
        raise UserError(f"{places[lost[0]]} holds no {lost[0]}, as its index tells", where=str(path), hint=CHANGED)
    found = sum(t.bytes for t in tensors.values())
    if told is not None and told != found:
        raise UserError(f"the shards hold {found} bytes, the index tells of {told}", where=str(path), hint=CHANGED)
    return Checkpoint(label, path, tensors, (path, *shards.values()), twins=twins, recorded=tuple(recorded))


def _read_index(path: Path) -> tuple[dict[str, str], float | None]:
    """The shard of each tensor, and the bytes of all where they are told."""

    def broken(what: str) -> UserError:
        return UserError(f"not an index of shards: {what}", where=str(path), hint="copy it again")

    index = parse_json(read_regular(path, most=MOST_HEADER), where=str(path), what="not an index of shards")
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise broken("it has no weight_map of files by tensor")
    metadata = index.get("metadata") or {}
    told = metadata.get("total_size") if isinstance(metadata, dict) else metadata
    if told is not None and type(told) not in (int, float):
        raise broken("its metadata have no total_size in bytes")
    return places, told


def _shards_of(index: Path) -> list[str]:
    """The names of the files that an index of shards names, each once; raises UserError as reading it does."""
    places, _ = _read_index(index)
    for name in (names := sorted(set(places.values()))):
        _check_shard(index, name)
    return names


def _check_shard(index: Path, name: str) -> list[str]:
    """The parts of a shard's name; raises UserError for one that leads out of the index' folder, or to another index."""
    parts = name.split("/")
    if "\0" in name or not all(part not in ("", ".", "..") for part in parts) or name.endswith(".index.json"):
        raise UserError(f"{name!r} is no file beside its index", where=str(index), hint="copy the model again")
    return parts


def _shard(index: Path, name: str) -> Path:
    """A shard's file; raises UserError where there is none."""
    file = index.parent.joinpath(*_check_shard(index, name))
    if not file.is_file():
        raise UserError(f"the shard {name} is missing", where=str(index), hint="copy it beside its index")
    return file


AGAIN = "copy the file again"
CHANGED = "a shard was changed after its index was written: copy the model again"


def _from_open_clip(given: str, label: str) -> Checkpoint:
    """A pretrained tag of open_clip's own list, by its loader, which may download it; held in memory."""
    import open_clip

    arch, _, tag = given.removeprefix("open_clip:").partition("/")
    try:
        model = open_clip.create_model(arch, pretrained=tag or None, require_pretrained=True)
    except Exception as error:  # whatever open_clip, its hub client or the network raise
        first = first_line(error)
        raise UserError(
            f"open_clip cannot load it: {first}", where=given, hint="see open_clip.list_pretrained()"
        ) from None
    from mergekit_vl.checkpoints.pickles import from_torch

    return from_torch(model.state_dict(), given, label)
