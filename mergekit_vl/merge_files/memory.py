"""The memory of a merge of files in bytes, and the chunk size that keeps it below --max-ram."""

from __future__ import annotations

from mergekit_vl.errors import UserError
from mergekit_vl.merge_files.plan import AlignedCheckpoints
from mergekit_vl.merging.chunks import BLOCK, CHUNK_SIZE
from mergekit_vl.merging.memory_bounds import flat_memory, prepass_memory, whole_arrays
from mergekit_vl.system.memory import anonymous_memory

SPARE = 24 << 20
"""Bytes of --max-ram that are reserved for the growth of the interpreter."""
AT_EASE = 128 << 20
"""Upper bound in bytes of the memory of all chunks if there is no --max-ram."""


def chunk_memory(opened: AlignedCheckpoints, threads: int, chunk_size: int) -> int:
    """Bytes that the chunks take at most: of flat ones every thread may hold one of the largest, of whole tensors each is there once."""
    info, method, n = opened.info, opened.plan.method, len(opened.tuned)
    tensors = opened.models.tensors
    flat = max(flat_memory(info, tensor, n, chunk_size) for tensor in tensors)
    reading = 0
    if opened.symmetries:
        from mergekit_vl.alignment import rebasin

        sizes = {"tensor": [t.size for t in tensors], "rows": [t.row for t in tensors]}.get(info.chunks, [0])
        stretch = rebasin.reading(opened.shapes, opened.symmetries.groups, max(chunk_size, *sizes))
        reading = stretch * max(t.wide.itemsize for t in tensors)
    whole = [t for t in tensors if info.chunks == "tensor" and method.whole(t, n)]
    needs = [*(whole_arrays(info, t) * t.size * t.wide.itemsize for t in whole), *(flat,) * threads]
    return sum(sorted(needs)[-threads:]) + threads * reading + prepass_memory(info, tensors, n)


def alignment_memory(opened: AlignedCheckpoints) -> int:
    """Bytes that aligning the models takes, before the first chunk is read."""
    if not opened.symmetries:
        return 0
    from mergekit_vl.alignment import rebasin

    return rebasin.memory(opened.shapes, opened.symmetries.groups)


def chunk_for(opened: AlignedCheckpoints, threads: int, max_ram: int | None) -> int:
    """Elements of a chunk with which memory stays below --max-ram; raises UserError if no size does."""
    used = anonymous_memory()
    room = max_ram - used - SPARE if max_ram is not None else AT_EASE
    chunk_size = CHUNK_SIZE
    needed = chunk_memory(opened, threads, chunk_size)
    while chunk_size > BLOCK and room < needed > (less := chunk_memory(opened, threads, chunk_size // 2)):
        chunk_size, needed = chunk_size // 2, less
    needed = max(needed, alignment_memory(opened))
    if max_ram is not None and needed > room:
        raise UserError(
            f"--max-ram {max_ram >> 20}M is too little: {(used + SPARE + needed) >> 20}M are needed at {threads} threads",
            hint="raise it, or lower --threads",
        )
    return chunk_size
