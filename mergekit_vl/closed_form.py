"""Closed-form methods: written once, tensor by tensor, for merges in memory and for merges of files.

A method is a frozen dataclass with

    form            what a piece is: "accumulating" and "elementwise" take flat chunks (the first reads model by model and its memory
                    does not grow with their number), "rows" whole slices along the first axis, "tensor" whole tensors
    averages        True where it is a weighted mean of the models; otherwise BatchNorm statistics take the plain mean of the tuned ones
    held(n)         how many arrays of a piece it holds at most for n tuned models, its results included
    whole(t, n)     optional, for the form "tensor": that number for the tensor t, or 0 for one that it takes in flat chunks after all
    svds(n)         beside it: how many SVDs of such a tensor it takes, for the time that `check` tells
    check(models)   raises UserError for options that do not fit the models; reads no tensor
    passes          optional: over the files before that of the merge, for the time that `check` tells
    ignores_base(n) optional: True where a base gives nothing but integer tensors to the merge of n tuned models
    by_task         optional: True where a method that makes a model for each task is not told which (`weights.merge_by_task`)
    survey(...)     optional: what must be known of all tensors before the first is merged (`surveys.py`); further passes over the files
    merge_piece     the method itself

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

from mergekit_vl.dtypes import Array
from mergekit_vl.errors import Failed
from mergekit_vl.pieces import Models, Piece, Run
from mergekit_vl.plugin_calls import calling, is_plugins, named

FORMS = ("accumulating", "elementwise", "rows", "tensor")
BATCH_NORM = re.compile(r"(^|\.)running_(mean|var)$")


class ClosedForm(Protocol):
    form: Literal["accumulating", "elementwise", "rows", "tensor"]
    averages: bool

    def held(self, n: int) -> int: ...
    def check(self, models: Models) -> None: ...
    def merge_piece(self, piece: Piece, facts: Any) -> Array: ...


def checked(method: ClosedForm, models: Models) -> None:
    """Raise UserError for a method that is no closed form, or whose options do not fit the models."""
    needed = ("form", "averages", "held", "check", "merge_piece")
    if missing := [name for name in needed if not hasattr(method, name)]:
        raise Failed(f"has no {missing[0]}", where=named(method), mend="see docs/plugins.md")
    with calling(method, "form"):
        form = method.form
    with calling(method, "held"):
        held = method.held(len(models.tuned))
    if form not in FORMS or not isinstance(held, int) or held < 1:
        wrong = f"form={form!r}" if form not in FORMS else f"held gives {held!r}"
        mend = f"one of {', '.join(FORMS)}" if form not in FORMS else "a number of arrays"
        raise Failed(wrong, where=named(method), mend=mend)
    with calling(method, "check"):
        method.check(models)


def apply(method: ClosedForm, models: Models, write: Callable[[Piece, Array], None], run: Run, chunk: int) -> None:
    """Merge every tensor of `models`, piece by piece, into `write`."""
    checked(method, models)
    if not method.averages:
        statistics = replace(models, tensors=tuple(t for t in models.tensors if BATCH_NORM.search(t.name)))
        run(lambda piece: write(piece, _finite(piece, _mean(piece))), statistics.pieces("accumulating", chunk))
        models = replace(models, tensors=tuple(t for t in models.tensors if not BATCH_NORM.search(t.name)))
    with np.errstate(all="ignore"):
        survey = getattr(method, "survey", None)
        with calling(method, "survey"):
            facts = survey(models, run, chunk) if survey else None
    pieces = models.pieces(method.form, chunk, whole=getattr(method, "whole", None))
    with one_blas_thread() if hasattr(method, "svds") else nullcontext():
        run(lambda piece: write(piece, _merged(method, piece, facts)), pieces)


def _merged(method: ClosedForm, piece: Piece, facts: Any) -> Array:
    """What the method makes of a piece; raises UserError unless it is finite floats, one for each element."""
    what, shape = f"merge_piece of {piece.tensor.name}", piece.tensor.shape
    where = f"{named(method)}: {what}"
    with calling(method, what):
        merged = method.merge_piece(piece, facts)
    if not isinstance(merged, np.ndarray):
        raise Failed(f"gave no array but a {type(merged).__name__}", where=where)
    as_it_is = merged.ndim == len(shape) and merged.shape[1:] == shape[1:]
    if merged.size != piece.size or not (merged.ndim == 1 or as_it_is):
        raise Failed(f"gave an array of shape {merged.shape} for {piece.size} elements", where=where)
    if merged.dtype.kind != "f" or merged.dtype.itemsize < piece.tensor.wide.itemsize:
        raise Failed(f"gave an array of {merged.dtype}, not of {piece.tensor.wide}", where=where)
    return _finite(piece, merged, where if is_plugins(method) else "")


def one_blas_thread() -> AbstractContextManager[Any]:
    """One thread for each of numpy's matrix products and SVDs: last bits would depend on their number, and several workers, each with a
    team of threads of its own, would fight for the cores.
    """
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


def _mean(piece: Piece) -> Array:
    total = piece.tuned(0)
    for i in range(1, len(piece.models.tuned)):
        total += piece.tuned(i)
    total /= len(piece.models.tuned)
    return total


def _finite(piece: Piece, merged: Array, where: str = "") -> Array:
    """The merged values; raises UserError that names the model, or `where`, if one of them is not finite."""
    if np.isfinite(merged).all():
        return merged
    for label, source in zip(piece.models.member_labels, piece.models.members):
        if not np.isfinite(piece.read(source)).all():
            raise Failed(
                f"{piece.tensor.name} has values that are not finite", where=label, mend="it was damaged while training"
            )
    if where:
        raise Failed("gave values that are not finite", where=where)
    raise Failed(f"{piece.tensor.name} overflows when it is merged", mend="use smaller weights")


def workers(threads: int, progress: Callable[[int], None] = lambda elements: None) -> Run:
    """`run(function, jobs)` over this many threads: results in the order of the jobs, the first error stops the rest.

    numpy lets the interpreter go during its loops and file reads, so threads work in parallel. A progress call tells the elements
    of a finished piece.
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
            except BaseException as interrupt:  # Ctrl-C reaches this thread only: the others stop after their piece
                errors.append(interrupt)
                for thread in team:
                    if thread.ident:
                        thread.join()
        if errors:
            raise errors[0]
        return [results[i] for i in sorted(results)]

    return run


SERIAL = workers(1)
