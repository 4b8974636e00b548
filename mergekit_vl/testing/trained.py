"""Adapters, tuners and strategies, on the embedded CLIP and a few drawn images."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mergekit_vl.errors import Unsuitable, UserError
from mergekit_vl.merging.method import ClosedForm
from mergekit_vl.models.inputs import MergeInputs, TaskData
from mergekit_vl.models.model import Classes, HasMembers, Model, Single
from mergekit_vl.registry import contracts
from mergekit_vl.registry.plugins import registry
from mergekit_vl.strategies.base import trains
from mergekit_vl.testing import world
from mergekit_vl.testing.promises import Promises, begun, quick, require
from mergekit_vl.testing.weights import promise_weights

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.models.adapter import Adapter
    from mergekit_vl.strategies.base import Strategy
    from mergekit_vl.tuners.base import Tuner

LITTLE = {"epochs": 1, "batch": 6, "steps": 2, "warmup": 0}
"""Options of what trains, for a check."""


def check_adapter(adapter: Adapter) -> None:
    """Raise Violation unless an adapter of the embedded CLIP, over the classes of `world` where it has some, keeps its promises."""
    import torch

    cls, backbone = type(adapter), world.backbone()
    promises = Promises(cls)
    model, before = Single(backbone, adapter), snapshot([Single(backbone, adapter)])
    with promises("contract"):
        require(not (faults := contracts.faults(cls, "adapters")), "; ".join(faults))
    with promises("documented"):
        require(bool(cls.__doc__), "the class has no docstring")
    promise_logits(promises, model)
    with promises("other tensors"):
        moved = {name: tensor + 1 for name, tensor in adapter.tensors.items()}
        other = adapter.with_tensors(moved)
        require(all(torch.equal(other.tensors[name], moved[name]) for name in moved), "with_tensors lost some")
        require(
            bits(Single(backbone, adapter.with_tensors(adapter.tensors))) == bits(model),
            "its own tensors give other logits",
        )
    with promises("point before tuning"):
        start = adapter.untuned(backbone)
        require(
            {k: t.shape for k, t in start.tensors.items()} == {k: t.shape for k, t in adapter.tensors.items()}
            and start.space == adapter.space,
            "the untuned adapter has other names, shapes or another space",
        )
    with promises("aligned"):
        require(len(adapter.aligned([adapter, adapter])) == 2, "aligned gives another number of adapters")
    with promises("network"):
        _check_network(model)
    with promises("fits its backbone"):
        adapter.check(backbone)
        adapter.usage(backbone)
        adapter.whole(backbone)
    promise_saved(promises, model)
    with promises("inputs unchanged"):
        require(snapshot([model]) == before, "the adapter's tensors changed")
    promises.settle()


def _check_network(model: Single) -> None:
    """The network's logits at the adapter's own values are those of its head; nothing tuned has none."""
    import torch

    from mergekit_vl.models.evaluate import logits_of
    from mergekit_vl.models.views import eval_view

    part = world.task().train
    try:
        (network,) = model.adapter.networks(model.backbone, [world.CLASSES], training=False)
    except Unsuitable:
        require(not model.adapter.tensors, "has tensors, and no network")
        return
    encoder = model.encoders[0]
    if model.adapter.about.reads == "images":
        x = torch.stack([eval_view(part.source.load(i), encoder) for i in part.rows.tolist()])
    else:
        x = world.store().features(encoder, part)
    with torch.no_grad():
        logits = network(network.weights, network.prepare(x))
    expected = logits_of(model, world.CLASSES, part, world.store())[0]
    require(logits.shape == expected.shape, f"gives logits {tuple(logits.shape)} for {tuple(expected.shape)}")
    require(torch.allclose(logits, expected, rtol=1e-3, atol=1e-3), "gives other logits than the head")


def check_tuner(tuner: Tuner | type[Tuner], **given: object) -> Single:
    """Raise Violation unless a tuner keeps its promises; the model that it made. Of a class, options that make it long are set low."""
    promises = begun(tuner, "tuners")
    made: Any = None
    with promises("tunes"):
        tuner = quick(tuner, given, LITTLE) if isinstance(tuner, type) else tuner
        inputs = world.inputs()
        before = _data_of(inputs)
        made = tuner.tune(inputs)
        require(isinstance(made, Single), f"gives a {type(made).__name__}, not a Single")
        require(_data_of(inputs) == before, "the images or labels changed")
    if isinstance(made, Single):
        promise_logits(promises, made)
        promise_saved(promises, made)
        with promises("same seed, same bytes"):
            require(bits(cast("Tuner", tuner).tune(world.inputs())) == bits(made), "a second tuning gives other logits")
    promises.settle()
    single: Single = made  # else settling has raised
    return single


def check_strategy(strategy: Strategy | type[Strategy], **given: object) -> None:
    """Raise Violation unless a strategy keeps its promises; of a closed form, those on tensors alone too."""
    promises = begun(strategy, "strategies")
    made: Any = None
    with promises("merges"):
        made = quick(strategy, given, LITTLE) if isinstance(strategy, type) else strategy
        inputs, near = next(situations(made), (None, None))
        require(inputs is not None, "refuses one, two and three prompts and linear heads")
    if made is None or inputs is None or near is None:
        promises.settle()
        return
    before = snapshot([inputs.base, *inputs.tuned])
    merged = made.merge(inputs)
    with promises("inputs unchanged"):
        require(snapshot([inputs.base, *inputs.tuned]) == before, "a model's tensors changed")
    promise_logits(promises, merged)
    promise_saved(promises, merged)
    with promises("same seed, same bytes"):
        require(bits(made.merge(inputs)) == bits(merged), "a second merge gives other logits")
    if not trains(made):
        with promises("the base gives the base"):
            require(
                np.allclose(shares(made.merge(near)), shares(near.tuned[0]), atol=1e-4),
                "models that are all as before tuning give another model",
            )
    if isinstance(made, ClosedForm):
        promise_weights(promises, made)
    promises.settle()


def situations(strategy: Strategy) -> Iterator[tuple[MergeInputs, MergeInputs]]:
    """Inputs that the strategy takes, and the same with models as they were before tuning."""
    for several in (False, True):
        for make, n in [(make, n) for make in (world.prompts, world.heads) for n in (2, 1, 3)]:
            found, near = (_inputs(make(n, by), several) for by in (0.05, 0.0))
            try:
                strategy.merge(found)
            except Unsuitable:
                continue
            yield found, near


def _inputs(tuned: tuple[Single, ...], several: bool) -> MergeInputs:
    """`several`: each model is of a task of its own, told from the others by its template."""
    inputs = world.inputs(tuned)
    if not several:
        return inputs
    templates = ("a photo of a {}.", "a {}.", "the {}.")
    tasks = [TaskData(Classes(world.CLASSES.names, (t,)), d.train, d.val) for t, d in zip(templates, inputs.data)]
    return dataclasses.replace(inputs, data=tuple(tasks))


def promise_logits(promises: Promises, model: Model) -> None:
    """[B, K] for its own classes and for late ones, or a refusal of these that names what to do."""
    import torch

    with promises("logits [B, K]"):
        found = logits(model, world.CLASSES)
        require(found.shape == (6, 3), f"logits are {tuple(found.shape)} for 6 images and 3 classes")
        require(bool(torch.isfinite(found).all()), "logits are not finite")
    with promises("late names"):
        try:
            late = logits(model, world.LATE)
        except UserError as error:
            require(bool(error.hint), f"refuses late names without a hint: {error}")
        else:
            require(late.shape == (6, 2), f"logits are {tuple(late.shape)} for 6 images and 2 late names")


def promise_saved(promises: Promises, model: Model) -> None:
    from mergekit_vl.storage import model_files

    with promises("saved and loaded"), tempfile.TemporaryDirectory() as folder:
        require(model_files.can_save(model), f"a {type(model).__name__} has no file")
        model_files.save(model, Path(folder), "model")
        again = model_files.load(Path(folder), "model", world.backbone(), _classes_of(model))
        require(again is not None and bits(again) == bits(model), "what is loaded gives other logits")


def _classes_of(model: Model) -> Callable[[str], Any]:
    """Adapters by name: those that are registered, else that of the model itself."""
    known = registry().entries["adapters"]
    return lambda name: known[name].resolve() if name in known else type(next(_singles(model)).adapter)


def _singles(model: Model) -> Iterator[Single]:
    if isinstance(model, Single):
        yield model
    for member in model.members if isinstance(model, HasMembers) else ():
        yield from _singles(member)


def logits(model: Model, classes: Classes) -> Tensor:
    """[6, K] of the task's validation images."""
    from mergekit_vl.models.evaluate import logits_of

    return logits_of(model, classes, world.dataset().val, world.store())[0]


def bits(model: Model) -> bytes:
    return logits(model, world.CLASSES).contiguous().numpy().tobytes()


def shares(model: Model) -> np.ndarray:
    """Probabilities: logits and log-probabilities are compared alike."""
    return logits(model, world.CLASSES).softmax(-1).numpy()


def snapshot(models: list[Model]) -> list[bytes]:
    tensors = [t for model in models for single in _singles(model) for t in single.adapter.tensors.values()]
    return [tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in tensors]


def _data_of(inputs: MergeInputs) -> list[bytes]:
    return [
        array.tobytes()
        for data in inputs.data
        for part in (data.train, data.val)
        if part is not None
        for array in (part.rows, part.labels)
    ]
