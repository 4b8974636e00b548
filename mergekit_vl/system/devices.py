"""Device names: check `auto`, `cpu`, `cuda` and `cuda:N`, and resolve them for torch."""

from __future__ import annotations

import os
import sys

from mergekit_vl.errors import UserError, unknown

DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""One of these is there where torch may find a GPU on Linux: NVIDIA's, AMD's, that of WSL."""


def check_device(name: str) -> None:
    """Raise UserError for what is no device's name; whether it is there is not asked."""
    kind, colon, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda"):
        raise unknown("device", name, ("auto", "cpu", "cuda"))
    if colon and not (kind != "auto" and number.isascii() and number.isdigit()):
        raise UserError(f"device {name!r}", where="command line", hint="write auto, cpu, cuda or cuda:0")


def device_of(name: str) -> str:
    """A device as torch names it; raises UserError for one that is not there.

    torch takes seconds and memory to import: without a driver it is not asked.
    """
    check_device(name)
    if name.startswith("cpu") or (name == "auto" and sys.platform == "linux" and not any(map(os.path.exists, DRIVERS))):
        return name.replace("auto", "cpu")
    import torch

    if name != "auto" and not torch.cuda.is_available():
        raise UserError(f"device {name}: no GPU is visible to torch", hint="use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
