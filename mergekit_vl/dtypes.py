"""Tensor dtypes by their safetensors code, and the one rule for narrow floats.

Arithmetic runs in float32 (in float64 for a tensor that any model holds in float64). On the way in, bfloat16 and float16 widen
exactly; on the way out they round to nearest, ties to even. numpy has no bfloat16: its bits travel as uint16, the upper half of
a float32. Magnitudes too large for float16 become infinite, which the caller reports.
"""

from __future__ import annotations

import numpy as np

from mergekit_vl.errors import UserError, unknown

Array = np.ndarray

STORED: dict[str, np.dtype] = {
    code: np.dtype(kind)
    for code, kind in {
        "F64": "<f8",
        "F32": "<f4",
        "F16": "<f2",
        "BF16": "<u2",
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "i1",
        "U64": "<u8",
        "U32": "<u4",
        "U16": "<u2",
        "U8": "u1",
        "BOOL": "?",
    }.items()
}
"""The numpy dtype that holds each code's bytes."""
FLOATS = ("F64", "F32", "F16", "BF16")
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def float_code(name: str) -> str:
    """The code of a float dtype as users write it: float32, bfloat16, fp16, bf16 ..."""
    short = {"fp64": "F64", "fp32": "F32", "fp16": "F16", "half": "F16", "bf16": "BF16"}
    known = {written: code for code, written in NAMES.items()} | short
    written = name.removeprefix("torch.").lower()
    if written not in known:
        raise unknown("dtype", name, NAMES.values(), where="dtype")
    return known[written]


def check_supported(code: str, *, where: str) -> None:
    if code not in STORED:
        raise UserError(f"dtype {code} cannot be merged", where=where, mend=f"convert it to one of {', '.join(FLOATS)}")


def widen(stored: Array, code: str, wide: np.dtype) -> Array:
    """Stored numbers as float32 or float64, exactly; the same array where nothing changes."""
    if code == "BF16":
        stored = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(wide, copy=False)


def narrow(values: Array, code: str) -> Array:
    """Numbers as they are stored under `code`, rounded to nearest, ties to even."""
    if code != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(STORED[code], copy=False)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
