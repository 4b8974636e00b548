"""Merging checkpoints on disk: headers first, then piece by piece from the inputs to its place in the output.

plan -> opened (headers that agree) -> rebasin.py, where asked for -> apply (closed_form.py) -> strategies/<method>.merge_piece -> output.py
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_vl import __version__, options, rebasin
from mergekit_vl.checkpoints import CONFIGS, Checkpoint, open_checkpoint
from mergekit_vl.closed_form import ClosedForm, apply, workers
from mergekit_vl.coefficients import depths, matches
from mergekit_vl.dtypes import FLOATS, NAMES, STORED, Array, float_code, narrow
from mergekit_vl.errors import UserError
from mergekit_vl.memory import anonymous_memory, reuse_freed_memory
from mergekit_vl.output import METADATA_KEY, Output, Slot, check_target
from mergekit_vl.pieces import BLOCK, CHUNK, Models, Piece, Source, Tensor
from mergekit_vl.symmetries import Symmetries, find, heads_told

NO_HASH = "0" * 64
ADAPTER = ("adapter", "backbone", "init", "names", "normalise", "unseen", "head")
SPARE = 24 << 20
"""Bytes kept free of --max-ram for the interpreter's own growth."""
AT_EASE = 64 << 20
"""Bytes that pieces may take where no --max-ram is given: smaller ones would not be faster."""


@dataclass(frozen=True)
class MergePlan:
    """What is merged, how: plain data and a checked method, buildable without a command line."""

    strategy: str
    method: ClosedForm
    models: tuple[str, ...]
    base: str | None = None
    labels: tuple[str, ...] = ()
    base_label: str = ""
    seed: int = 0
    dtype: str | None = None
    keep: tuple[str, ...] = ()
    """Tensors that are not merged but taken from the base (or the first model) as they are: filters as in `coefficients`."""
    rebasin: bool = False
    """Whether every model but the base (or the first) is first reordered to match that one."""
    device: str = "cpu"
    """Where matrices are decomposed: cpu, or a GPU as torch names it."""


@dataclass
class Opened:
    """The plan's models as headers that agree, and what will become of their tensors."""

    plan: MergePlan
    base: Checkpoint | None
    tuned: tuple[Checkpoint, ...]
    models: Models
    copied: tuple[str, ...]
    slots: tuple[Slot, ...]
    notes: list[str] = field(default_factory=list)
    symmetries: Symmetries | None = None
    """Where the models are aligned first: the reorderings that are tried."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {tensor.name: tensor.shape for tensor in self.models.tensors}

    @property
    def all(self) -> tuple[Checkpoint, ...]:
        return (*((self.base,) if self.base else ()), *self.tuned)

    @property
    def reference(self) -> Checkpoint:
        return self.all[0]

    def close(self) -> None:
        for checkpoint in self.all:
            checkpoint.close()


def open_plan(plan: MergePlan) -> Opened:
    """Read every header and raise UserError for what cannot be merged; reads no tensor."""
    tuned = tuple(
        open_checkpoint(given, label) for given, label in zip(plan.models, plan.labels or ("",) * len(plan.models))
    )
    base = open_checkpoint(plan.base, plan.base_label) if plan.base is not None else None
    everyone = (*((base,) if base else ()), *tuned)
    reference = everyone[0]
    for key in plan.keep:
        if not any(matches(name, key) for name in reference.tensors):
            raise UserError(f"--keep {key} covers no tensor", mend="use a part of a tensor's name")
    kept = {name for name in reference.tensors if any(matches(name, key) for key in plan.keep)}
    _check_same(everyone, kept, plan.keep)
    floats = [name for name in reference.floats if name not in kept]
    if not floats:
        raise UserError("holds no float tensor to merge", where=reference.label)
    deep = depths(floats)
    tensors = tuple(
        Tensor(
            name,
            reference.tensors[name].shape,
            deep[name],
            np.dtype(np.float64 if any(c.tensors[name].code == "F64" for c in everyone) else np.float32),
            reference.twins.get(name, ""),
        )
        for name in floats
    )
    code = float_code(plan.dtype) if plan.dtype else None
    slots = tuple(
        Slot(name, code if code and stored.code in FLOATS else stored.code, stored.shape)
        for name, stored in reference.tensors.items()
    )
    models = Models(
        base,
        tuned,
        tensors,
        tuple(c.label for c in tuned),
        plan.seed,
        base.label if base else "zero-shot",
        plan.device,
    )
    copied = tuple(name for name in reference.tensors if name not in deep)
    opened = Opened(plan, base, tuned, models, copied, slots)
    plan.method.check(models)
    opened.notes = _notes(opened)
    if plan.rebasin:
        opened.symmetries = _symmetries(opened, kept)
        opened.notes += opened.symmetries.notes
    return opened


def _symmetries(opened: Opened, kept: set[str]) -> Symmetries:
    if len(opened.all) < 2:
        raise UserError("--rebasin has one model and none that it is to match", mend="name more models, or a --base")
    reference = opened.reference
    heads = next((told for c in opened.all if (told := heads_told(c.config))), {})
    return find({name: reference.tensors[name].shape for name in reference.floats}, heads, kept)


def align(opened: Opened, tell: Callable[[str], None] = lambda text: None) -> None:
    """Let the method see every model but the reference in the order in which it matches that; does nothing without `rebasin`."""
    if opened.symmetries is None:
        return
    shapes, groups, sources = opened.shapes, opened.symmetries.groups, list[Source]()
    for checkpoint in opened.tuned:
        if checkpoint is opened.reference:
            sources.append(checkpoint)
            continue
        found = rebasin.align(opened.reference, checkpoint, shapes, groups)
        tell(
            f"rebasin: {checkpoint.label} matches {opened.reference.label} after {found.moved} of {len(groups)} permutations, "
            f"cosine {found.before:.4f} before, {found.after:.4f} now"
        )
        sources.append(rebasin.Permuted(checkpoint, shapes, found.orders))
    opened.models = dataclasses.replace(opened.models, tuned=tuple(sources))


def _check_same(everyone: tuple[Checkpoint, ...], kept: set[str], keep: tuple[str, ...]) -> None:
    first = everyone[0]
    for other in everyone[1:]:
        differing = []
        for name in [*first.tensors, *(n for n in other.tensors if n not in first.tensors)]:
            if name in kept or (name not in first.tensors and any(matches(name, key) for key in keep)):
                continue
            shapes = [c.tensors[name].shape if name in c.tensors else "missing" for c in (first, other)]
            kinds = [c.tensors[name].code in FLOATS for c in (first, other) if name in c.tensors]
            if shapes[0] != shapes[1]:
                differing.append(f"{name}: {shapes[0]} against {shapes[1]}")
            elif len(set(kinds)) > 1:
                differing.append(f"{name}: {first.tensors[name].code} against {other.tensors[name].code}")
        if differing:
            more = f" and {len(differing) - 3} more tensors" if len(differing) > 3 else ""
            raise UserError(
                f"{first.label} and {other.label} differ in {'; '.join(differing[:3])}{more}",
                mend="merge models of one architecture, or --keep what differs as the first has it",
            )


def of_no_task(plan: MergePlan) -> list[str]:
    """A note where a method that makes a model for each task is not told which."""
    if not getattr(plan.method, "by_task", False):
        return []
    return [f"no task=LABEL: {plan.strategy} writes the vector of all tasks unmasked, which it does not use by itself"]


def _notes(opened: Opened) -> list[str]:
    reference, plan = opened.reference, opened.plan
    notes = of_no_task(plan)
    whole = [name for name in opened.copied if reference.tensors[name].code not in FLOATS]
    if whole:
        notes.append(
            f"{len(whole)} integer tensors ({', '.join(whole[:3])}{' ...' if len(whole) > 3 else ''}) come from {reference.label}"
        )
    dtypes = {c.label: sorted({t.code for t in c.tensors.values() if t.code in FLOATS}) for c in opened.all}
    if len({tuple(codes) for codes in dtypes.values()}) > 1:
        told = "; ".join(f"{label} {'+'.join(NAMES[c] for c in codes)}" for label, codes in dtypes.items())
        notes.append(f"dtypes differ: {told}; merged in float32, written as {plan.dtype or f'in {reference.label}'}")
    twins = {c.label: len(c.twins) for c in opened.all if c.twins}
    if twins:
        notes.append(
            f"tied weights: {', '.join(f'{k} in {label}' for label, k in twins.items())}; written as separate tensors"
        )
    if len({path for c in opened.all for path in c.files}) < len([path for c in opened.all for path in c.files]):
        notes.append("the same file is given twice")
    return notes


def threads_available() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def merge(
    plan: MergePlan,
    out: Path,
    *,
    force: bool = False,
    threads: int | None = None,
    max_ram: int | None = None,
    shard_size: int | None = None,
    warn: Callable[[str], None] = lambda text: None,
    tell: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] = lambda elements: None,
    chunk: int | None = None,
) -> dict[str, Any]:
    """Merge into the folder `out` and return the metadata that is written with it; on any failure `out` is as it was before."""
    check_target(out, force=force)
    reuse_freed_memory()
    opened = open_plan(plan)
    for note in of_no_task(plan):
        warn(note)
    try:
        _check_not_an_input(opened, out)
        threads = threads or threads_available()
        chunk = chunk or chunk_for(opened, threads, max_ram)
        for note in opened.symmetries.notes if opened.symmetries else ():
            tell(f"rebasin: {note}")
        align(opened, tell)
        texts, stem = _companions(opened)
        blank = describe(opened, {file: NO_HASH for c in opened.all for file in c.hashed})
        output = Output(out, opened.slots, canonical(blank), stem=stem, shard_size=shard_size, force=force)
        try:
            with output.syncing():
                _fill(opened, output.write, threads, chunk, warn, progress)
                metadata = describe(opened, _hashes(opened, threads))
            texts["README.md"] = model_card(opened, metadata)
            output.finish(canonical(metadata), texts)
        except OSError as error:
            output.discard()
            raise UserError(
                f"cannot be written: {error.strerror}", where=str(out), mend="make room, or choose another -o"
            ) from None
        except BaseException:
            output.discard()
            raise
        return metadata
    finally:
        opened.close()


def _fill(
    opened: Opened,
    write: Callable[[str, int, Array], None],
    threads: int,
    chunk: int,
    warn: Callable[[str], None],
    progress: Callable[[int], None],
) -> None:
    """Every tensor of the output, in pieces, to `write(name, start, stored)`."""
    codes = {slot.name: slot.code for slot in opened.slots}
    for name in opened.copied:
        _copy(opened, name, codes[name], write, chunk, warn)

    def put(piece: Piece, merged: Array) -> None:
        name = piece.tensor.name
        stored = narrow(merged, codes[name])
        if codes[name] == "F16" and not np.isfinite(stored).all():
            raise UserError(f"{name} has values too large for float16", mend="use --dtype bfloat16")
        write(name, piece.start, stored)

    apply(opened.plan.method, opened.models, put, workers(threads, progress), chunk)


def _copy(
    opened: Opened,
    name: str,
    code: str,
    write: Callable[[str, int, Array], None],
    chunk: int,
    warn: Callable[[str], None],
) -> None:
    """A tensor that is not merged, as the first model has it; an integer one on which the models disagree is named."""
    reference = opened.reference
    stored = reference.tensors[name]
    compare = stored.code not in FLOATS
    others = [c for c in opened.all[1:] if compare and name in c.tensors and c.tensors[name].shape == stored.shape]
    differing = set()
    for start in range(0, stored.size, chunk):
        stop = min(start + chunk, stored.size)
        values = reference.raw(name, start, stop)
        differing |= {c.label for c in others if not np.array_equal(c.raw(name, start, stop), values)}
        if code != stored.code:
            values = narrow(reference.read(name, start, stop, np.dtype(np.float64)), code)
        write(name, start, values)
    if differing:
        warn(
            f"{name} ({stored.code}) differs between {reference.label} and {', '.join(sorted(differing))}; {reference.label}'s is taken"
        )


def _hashes(opened: Opened, threads: int) -> dict[Path, str]:
    """The BLAKE3 of each input file; raises UserError for an input that changed since its header was read."""
    files = {file: c for c in opened.all for file in c.hashed}
    team = min(
        len(files) or 1, threads if threads == 1 else 2 * threads
    )  # three files on two threads would be two and one
    found = workers(team)(lambda item: item[1].hash(item[0]), files.items())
    for checkpoint in opened.all:
        checkpoint.check_unchanged()
    return dict(zip(files, found))


def _check_not_an_input(opened: Opened, out: Path) -> None:
    inside = out.resolve()
    for checkpoint in opened.all:
        if any(inside == file.resolve() or inside in file.resolve().parents for file in checkpoint.files):
            raise UserError(f"the output is the input {checkpoint.label}", where=str(out), mend="choose another -o")


def _companions(opened: Opened) -> tuple[dict[str, str], str]:
    """Files that go with the weights, from the first input that has them, and the name under which loaders look for the weights."""
    texts: dict[str, str] = {}
    for name in CONFIGS:
        for checkpoint in opened.all:
            if checkpoint.config and (checkpoint.config / name).is_file():
                texts.setdefault(name, (checkpoint.config / name).read_text(encoding="utf-8"))
    return texts, "open_clip_model" if "open_clip_config.json" in texts else "model"


def canonical(metadata: Mapping[str, Any]) -> str:
    return json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def describe(opened: Opened, hashes: Mapping[Path, str]) -> dict[str, Any]:
    """The resolved recipe with its inputs' hashes: what `verify` needs to do it again."""
    plan = opened.plan

    def model(checkpoint: Checkpoint, given: str) -> dict[str, Any]:
        return {
            "label": checkpoint.label,
            "path": given,
            "blake3": {file.name: hashes[file] for file in checkpoint.hashed},
        }

    return _adapter(opened) | {
        "version": __version__,
        "strategy": plan.strategy,
        "options": option_values(plan.method),
        "models": [model(c, given) for c, given in zip(opened.tuned, plan.models)],
        "base": model(opened.base, plan.base) if opened.base and plan.base else None,
        "seed": plan.seed,
        "dtype": plan.dtype,
        "keep": list(plan.keep),
        "rebasin": plan.rebasin,
        "device": plan.device,
    }


def _adapter(opened: Opened) -> dict[str, Any]:
    """What a run wrote into the files of an adapter, so that the merge is one too; it must be the same in all, the order of a head's classes included.

    What was chosen while a model was tuned is its own, and not the merge's.
    """
    told = [json.loads(c.metadata.get(METADATA_KEY, "{}")) for c in opened.all]
    adapters = [{key: each[key] for key in ADAPTER if key in each} if "adapter" in each else {} for each in told]
    for adapter in adapters:
        if adapter.get("head"):
            adapter["head"] = {key: value for key, value in adapter["head"].items() if key != "chosen"}
    for checkpoint, adapter in zip(opened.all, adapters):
        for key in adapter.keys() | adapters[0].keys():
            if adapter.get(key) != adapters[0].get(key):
                raise UserError(
                    f"{opened.reference.label} and {checkpoint.label} are adapters of different {key}",
                    mend="merge adapters that were tuned in the same way; `run` merges heads by class name",
                )
    return adapters[0]


def option_values(method: Any) -> dict[str, Any]:
    """A method's options as a recipe writes them."""
    values = {options.key_of(f): getattr(method, f.name) for f in dataclasses.fields(method) if f.init}
    return json.loads(json.dumps(values))


def model_card(opened: Opened, metadata: Mapping[str, Any]) -> str:
    """The README.md of the output."""
    plan = opened.plan
    lines = [
        "---",
        "library_name: mergekit-vl",
        "tags: [merge, mergekit-vl]",
        "---",
        "",
        f"# A merge with {plan.strategy}",
        "",
        (type(plan.method).__doc__ or "").strip().splitlines()[0],
        "",
        f"Made by mergekit-vl {metadata['version']} of",
        "",
    ]
    for role, model in [("base", metadata["base"]), *(("model", m) for m in metadata["models"])]:
        if model:
            lines.append(f"- {role} **{model['label']}**: `{model['path']}`")
            lines += [f"  - {name} blake3 `{value}`" for name, value in model["blake3"].items()]
    lines += ["", "| option | value |", "|---|---|"]
    lines += [f"| {key} | `{json.dumps(value)}` |" for key, value in metadata["options"].items()]
    if plan.rebasin:
        lines.append(f"| rebasin | every model is reordered to match `{opened.reference.label}` |")
    lines += [f"| seed | `{plan.seed}` |", f"| dtype | `{plan.dtype or 'as the first model'}` |", ""]
    lines += ["`mergekit-vl verify` of this folder repeats the merge from the same files and compares every byte.", ""]
    return "\n".join(lines)


def read_metadata(folder: Path) -> tuple[dict[str, Any], Checkpoint]:
    """What `describe` wrote, and the merged checkpoint."""
    checkpoint = open_checkpoint(str(folder))
    found = checkpoint.metadata
    if not found:
        from mergekit_vl.checkpoints import read_header

        found = read_header(next(f for f in checkpoint.files if f.suffix == ".safetensors"))[1]
    if METADATA_KEY not in found:
        raise UserError("no merge of mergekit-vl", where=str(folder), mend="give the folder that merge wrote")
    metadata = json.loads(found[METADATA_KEY])
    if any("blake3" not in model for model in metadata.get("models", [{}])):
        raise UserError("was merged by an early version, or is no merge", where=str(folder), mend="merge again")
    return metadata, checkpoint


def verify(
    plan: MergePlan, metadata: Mapping[str, Any], merged: Checkpoint, *, threads: int | None = None
) -> list[str]:
    """Merge again and compare with `merged` piece by piece, writing nothing; the differences, none if every byte agrees."""
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
        _fill(opened, compare, threads, chunk_for(opened, threads, None), lambda text: None, lambda n: None)
        return list(differing)
    finally:
        opened.close()
        merged.close()
