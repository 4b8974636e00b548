"""`merge`, `check` of models and `verify`: arguments in, a plan for `streaming.py` out, its result on the screen."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from mergekit_vl import options
from mergekit_vl.commands import arguments
from mergekit_vl.commands.merge_request import RECIPES, Asked, ask, closed_form, steps_of
from mergekit_vl.commands.terminal import TerminalReporter, ours_alone, say
from mergekit_vl.errors import UserError, unknown
from mergekit_vl.registry.calls import is_plugins
from mergekit_vl.system.devices import device_of
from mergekit_vl.system.interrupts import noted
from mergekit_vl.system.regular_files import user_path

if TYPE_CHECKING:
    from mergekit_vl.merge_files.matching import Tensors

MOST_THREADS = 1024

Words = Annotated[
    list[str],
    typer.Argument(
        help="models (files, folders, hf-hub:ORG/NAME, open_clip:ARCH/TAG) or one recipe; options density=0.2; weights A=0.3",
        metavar="MODELS... [key=value ...]",
    ),
]
Base = Annotated[str | None, typer.Option(help="the model that the others were tuned from")]
StrategyName = Annotated[str | None, typer.Option(help="see mergekit-vl list strategies")]
Seed = Annotated[int | None, typer.Option(min=0, max=options.MOST_SEED, help="of random draws (DARE, DELLA)")]
DType = Annotated[
    str | None,
    typer.Option(
        help="of the output: float32, bfloat16, float16, float64; default: each tensor as the base, or the first model, has it"
    ),
]
Keep = Annotated[
    list[str] | None, typer.Option(help="tensors to take from the base or first model unmerged: part of a name")
]
Rebasin = Annotated[
    bool, typer.Option("--rebasin", help="first reorder units, heads, channels to match the base or first model")
]
TensorsOf = Annotated[
    str | None,
    typer.Option(
        "--tensors",
        metavar="same|union|intersection",
        help="where models differ in their tensors: refuse, take all that any has, or those that all have",
    ),
]
ResizePosEmbed = Annotated[
    bool,
    typer.Option(
        "--resize-pos-embed",
        help="interpolate position embeddings of another image size or context length to the base's or first's",
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="default: one per core")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda: where SVDs are taken; everything else is the CPU's")]
MaxRam = Annotated[str | None, typer.Option(help="memory that may be used, for instance 500M or 2G")]


def merge(
    words: Words,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write")],
    base: Base = None,
    strategy: StrategyName = None,
    seed: Seed = None,
    dtype: DType = None,
    keep: Keep = None,
    rebasin: Rebasin = False,
    tensors: TensorsOf = None,
    weights: arguments.Weights = None,
    resize_pos_embed: ResizePosEmbed = False,
    shard_size: Annotated[
        str | None, typer.Option(help="split the output into files of at most this, for instance 5G")
    ] = None,
    max_ram: MaxRam = None,
    threads: Threads = None,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="replace an earlier merge")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False,
) -> None:
    """Merge checkpoints, weights only: no data, no model is built, any size of model in little memory."""
    from mergekit_vl.merge_files import streaming

    for step in steps_of(words, out):
        began = time.monotonic()
        asked = ask(
            words, base=base, strategy=strategy, seed=seed, dtype=dtype, keep=keep, rebasin=rebasin, device=device,
            tensors=tensors_of(tensors), weights=weights, resize_pos_embed=resize_pos_embed, content=step.content,
        )  # fmt: skip
        with noted("nothing was written"), TerminalReporter(not quiet, after=2) as reporter, _quiet(asked.plan.method):
            for note in (step.note, *asked.notes):
                if note:
                    reporter.tell(note)
            metadata = streaming.merge(
                asked.plan,
                step.out,
                force=force,
                threads=threads,
                max_ram=size_in_bytes(max_ram, "--max-ram"),
                shard_size=size_in_bytes(shard_size, "--shard-size"),
                reporter=reporter,
            )
        if not quiet:
            inputs = ", ".join(m["label"] for m in (metadata["base"], *metadata["models"]) if m)
            say(f"{metadata['strategy']} of {inputs}: {step.out} ({time.monotonic() - began:.1f} s)")
            say(f"next: mergekit-vl verify {shlex.quote(str(step.out))}")


def tensors_of(given: str | None) -> Tensors | None:
    """The value of --tensors."""
    from mergekit_vl.merge_files.matching import Tensors

    known: tuple[Tensors, ...] = get_args(Tensors)
    found = next((each for each in known if each == given), None)
    if given is not None and found is None:
        raise unknown("--tensors", given, known, where="command line")
    return found


def check(
    words: Sequence[str],
    *,
    base: str | None,
    strategy: str | None,
    rebasin: bool = False,
    keep: Sequence[str] | None = None,
    dtype: str | None = None,
    tensors: str | None = None,
    weights: str | None = None,
    resize_pos_embed: bool = False,
) -> None:
    """What `check` prints for models: read from their headers alone."""
    for step in steps_of(words, Path("out")):
        if step.note:
            say(step.note)
        if step.follows:
            say("          merges a result of those before it: checked when that is there")
            continue
        asked = ask(
            words,
            base=base,
            strategy="linear" if strategy is None and not any(word.endswith(RECIPES) for word in words) else strategy,
            rebasin=rebasin,
            keep=keep,
            dtype=dtype,
            tensors=tensors_of(tensors),
            weights=weights,
            resize_pos_embed=resize_pos_embed,
            content=step.content,
        )
        _check(asked)


def _check(asked: Asked) -> None:
    import shutil

    from mergekit_vl.merge_files.forecast import described
    from mergekit_vl.merge_files.plan import open_plan

    say(*asked.notes)
    with _quiet(asked.plan.method):
        opened = open_plan(asked.plan)
    for role, c in [("base", opened.base), *(("model", c) for c in opened.tuned)]:
        if c is not None:
            codes = "+".join(sorted({t.code for t in c.tensors.values()}))
            elements = sum(t.size for t in c.tensors.values())
            say(
                f"{role:9s} {c.label}: {len(c.tensors)} tensors, {elements / 1e6:.1f} M elements, {codes}, {c.bytes / 1e6:.1f} MB, {c.path}"
            )
    for line in described(opened):
        say(line)
    for note in opened.notes:
        say(f"note      {note}")
    free = shutil.disk_usage(".").free
    needed = sum(slot.bytes for slot in opened.slots)
    if needed > free:
        raise UserError(f"the output needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", hint="make room")
    say("ok        the models can be merged")


def _quiet(method: object) -> AbstractContextManager[object]:
    """What a plugin's method prints does not mix with our output."""
    return ours_alone() if is_plugins(method) else nullcontext()


def verify(
    folder: Annotated[Path, typer.Argument(help="what merge wrote")],
    where: Annotated[list[str] | None, typer.Argument(help="LABEL=PATH of an input that was moved")] = None,
    threads: Threads = None,
) -> None:
    """Merge again from the recorded inputs and compare every byte; writes nothing."""
    from mergekit_vl.checkpoints.writer import restore
    from mergekit_vl.merge_files import streaming
    from mergekit_vl.merge_files.plan import MergePlan
    from mergekit_vl.merge_files.provenance import read_metadata

    restore(folder)
    metadata, merged = read_metadata(folder)
    if wrong := [word for word in where or [] if "=" not in word]:
        raise UserError(f"{wrong[0]!r} is no LABEL=PATH", where="command line", hint="write A=moved/A.safetensors")
    moved = dict(word.split("=", 1) for word in where or [])
    cls, _ = closed_form(metadata["strategy"], where=str(folder))
    models = [m for m in (metadata["base"], *metadata["models"]) if m]
    for label in moved:
        if label not in [m["label"] for m in models]:
            raise unknown("model", label, [m["label"] for m in models], where=str(folder))
    paths = [moved.get(m["label"]) or _found(m["path"], folder) for m in models]
    for model, path in zip(models, paths):
        if ":" not in path and not user_path(path).exists():
            raise UserError("no such model", where=path, hint=f"if it was moved, add {model['label']}=PATH")
    plan = MergePlan(
        metadata["strategy"],
        options.build(cls, metadata["options"], where=f"{folder}: options"),
        tuple(paths[1:] if metadata["base"] else paths),
        paths[0] if metadata["base"] else None,
        tuple(m["label"] for m in metadata["models"]),
        metadata["base"]["label"] if metadata["base"] else "",
        metadata["seed"],
        metadata["dtype"],
        tuple(metadata["keep"]),
        metadata["rebasin"],
        device_of(metadata["device"]),
        metadata.get("tensors", "same"),
        metadata.get("resize_pos_embed", False),
        metadata.get("weights", "plain"),
    )
    differing = streaming.verify(plan, metadata, merged, threads=threads)
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(f"is not what its inputs merge to: {', '.join(differing[:3])}{more} differ", where=str(folder))
    say(f"{folder}: reproduced byte for byte, {metadata['strategy']} of {', '.join(m['label'] for m in models)}")


def _found(path: str, folder: Path) -> str:
    """An input's path as it was given, also seen from the output's parent."""
    beside = folder.resolve().parent / path
    return str(beside) if not user_path(path).exists() and user_path(str(beside)).exists() else path


def size_in_bytes(text: str | None, what: str) -> int | None:
    """500M, 2G, 1.5GiB, or bytes; powers of 1024."""
    if text is None:
        return None
    number = text.upper().removesuffix("B").removesuffix("I")
    unit = {"K": 10, "M": 20, "G": 30, "T": 40}.get(number[-1:], 0)
    try:
        size = int(float(number[:-1] if unit else number) * 2**unit)
    except (ValueError, OverflowError):  # infinity is a number to float
        size = 0
    if size <= 0:
        raise UserError(f"{what} {text}", where="command line", hint="write 500M or 2G")
    return size
