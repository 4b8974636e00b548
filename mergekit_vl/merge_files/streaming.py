"""The merge of checkpoint files: read all headers, then merge chunk by chunk and write each chunk to its place in the output.

plan.py (headers that agree) -> rebasin.py, where asked for -> apply (engine.py) -> strategies/<method>.merge_chunk -> writer.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mergekit_vl.checkpoints.checkpoint import Checkpoint
from mergekit_vl.checkpoints.configs import CONFIGS
from mergekit_vl.checkpoints.dtypes import FLOATS, STORED, Array, Narrowing
from mergekit_vl.checkpoints.writer import Output, claimed
from mergekit_vl.errors import UserError
from mergekit_vl.merge_files.forecast import passes
from mergekit_vl.merge_files.memory import chunk_for
from mergekit_vl.merge_files.plan import AlignedCheckpoints, MergePlan, open_plan, warnings
from mergekit_vl.merge_files.provenance import NO_HASH, Metadata, canonical, describe, model_card
from mergekit_vl.merging.chunks import Chunk, Source
from mergekit_vl.merging.engine import apply, one_blas_thread, workers
from mergekit_vl.reporter import SILENT, Reporter
from mergekit_vl.system.memory import reuse_freed_memory, threads_available
from mergekit_vl.system.regular_files import read_text


def align(opened: AlignedCheckpoints, reporter: Reporter = SILENT) -> None:
    """Replace every model but the reference by one that is read in the order that matches the reference; does nothing without `rebasin`."""
    if opened.symmetries is None:
        return
    from mergekit_vl.alignment import rebasin
    from mergekit_vl.alignment.permuted import Permuted

    shapes, groups, sources = opened.shapes, opened.symmetries.groups, list[Source]()
    for checkpoint, source in zip(opened.tuned, opened.models.tuned):
        if checkpoint is opened.reference:
            sources.append(source)
            continue
        with one_blas_thread():
            found = rebasin.align(opened.reference, source, shapes, groups)
        reporter.tell(
            f"rebasin: {checkpoint.label} matches {opened.reference.label} after {found.moved} of {len(groups)} permutations, "
            f"cosine {found.before:.4f} before, {found.after:.4f} now"
        )
        sources.append(Permuted(source, shapes, found.orders))
    opened.models = dataclasses.replace(opened.models, tuned=tuple(sources))


def merge(
    plan: MergePlan,
    out: Path,
    *,
    force: bool = False,
    threads: int | None = None,
    max_ram: int | None = None,
    shard_size: int | None = None,
    reporter: Reporter = SILENT,
    chunk_size: int | None = None,
) -> Metadata:
    """Merge into the folder `out` and return the metadata that is written with it; on any failure `out` is as it was before."""
    with claimed(out, force=force):
        reuse_freed_memory()
        opened = open_plan(plan)
        return merge_opened(
            opened,
            out,
            threads=threads,
            max_ram=max_ram,
            shard_size=shard_size,
            reporter=reporter,
            chunk_size=chunk_size,
        )


def merge_opened(
    opened: AlignedCheckpoints,
    out: Path,
    *,
    threads: int | None = None,
    max_ram: int | None = None,
    shard_size: int | None = None,
    reporter: Reporter = SILENT,
    chunk_size: int | None = None,
) -> Metadata:
    """The merge of models that are open, or held in memory, into a folder that is `claimed`; closes them."""
    try:
        _check_not_an_input(opened, out)
        threads = threads or threads_available()
        chunk_size = _prepared(opened, threads, max_ram, chunk_size, reporter)
        return _written(opened, out, threads, chunk_size, shard_size, reporter)
    finally:
        opened.close()


def merge_into_arrays(
    opened: AlignedCheckpoints,
    *,
    threads: int | None = None,
    max_ram: int | None = None,
    reporter: Reporter = SILENT,
) -> dict[str, Array]:
    """The merge of models that are open, or held in memory, as arrays: by name, in the dtypes and with the bytes that `merge` writes.

    Closes the models. `max_ram` does not count the arrays themselves.
    """
    out = {slot.name: np.empty(slot.shape, STORED[slot.code]) for slot in opened.slots}

    def put(name: str, start: int, stored: Array) -> None:
        out[name].reshape(-1)[start : start + stored.size] = stored.reshape(-1)

    try:
        threads = threads or threads_available()
        chunk_size = _prepared(opened, threads, max_ram, None, reporter)
        _fill(opened, put, threads, chunk_size, reporter)
        for checkpoint in opened.all:
            checkpoint.check_recorded()
            checkpoint.check_unchanged()
    finally:
        opened.close()
    return out


def _prepared(
    opened: AlignedCheckpoints,
    threads: int,
    max_ram: int | None,
    chunk_size: int | None,
    reporter: Reporter,
) -> int:
    """Tell what is to be told, and align the models; elements of a chunk."""
    for note in opened.recognised:
        reporter.tell(note)
    for note in warnings(opened):
        reporter.warn(note)
    chunk_size = chunk_size or chunk_for(opened, threads, max_ram)
    for note in opened.symmetries.notes if opened.symmetries else ():
        reporter.tell(f"rebasin: {note}")
    align(opened, reporter)
    return chunk_size


def _written(
    opened: AlignedCheckpoints,
    out: Path,
    threads: int,
    chunk_size: int,
    shard_size: int | None,
    reporter: Reporter,
) -> Metadata:
    """Write the output and return its metadata."""
    texts, stem = _companions(opened)
    blank = describe(opened, {file: NO_HASH for c in opened.all for file in c.hashed})
    output = Output(out, opened.slots, canonical(blank), stem=stem, shard_size=shard_size)
    try:
        with output.syncing():
            _fill(opened, output.write, threads, chunk_size, reporter)
            metadata = describe(opened, _hashes(opened, threads))
        texts["README.md"] = model_card(opened, metadata)
        output.finish(canonical(metadata), texts)
    except OSError as error:
        output.discard()
        raise UserError(
            f"cannot be written: {error.strerror}", where=str(out), hint="make room, or choose another -o"
        ) from None
    except BaseException:
        output.discard()
        raise
    return metadata


def _fill(
    opened: AlignedCheckpoints,
    write: Callable[[str, int, Array], None],
    threads: int,
    chunk_size: int,
    reporter: Reporter,
) -> None:
    """Every tensor of the output, in chunks, to `write(name, start, stored)`."""
    codes, narrowing = {slot.name: slot.code for slot in opened.slots}, Narrowing()
    for name in opened.copied:
        _copy(opened, name, codes[name], narrowing, write, chunk_size, reporter)

    def put(chunk: Chunk, merged: Array) -> None:
        name = chunk.tensor.name
        write(name, chunk.start, narrowing(name, merged, codes[name]))

    apply(
        opened.plan.method,
        opened.models,
        put,
        workers(threads, reporter, passes(opened) * sum(t.size for t in opened.models.tensors)),
        chunk_size,
    )
    narrowing.check("use --dtype {dtype}")


def _copy(
    opened: AlignedCheckpoints,
    name: str,
    code: str,
    narrowing: Narrowing,
    write: Callable[[str, int, Array], None],
    chunk_size: int,
    reporter: Reporter,
) -> None:
    """A tensor that is not merged, as the first model has it; an integer one on which the models disagree is named."""
    reference = opened.copied_from.get(name, opened.reference)
    stored = reference.tensors[name]
    compare = stored.code not in FLOATS and reference is opened.reference
    others = [c for c in opened.all[1:] if compare and name in c.tensors and c.tensors[name].shape == stored.shape]
    differing = set()
    for start in range(0, stored.size, chunk_size):
        stop = min(start + chunk_size, stored.size)
        values = reference.raw(name, start, stop)
        differing |= {c.label for c in others if not np.array_equal(c.raw(name, start, stop), values)}
        if code != stored.code:
            values = narrowing(name, reference.read(name, start, stop, np.dtype(np.float64)), code)
        write(name, start, values)
    if differing:
        reporter.warn(
            f"{name} ({stored.code}) differs between {reference.label} and {', '.join(sorted(differing))}; {reference.label}'s is taken"
        )


def _hashes(opened: AlignedCheckpoints, threads: int) -> dict[Path, str]:
    """The BLAKE3 of each input file; raises UserError for an input that changed since its header was read."""
    files = {file: c for c in opened.all for file in c.hashed}
    team = min(
        len(files) or 1, threads if threads == 1 else 2 * threads
    )  # three files on two threads would be two and one
    found = workers(team)(lambda item: item[1].hash(item[0]), files.items())
    for checkpoint in opened.all:
        checkpoint.check_unchanged()
    return dict(zip(files, found))


def _check_not_an_input(opened: AlignedCheckpoints, out: Path) -> None:
    inside = out.resolve()
    for checkpoint in opened.all:
        if any(inside == file.resolve() or inside in file.resolve().parents for file in checkpoint.files):
            raise UserError(f"the output is the input {checkpoint.label}", where=str(out), hint="choose another -o")


def _companions(opened: AlignedCheckpoints) -> tuple[dict[str, str], str]:
    """Files that go with the weights, from the first input that has them, and the name under which loaders look for the weights."""
    texts: dict[str, str] = {}
    for name in CONFIGS:
        for checkpoint in opened.all:
            if checkpoint.config and (checkpoint.config / name).is_file():
                texts.setdefault(name, read_text(checkpoint.config / name))
    return texts, "open_clip_model" if "open_clip_config.json" in texts else "model"


def verify(plan: MergePlan, metadata: Metadata, merged: Checkpoint, *, threads: int | None = None) -> list[str]:
    """Merge again and compare with `merged` chunk by chunk, writing nothing; the differences, none if every byte agrees."""
    reuse_freed_memory()
    opened = open_plan(plan)
    threads = threads or threads_available()
    differing: dict[str, None] = {}
    try:
        told = [m for m in (metadata["base"], *metadata["models"]) if m]
        hashes = _hashes(opened, threads)
        for checkpoint, model in zip(opened.all, told):
            for file in checkpoint.hashed:
                if hashes[file] not in model["blake3"].values():
                    raise UserError("is not the file that was merged: its BLAKE3 differs", where=str(file))
        layout = [(s.name, s.code, s.shape) for s in opened.slots]
        if sorted(layout) != sorted((name, t.code, t.shape) for name, t in merged.tensors.items()):
            return ["the tensors' names, dtypes or shapes"]

        def compare(name: str, start: int, stored: Array) -> None:
            there = merged.raw(name, start, start + stored.size)
            if there.tobytes() != stored.reshape(-1).view(STORED[merged.tensors[name].code]).tobytes():
                differing[name] = None

        align(opened)
        _fill(opened, compare, threads, chunk_for(opened, threads, None), SILENT)
        return list(differing)
    finally:
        opened.close()
        merged.close()
