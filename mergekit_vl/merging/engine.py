"""The engine of closed forms (`method.py`): it checks a method, merges every tensor chunk by chunk, and checks the results.

Results are checked since a method may be a plugin's.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.errors import Failed
from mergekit_vl.merging.chunks import Chunk, Job, Models, Result, Run
from mergekit_vl.merging.method import ClosedForm, MethodInfo, as_closed_form
from mergekit_vl.registry.calls import calling, is_plugins, named
from mergekit_vl.reporter import SILENT, Reporter

BATCH_NORM = re.compile(r"(^|\.)running_(mean|var)$")


def checked(method: ClosedForm, models: Models) -> MethodInfo:
    """What the method is for these models; raises UserError for one that is no closed form, or whose options do not fit the models."""
    as_closed_form(method)
    with calling(method, "describe"):
        info = method.describe(len(models.tuned))
    if not isinstance(info, MethodInfo):
        raise Failed(f"describe gives {info!r}", where=named(method), hint="a MethodInfo")
    with calling(method, "check"):
        method.check(models)
    return info


def apply(method: ClosedForm, models: Models, write: Callable[[Chunk, Array], None], run: Run, chunk_size: int) -> None:
    """Merge every tensor of `models`, chunk by chunk, into `write`."""
    info = checked(method, models)
    if not info.averages:
        statistics = replace(models, tensors=tuple(t for t in models.tensors if BATCH_NORM.search(t.name)))
        run(lambda chunk: write(chunk, _finite(chunk, _mean(chunk))), statistics.chunks("accumulating", chunk_size))
        models = replace(models, tensors=tuple(t for t in models.tensors if not BATCH_NORM.search(t.name)))
    with np.errstate(all="ignore"), calling(method, "prepass"):
        stats = method.prepass(models, run, chunk_size)
    chunks = models.chunks(info.chunks, chunk_size, whole=method.whole)
    with one_blas_thread() if info.svds else nullcontext():
        run(lambda chunk: write(chunk, _merged(method, chunk, stats)), chunks)


def _merged(method: ClosedForm, chunk: Chunk, stats: object) -> Array:
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


def one_blas_thread() -> AbstractContextManager[object]:
    """One thread for each of numpy's matrix products and SVDs: last bits would depend on their number, and several workers, each with a
    team of threads of its own, would fight for the cores.
    """
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(1, user_api="blas")
    return limits


def _mean(chunk: Chunk) -> Array:
    models = iter(chunk.tuned)
    total = next(models)
    for values in models:
        total += values
    total /= len(chunk.tuned)
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


def _in_threads(work: Callable[[], None], threads: int, errors: list[BaseException]) -> None:
    """Calls `work` in this many threads and waits for them; an interrupt comes to the errors, at which they stop after their chunk."""
    team = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    try:
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()
    except BaseException as interrupt:  # Ctrl-C reaches this thread only
        errors.append(interrupt)
        for thread in team:
            if thread.ident:
                thread.join()


def workers(threads: int, reporter: Reporter = SILENT, total: int = 0) -> Run:
    """`run(function, jobs)` over this many threads: results in the order of the jobs, the first error stops the rest.

    numpy lets the interpreter go during its loops and file reads, so threads work in parallel. The reporter is told how many of
    `total` elements are done, in all runs together.
    """
    done = 0

    def run(function: Callable[[Job], Result | None], jobs: Iterable[Job], /) -> list[Result]:
        queue = enumerate(jobs)
        results: dict[int, Result] = {}
        errors: list[BaseException] = []
        lock = threading.Lock()

        def work() -> None:
            nonlocal done
            with np.errstate(all="ignore"):
                while not errors:
                    with lock:
                        numbered = next(queue, None)
                    if numbered is None:
                        return
                    i, job = numbered
                    del (
                        numbered
                    )  # while it is there, enumerate keeps the chunk, and with it the base's values, beside the next
                    try:
                        result = function(job)
                    except BaseException as error:
                        errors.append(error)
                        return
                    if result is not None:
                        results[i] = result
                    if isinstance(job, Chunk):
                        with lock:
                            done += job.size
                        reporter.progress(done, total, "merging")

        if threads == 1:
            work()
        else:
            _in_threads(work, threads, errors)
        if errors:
            raise errors[0]
        return [results[i] for i in sorted(results)]

    return run


SERIAL = workers(1)
