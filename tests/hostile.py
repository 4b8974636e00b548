"""Makers of checkpoints as a stranger may write them: pickles opcode by opcode, and zips around them."""

import pickle
import struct
import zipfile
from pathlib import Path


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tuple_of(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def integers(*values: int) -> bytes:
    return tuple_of(*(integer(value) for value in values))


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_of(*arguments) + b"R"


def storage(key: str = "0", kind: str = "FloatStorage", elements: bytes | int = 4, *more: bytes) -> bytes:
    elements = integer(elements) if isinstance(elements, int) else elements
    return tuple_of(text("storage"), named("torch", kind), text(key), text("cpu"), elements, *more) + b"Q"


HOOKS = named("collections", "OrderedDict") + b")R"


def tensor(
    shape: bytes = integers(4),
    strides: bytes = integers(1),
    offset: bytes | int = 0,
    of: bytes | None = None,
    *more: bytes,
) -> bytes:
    offset = integer(offset) if isinstance(offset, int) else offset
    function = named("torch._utils", "_rebuild_tensor_v2")
    return called(function, of or storage(), offset, shape, strides, b"\x89", HOOKS, *more)


def mapping(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in items.items()) + b"u"


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


FOUR = struct.pack("<4f", 1, 2, 3, 4)


def archive(path: Path, body: bytes, data: dict[str, bytes] | None = None, root: str = "archive") -> Path:
    """A checkpoint of the pickle `body`, with the float32 storage 0 of 1, 2, 3, 4."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{root}/data.pkl", program(body))
        for key, raw in ({"0": FOUR} if data is None else data).items():
            file.writestr(f"{root}/data/{key}", raw)
    return path


def safetensors(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def legacy(path: Path, body: bytes, keys: list[str], data: bytes) -> Path:
    """The same before torch 1.6: five pickles, then for each storage its count and its bytes."""
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(parts) + program(body) + pickle.dumps(keys, 2) + data)
    return path
