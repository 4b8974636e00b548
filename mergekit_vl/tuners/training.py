"""A training of any adapter on a few images: its network, its inputs, and the loop that suits what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_vl.models.model import Single
from mergekit_vl.tuners.sgd import Schedule, Step, Warmup, sgd

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.datasets.base import Augment
    from mergekit_vl.models.adapter import Adapter, Network
    from mergekit_vl.models.inputs import MergeInputs
    from mergekit_vl.tuners.adamw import AdamWStep


@dataclass(frozen=True)
class Training:
    """Iterate it once: each item is a step whose block says what is minimised. Then `adapter()` is what was trained."""

    network: Network[Adapter]
    x: Tensor | None
    """Prepared inputs [E, N, ...] where features are read; None where images are, which are loaded as they are needed."""
    steps: Iterator[Step | AdamWStep]
    adapter: Callable[[], Adapter]

    def __iter__(self) -> Iterator[Step | AdamWStep]:
        return self.steps


def train(
    start: Single,
    inputs: MergeInputs,
    *,
    what: str,
    epochs: int,
    batch: int,
    augment: Augment,
    lr: float | None = None,
    views: int = 0,
    accumulate: int = 1,
    warmup: Warmup = "constant",
    longest: float | None = None,
) -> Training:
    """Training of the model `start` on the first task of `inputs`; lr and weight decay are the adapter's own where none is given.

    `views` are augmented views of each image for adapters that do not see a fresh one in every epoch; 0: the test view alone.
    `accumulate` batches make one step where images are read. `warmup` and `longest` are of SGD (`Schedule`).
    """
    import torch

    about, data = start.adapter.about, inputs.data[0]
    (network,) = start.adapter.networks(start.backbone, [data.classes], training=True)
    lr = about.lr if lr is None else lr
    if about.reads == "images":
        from mergekit_vl.tuners.adamw import AdamWSchedule, AdamWTraining

        schedule = AdamWSchedule(epochs, batch, lr, about.weight_decay, accumulate=accumulate)
        loop = AdamWTraining(start.backbone, network, schedule)
        return Training(network, None, loop.steps(inputs, augment, what=what), loop.chosen)
    path = start.encoders[0]
    if about.fresh_views or views:
        count = epochs if about.fresh_views else views
        features = inputs.features.views(path, data.train, epochs=count, seed=inputs.seed, augment=augment)
    else:
        features = inputs.features.features(path, data.train)[None]
    x = network.prepare(features)
    weights = {name: tensor.detach().clone().requires_grad_(True) for name, tensor in network.leaves.items()}
    steps = sgd(
        weights,
        x,
        torch.from_numpy(data.train.labels).to(x.device),
        Schedule(epochs, batch, lr, weight_decay=about.weight_decay, warmup=warmup, longest=longest),
        inputs,
        what=what,
        unit=network.unit(x),
    )
    return Training(network, x, steps, lambda: network.adapter(weights))
