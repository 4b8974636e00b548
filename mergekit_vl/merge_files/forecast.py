"""What a merge of files will cost, before it starts: memory, disk, passes and seconds."""

from __future__ import annotations

from mergekit_vl.merge_files.memory import alignment_memory, chunk_for, chunk_memory
from mergekit_vl.merge_files.plan import AlignedCheckpoints
from mergekit_vl.merge_files.provenance import option_values
from mergekit_vl.merging.chunks import Tensor
from mergekit_vl.merging.memory_bounds import whole_arrays
from mergekit_vl.system.memory import anonymous_memory, threads_available

START_SECONDS = 0.3
READ_BYTES, WRITE_BYTES = 2.5e9, 1.2e9
"""A second, of files that are cached and with two threads; up to eight threads are faster in proportion."""
SVD_SECONDS = 5e-10
"""One core's time for the SVD of an m x n matrix, divided by m n min(m, n): 0.4 to 0.55 ns on an AMD EPYC, float64."""


def memory(opened: AlignedCheckpoints, threads: int) -> int:
    """Peak memory of the whole process in bytes."""
    chunks = chunk_memory(opened, threads, chunk_for(opened, threads, None))
    return max(chunks, alignment_memory(opened)) + anonymous_memory()


def written(opened: AlignedCheckpoints) -> int:
    """Bytes that the output takes on disk."""
    return sum(slot.bytes for slot in opened.slots)


def matrices(opened: AlignedCheckpoints) -> list[Tensor]:
    """The tensors that are merged whole."""
    if opened.info.chunks != "tensor":
        return []
    return [t for t in opened.models.tensors if opened.plan.method.whole(t, len(opened.tuned))]


def passes(opened: AlignedCheckpoints) -> int:
    """Passes over the files, the merge itself included."""
    return 1 + opened.info.passes


def seconds(opened: AlignedCheckpoints, threads: int) -> float:
    """Seconds that the merge takes, without the alignment of the models."""
    read = sum(checkpoint.bytes for checkpoint in opened.all)
    files = read * (passes(opened) + 1) / READ_BYTES + written(opened) / WRITE_BYTES
    svds = opened.info.svds * sum(SVD_SECONDS * t.size * min(t.shape[0], t.row) for t in matrices(opened))
    return START_SECONDS + files * 2 / min(threads, 8) + svds / threads


def described(opened: AlignedCheckpoints) -> list[str]:
    """The plan of a merge in words: the strategy, and memory, disk, passes and seconds."""
    plan, threads, over = opened.plan, threads_available(), passes(opened)
    form: str = opened.info.chunks
    if form == "tensor":
        most = max((whole_arrays(opened.info, t) for t in matrices(opened)), default=0)
        form = f"{form}, at most {most} arrays of a matrix's size at a time"
    given = ", ".join(f"{key}={value}" for key, value in option_values(plan.method).items())
    aligned = []
    if opened.symmetries:
        groups = opened.symmetries.groups
        aligned = [
            f"rebasin   to match {opened.reference.label}: {len(groups)} permutations, the largest of {max(g.size for g in groups)}; "
            "their time is not in the one below"
        ]
    return [
        *aligned,
        f"strategy  {plan.strategy}: {given or 'no options'}",
        f"form      {form}, {over} pass{'es' if over > 1 else ''} over the files",
        f"memory    about {memory(opened, threads) >> 20} MB at {threads} threads",
        f"disk      {written(opened) / 1e6:.1f} MB to write",
        f"time      about {seconds(opened, threads):.1f} s where the files are cached and the disk writes 1 GB/s",
    ]
