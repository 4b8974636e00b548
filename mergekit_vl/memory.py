"""The process' memory: what it uses, and keeping what is freed for the next piece."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def anonymous_memory() -> int:
    """Bytes of this process that are no file's pages."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return 120 << 20


def reuse_freed_memory() -> None:
    """Tell glibc not to give a piece's memory back to the system when it is freed: the next piece takes it.

    Otherwise every array is fresh pages, which the kernel clears one by one: a million page faults and 3 s of 8 for a merge of three
    ViT-B-16 with DARE-TIES. Peak memory does not change. Elsewhere than on glibc nothing happens.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        mallopt(parameter, 1 << 30)
