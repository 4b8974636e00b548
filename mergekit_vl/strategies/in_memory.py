"""Closed forms on adapters in memory: `endpoints` aligns the models, the engine merges their tensors, `as_model` makes the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array, Narrowing
from mergekit_vl.errors import Unsuitable, UserError
from mergekit_vl.merging.chunks import CHUNK_SIZE, Arrays, Chunk, Models, Tensor
from mergekit_vl.merging.coefficients import Coefficient, depths
from mergekit_vl.merging.engine import BATCH_NORM, SERIAL, apply, workers
from mergekit_vl.merging.method import as_closed_form
from mergekit_vl.options import Options, option
from mergekit_vl.system.memory import threads_available

if TYPE_CHECKING:
    from torch import Tensor as TorchTensor

    from mergekit_vl.models.inputs import MergeInputs
    from mergekit_vl.models.model import Model, Single

    Tensors = Mapping[str, TorchTensor]

MATRICES = 4
"""Tensors that are decomposed at the same time; each needs several arrays of its size."""


def check_aligned(models: Sequence[Tensors], names: Sequence[str]) -> None:
    """Raise UserError with the first three tensors that differ in name or shape."""
    first = models[0]
    for name, other in zip(names[1:], models[1:]):
        differing = []
        for key in sorted(first.keys() | other.keys()):
            shapes = [tuple(m[key].shape) if key in m else "missing" for m in (first, other)]
            if shapes[0] != shapes[1]:
                differing.append(f"{key}: {shapes[0]} against {shapes[1]}")
        if differing:
            raise Unsuitable(
                f"{names[0]} and {name} differ in {'; '.join(differing[:3])}",
                hint="merge models of one architecture and one adapter",
            )


Space = Literal["weights", "classifiers"]


def space_option() -> Any:
    return option(
        "weights",
        "merge the tensors, or the classifiers that they make (`run` only)",
        values_formerly={"own": "weights", "features": "classifiers"},
    )


def check_space(where: str, space: Space) -> None:
    """Raise UserError for a merge of tensors that was asked for in the space of classifiers."""
    if space != "weights":
        raise UserError(f"space={space} merges classifiers, not tensors", where=where, hint="use `mergekit-vl run`")


def check_numbers(where: str, given: Sequence[Coefficient], what: str) -> tuple[float, ...]:
    """Coefficients of classifiers; raises UserError for one by depth or by name, which are of tensors."""
    numbers = tuple(value for value in given if isinstance(value, float))
    if len(numbers) < len(given):
        raise UserError(
            f"{what} by depth or by name in the space of classifiers",
            where=where,
            hint="give numbers, or set space=weights",
        )
    return numbers


def merge_adapters(method: object, inputs: MergeInputs) -> Single:
    """The `merge` of every closed form: it merges the adapters' tensors chunk by chunk. Raises Failed if `method` is not a closed form."""
    closed = as_closed_form(method)
    base, tuned = endpoints(inputs)
    models = [{name: _array(t) for name, t in m.adapter.tensors.items()} for m in (base, *tuned)]
    deep = depths(models[0])
    tensors = tuple(
        Tensor(
            name,
            array.shape,
            deep[name],
            np.dtype(np.float64 if any(m[name][1] == "F64" for m in models) else np.float32),
        )
        for name, (array, _) in models[0].items()
    )
    out = {name: (np.empty(array.shape, array.dtype), code) for name, (array, code) in models[0].items()}

    narrowing = Narrowing()

    def write(chunk: Chunk, merged: Array) -> None:
        array, code = out[chunk.tensor.name]
        array.reshape(-1)[chunk.start : chunk.stop] = narrowing(chunk.tensor.name, merged, code)

    labels = tuple(f"tuned.{i}" for i in range(len(tuned)))
    sources = [Arrays(m) for m in models]
    given = Models(sources[0], tuple(sources[1:]), tensors, labels, inputs.seed, device=inputs.device)
    svds = inputs.device == "cpu" and closed.describe(len(tuned)).svds  # small chunks are not worth a team of threads
    apply(closed, given, write, workers(min(MATRICES, threads_available())) if svds else SERIAL, CHUNK_SIZE)
    narrowing.check("use smaller weights, or models in {dtype}")
    merged = {name: _tensor(*out[name], like=tensor) for name, tensor in base.adapter.tensors.items()}
    return as_model(base, merged, inputs)


class ForTask(Options, Protocol):
    """A closed form for one task."""

    @property
    def task(self) -> str | int | None: ...


def merge_by_task(method: ForTask, inputs: MergeInputs) -> Model:
    """The `merge` of a closed form with one model per task: a `ByTask` of all of them, or the model of its option `task`."""
    from mergekit_vl.models.by_task import ByTask, check_tasks

    if method.task is not None:
        return merge_adapters(method, inputs)
    tasks = tuple(data.classes for data in inputs.data)
    check_tasks(tasks)
    return ByTask(tuple(merge_adapters(replace(method, task=i), inputs) for i in range(len(inputs.tuned))), tasks)


def _array(tensor: TorchTensor) -> tuple[Array, str]:
    """A torch tensor as a stored array with its dtype code."""
    import torch

    codes = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    if tensor.dtype not in codes:
        raise Unsuitable(f"an adapter of {tensor.dtype} cannot be merged", hint="convert it to float32")
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy(), codes[tensor.dtype]


def _tensor(array: Array, code: str, *, like: TorchTensor) -> TorchTensor:
    import torch

    tensor = torch.from_numpy(array)
    return (tensor.view(torch.bfloat16) if code == "BF16" else tensor).to(like.device)


def endpoints(inputs: MergeInputs) -> tuple[Single, tuple[Single, ...]]:
    """The model before tuning and the tuned models, as adapters of one kind with aligned tensors; raises Unsuitable for other models."""
    from mergekit_vl.models.model import Single

    if not inputs.tuned:
        raise Unsuitable("there is no fine-tuned model to merge", hint="name at least one under `tuned`")
    given: list[Single] = []
    for model in inputs.tuned:
        if not isinstance(model, Single):
            raise Unsuitable(
                f"a {type(model).__name__.lower()} has no tensors of its own to merge", hint="merge its members"
            )
        given.append(model)
    spaces = [m.adapter.space for m in given]
    if len(set(spaces)) > 1:
        raise Unsuitable(
            f"models of different spaces cannot be merged: {', '.join(spaces)}",
            hint="merge with space=classifiers, or ensemble them",
        )
    aligned = given[0].adapter.aligned([m.adapter for m in given])
    tuned = tuple(m if a is m.adapter else Single(m.backbone, a) for m, a in zip(given, aligned))
    first = tuned[0]
    start = first.adapter.untuned(first.backbone)
    check_aligned(
        [start.tensors, *(m.adapter.tensors for m in tuned)], ["zero-shot", *(f"tuned.{i}" for i in range(len(tuned)))]
    )
    return Single(first.backbone, start), tuned


def as_model(like: Model, tensors: Tensors, inputs: MergeInputs | None = None) -> Single:
    """A model like `like`, with other tensors.

    Where these hold BatchNorm's running statistics and `inputs` have images, the statistics are estimated again
    (`batch_norm.py`); not of one of the models that were merged, which has its own.
    """
    from mergekit_vl.models.model import Single

    assert isinstance(like, Single)
    model = Single(like.backbone, like.adapter.with_tensors(tensors))
    if inputs is None or inputs.batch_norm == "mean" or not inputs.data:
        return model
    if like.adapter.about.reads != "images" or not any(BATCH_NORM.search(name) for name in tensors):
        return model
    for member in (like, *inputs.tuned):
        own = member.adapter.tensors if isinstance(member, Single) else {}
        if own and all(tensors[name].equal(tensor) for name, tensor in own.items()):
            return model
    from mergekit_vl.estimators.batch_norm import estimated

    return estimated(model, inputs)
