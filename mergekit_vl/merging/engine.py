"""Closed-form methods: written once, tensor by tensor, for merges in memory and for merges of files.

A method is a frozen dataclass with

    form            what a chunk is: "accumulating" and "elementwise" take flat chunks (the first reads model by model and its memory
                    does not grow with their number), "rows" whole slices along the first axis, "tensor" whole tensors
    averages        True where it is a weighted mean of the models; otherwise BatchNorm statistics take the plain mean of the tuned ones
    held(n)         how many arrays of a chunk it holds at most for n tuned models, its results included
    whole(t, n)     optional, for the form "tensor": that number for the tensor t, or 0 for one that it takes in flat chunks after all
    svds(n)         beside it: how many SVDs of such a tensor it takes, for the time that `check` tells
    check(models)   raises UserError for options that do not fit the models; reads no tensor
    passes          optional: over the files before that of the merge, for the time that `check` tells
    ignores_base(n) optional: True where a base gives nothing but integer tensors to the merge of n tuned models
    by_task         optional: True where a method that makes a model for each task is not told which (`in_memory.merge_by_task`)
    prepass(...)     optional: what must be known of all tensors before the first is merged (`prepass.py`); further passes over the files
    merge_chunk     the method itself

`checked` refuses one that is not so, and `apply` runs one. What they give is checked too: a plugin's is nobody else's word.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import Failed
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.registry.calls import calling, is_plugins, named

FORMS = ("accumulating", "elementwise", "rows", "tensor")
BATCH_NORM = re.compile(r"(^|\.)running_(mean|var)$")


class ClosedForm(Protocol):
    form: Literal["accumulating", "elementwise", "rows", "tensor"]
    averages: bool

    def held(self, n: int) -> int: ...
    def check(self, models: Models) -> None: ...
    def merge_chunk(self, chunk: Chunk, stats: Any) -> Array: ...


def checked(method: ClosedForm, models: Models) -> None:
    """Raise UserError for a method that is no closed form, or whose options do not fit the models."""
    needed = ("form", "averages", "held", "check", "merge_chunk")
    if missing := [name for name in needed if not hasattr(method, name)]:
        raise Failed(f"has no {missing[0]}", where=named(method), hint="see docs/plugins.md")
    with calling(method, "form"):
        form = method.form
    with calling(method, "held"):
        held = method.held(len(models.tuned))
    if form not in FORMS or not isinstance(held, int) or held < 1:
        wrong = f"form={form!r}" if form not in FORMS else f"held gives {held!r}"
        hint = f"one of {', '.join(FORMS)}" if form not in FORMS else "a number of arrays"
        raise Failed(wrong, where=named(method), hint=hint)
    with calling(method, "check"):
        method.check(models)


def apply(method: ClosedForm, models: Models, write: Callable[[Chunk, Array], None], run: Run, chunk_size: int) -> None:
    """Merge every tensor of `models`, chunk by chunk, into `write`."""
    checked(method, models)
    if not method.averages:
        statistics = replace(models, tensors=tuple(t for t in models.tensors if BATCH_NORM.search(t.name)))
        run(lambda chunk: write(chunk, _finite(chunk, _mean(chunk))), statistics.chunks("accumulating", chunk_size))
        models = replace(models, tensors=tuple(t for t in models.tensors if not BATCH_NORM.search(t.name)))
    with np.errstate(all="ignore"):
        prepass = getattr(method, "prepass", None)
        with calling(method, "prepass"):
            stats = prepass(models, run, chunk_size) if prepass else None
    chunks = models.chunks(method.form, chunk_size, whole=getattr(method, "whole", None))
    with one_blas_thread() if hasattr(method, "svds") else nullcontext():
        run(lambda chunk: write(chunk, _merged(method, chunk, stats)), chunks)


def _merged(method: ClosedForm, chunk: Chunk, stats: Any) -> Array:
    """What the method makes of a chunk; raises UserError unless it is finite floats, one for each element."""
    what, shape = f"merge_chunk of {chunk.tensor.name}", chunk.tensor.shape
    where = f"{named(method)}: {what}"
    with calling(method, what):
        merged = method.merge_chunk(chunk, stats)
    if not isinstance(merged, np.ndarray):
        raise Failed(f"gave no array but a {type(merged).__name__}", where=where)
    as_it_is = merged.ndim == len(shape) and merged.shape[1:] == shape[1:]
    if merged.size != chunk.size or not (merged.ndim == 1 or as_it_is):
        raise Failed(f"gave an array of shape {merged.shape} for {chunk.size} elements", where=where)
    if merged.dtype.kind != "f" or merged.dtype.itemsize < chunk.tensor.wide.itemsize:
        raise Failed(f"gave an array of {merged.dtype}, not of {chunk.tensor.wide}", where=where)
    return _finite(chunk, merged, where if is_plugins(method) else "")


def one_blas_thread() -> AbstractContextManager[Any]:
    """One thread for each of numpy's matrix products and SVDs: last bits would depend on their number, and several workers, each with a
    team of threads of its own, would fight for the cores.
    """
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


def _mean(chunk: Chunk) -> Array:
    total = chunk.tuned(0)
    for i in range(1, len(chunk.models.tuned)):
        total += chunk.tuned(i)
    total /= len(chunk.models.tuned)
    return total


def _finite(chunk: Chunk, merged: Array, where: str = "") -> Array:
    """The merged values; raises UserError that names the model, or `where`, if one of them is not finite."""
    if np.isfinite(merged).all():
        return merged
    for label, source in zip(chunk.models.member_labels, chunk.models.members):
        if not np.isfinite(chunk.read(source)).all():
            raise Failed(
                f"{chunk.tensor.name} has values that are not finite", where=label, hint="it was damaged while training"
            )
    if where:
        raise Failed("gave values that are not finite", where=where)
    raise Failed(f"{chunk.tensor.name} overflows when it is merged", hint="use smaller weights")


def workers(threads: int, progress: Callable[[int], None] = lambda elements: None) -> Run:
    """`run(function, jobs)` over this many threads: results in the order of the jobs, the first error stops the rest.

    numpy lets the interpreter go during its loops and file reads, so threads work in parallel. A progress call tells the elements
    of a finished chunk.
    """

    def run(function: Callable[[Any], Any], jobs: Iterable[Any]) -> list[Any]:
        queue = enumerate(jobs)
        results: dict[int, Any] = {}
        errors: list[BaseException] = []
        lock = threading.Lock()

        def work() -> None:
            with np.errstate(all="ignore"):
                while not errors:
                    with lock:
                        i, job = next(queue, (None, None))
                    if i is None:
                        return
                    try:
                        result = function(job)
                    except BaseException as error:
                        errors.append(error)
                        return
                    if result is not None:
                        results[i] = result
                    progress(getattr(job, "size", 0))

        if threads == 1:
            work()
        else:
            team = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
            try:
                for thread in team:
                    thread.start()
                for thread in team:
                    thread.join()
            except BaseException as interrupt:  # Ctrl-C reaches this thread only: the others stop after their chunk
                errors.append(interrupt)
                for thread in team:
                    if thread.ident:
                        thread.join()
        if errors:
            raise errors[0]
        return [results[i] for i in sorted(results)]

    return run


SERIAL = workers(1)
