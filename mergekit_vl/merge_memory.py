"""What a merge of files takes in memory, and the size of its pieces under --max-ram."""

from __future__ import annotations

from mergekit_vl import rebasin
from mergekit_vl.errors import UserError
from mergekit_vl.memory import anonymous_memory
from mergekit_vl.merge_plan import Opened
from mergekit_vl.pieces import BLOCK, CHUNK

SPARE = 24 << 20
"""Bytes kept free of --max-ram for the interpreter's own growth."""
AT_EASE = 64 << 20
"""Bytes that pieces may take where no --max-ram is given: smaller ones would not be faster."""


def piece_memory(opened: Opened, threads: int, chunk: int) -> int:
    """Bytes that the pieces take at most; each method tells how many arrays it holds.

    Of flat pieces every thread may hold one of the largest; of whole tensors each is there once.
    """
    method, n = opened.plan.method, len(opened.tuned)
    tensors = opened.models.tensors
    widest = max(t.wide.itemsize for t in tensors)
    flat = method.held(n) * chunk * widest
    if method.form == "rows":
        flat = method.held(n) * max(chunk, max(t.row for t in tensors)) * widest
    reading = 0
    if opened.symmetries:
        largest = {"tensor": max(t.size for t in tensors), "rows": max(t.row for t in tensors)}.get(method.form, 0)
        reading = rebasin.reading(opened.shapes, opened.symmetries.groups, max(chunk, largest)) * widest
    if method.form != "tensor":
        return threads * (flat + reading)
    arrays = getattr(method, "whole", lambda tensor, n: method.held(n))
    needs = [*(arrays(t, n) * t.size * t.wide.itemsize for t in tensors), *(flat,) * threads]
    return sum(sorted(needs)[-threads:]) + threads * reading


def alignment_memory(opened: Opened) -> int:
    """Bytes that aligning the models takes, before the first piece is read."""
    return rebasin.memory(opened.shapes, opened.symmetries.groups) if opened.symmetries else 0


def chunk_for(opened: Opened, threads: int, max_ram: int | None) -> int:
    """Elements of a piece so that --max-ram is kept; raises UserError where it cannot be."""
    used = anonymous_memory()
    room = max_ram - used - SPARE if max_ram is not None else AT_EASE
    chunk = CHUNK
    needed = piece_memory(opened, threads, chunk)
    while chunk > BLOCK and room < needed > (less := piece_memory(opened, threads, chunk // 2)):
        chunk, needed = chunk // 2, less
    needed = max(needed, alignment_memory(opened))
    if max_ram is not None and needed > room:
        raise UserError(
            f"--max-ram {max_ram >> 20}M is too little: {(used + SPARE + needed) >> 20}M are needed at {threads} threads",
            mend="raise it, or lower --threads",
        )
    return chunk
