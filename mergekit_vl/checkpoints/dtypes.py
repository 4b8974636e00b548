"""Tensor dtypes by their safetensors code, and how values are widened when read and rounded when written.

Arithmetic runs in float32 (in float64 for a tensor that any model holds in float64). On the way in, bfloat16 and float16 widen
exactly; on the way out they round to nearest, ties to even. numpy has no bfloat16: its bits travel as uint16, the upper half of
a float32. A magnitude too large for its dtype becomes infinite; `Narrowing` counts them and reports them by tensor.
"""

from __future__ import annotations

import threading

import numpy as np

from mergekit_vl.errors import Failed, UserError, unknown

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
INFINITE = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
"""Their infinities' bits."""
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
        raise UserError(f"dtype {code} cannot be merged", where=where, hint=f"convert it to one of {', '.join(FLOATS)}")


def widen(stored: Array, code: str, wide: np.dtype) -> Array:
    """Stored numbers converted to float32 or float64, exactly; the same array if the dtype is already right."""
    if code == "BF16":
        stored = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(wide, copy=False)


def narrow(values: Array, code: str) -> Array:
    """Numbers converted to the stored form of `code`, rounded to nearest, ties to even."""
    with np.errstate(over="ignore"):
        if code != "BF16":
            return values.astype(STORED[code], copy=False)
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


class Narrowing:
    """Numbers as they are stored, from any thread; `check` reports the finite ones that became infinite."""

    def __init__(self) -> None:
        self._lost: dict[str, tuple[str, int, float]] = {}
        """By tensor: dtype code, how many, and the one of the largest magnitude."""
        self._lock = threading.Lock()

    def __call__(self, name: str, values: Array, code: str) -> Array:
        """A stretch of the tensor `name` under `code`."""
        stored = narrow(values, code)
        if (
            STORED[code].itemsize < values.itemsize
            and stored.size
            and _magnitudes(stored, code).max() >= INFINITE[code]
        ):
            lost = values[np.isfinite(values) & (_magnitudes(stored, code) >= INFINITE[code])]
            if lost.size:
                self._count(name, code, lost)
        return stored

    def _count(self, name: str, code: str, lost: Array) -> None:
        with self._lock:
            _, count, largest = self._lost.get(name, (code, 0, 0.0))
            largest = max(largest, float(lost.max()), float(lost.min()), key=lambda x: (abs(x), x))
            self._lost[name] = code, count + lost.size, largest

    def check(self, hint: str) -> None:
        """Raise Failed where a number was too large; `mend` has a place for the {dtype} that holds all of them."""
        if not self._lost:
            return
        name, (code, count, largest) = min(self._lost.items())
        wider = NAMES[narrowest(max(abs(value) for _, _, value in self._lost.values()))]
        others = len(self._lost) - 1
        also = f" ({others} other tensor{'s have' if others > 1 else ' has'} some too)" if others else ""
        raise Failed(f"{too_large(name, code, count, largest)}{also}; {wider} holds all", hint=hint.format(dtype=wider))


def too_large(name: str, code: str, count: int, largest: float) -> str:
    return f"{name} has values too large for {NAMES[code]}: {count}, the largest {largest:.6g}"


def narrowest(value: float) -> str:
    """The code of the first float dtype, in the order of their ranges, that holds a number."""
    stored = {code: narrow(np.array([value]), code) for code in ("F16", "BF16", "F32")}
    return next((code for code, found in stored.items() if _magnitudes(found, code)[0] < INFINITE[code]), "F64")


def _magnitudes(stored: Array, code: str) -> Array:
    """The bits of |x|, which are in its order: quicker than floats, float16's above all."""
    bits: Array = stored.view(f"<u{stored.itemsize}")
    magnitudes: Array = bits & bits.dtype.type(2 ** (8 * stored.itemsize - 1) - 1)
    return magnitudes
