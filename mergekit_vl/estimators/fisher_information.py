"""The diagonal Fisher information of a model's weights on images.

It is the mean of squared gradients of log p(y | x) over images x, with labels y from the model's own predictions (Martens 2020,
arXiv 1412.1193, section 9): how much its predictions depend on each weight. Where the logits are known in closed form the mean over labels
is taken exactly, else one label is drawn per image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from mergekit_vl.models.model import ImageEncoder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergekit_vl.datasets.base import Split
    from mergekit_vl.models.adapter import Adapter, Network
    from mergekit_vl.models.inputs import MergeInputs, TaskData
    from mergekit_vl.models.model import Classes, Single

    Weights = Mapping[str, Tensor]
    Predict = Callable[[Weights, Sequence[int]], Tensor]
    """(weights by name, rows of the images [B]) -> logits [B, K]."""


def of_model(model: Single, data: TaskData, inputs: MergeInputs, images: int) -> Weights:
    """Of an adapter at its own weights, by their names, on its training images.

    `images` is how many at most are taken where each costs a backward (`about.exact_fisher` is not set). Of a tower there is none for
    running statistics and for a text tower, which these images do not move.
    """
    if model.adapter.about.exact_fisher:
        (network,) = model.adapter.networks(model.backbone, [data.classes], training=False)
        exact = network.fisher(network.prepare(inputs.features.features(model.encoders[0], data.train)))
        assert exact is not None, f"{model.adapter.about.one} says that its Fisher information is known in closed form"
        return exact
    weights, (predict,) = predictors(model, [(data.classes, data.train)], inputs)
    rows = some(inputs, len(data.train), images).tolist()

    def log_p(weights: Weights, i: int) -> Tensor:
        inputs.reporter.progress(i + 1, len(rows), "Fisher information")
        return predict(weights, rows[i : i + 1])[0].log_softmax(-1)

    return by_sampling(log_p, weights, len(rows), _labels(inputs))


def some(inputs: MergeInputs, n: int, at_most: int) -> Tensor:
    """Which of n images are taken."""
    import torch

    return torch.randperm(n, generator=torch.Generator().manual_seed(inputs.seed + 3))[:at_most]


def _labels(inputs: MergeInputs) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(inputs.seed + 2)


def predictors(
    model: Single, tasks: Sequence[tuple[Classes, Split]], inputs: MergeInputs
) -> tuple[Weights, list[Predict]]:
    """The weights of an adapter that its answers depend on, and for each task the logits of its images (test views) as a function of
    such weights. What reads images is in evaluation mode.
    """
    networks = model.adapter.networks(model.backbone, [classes for classes, _ in tasks], training=False)

    def of_features(network: Network[Adapter], images: Split) -> Predict:
        x = network.prepare(inputs.features.features(model.encoders[0], images))
        return lambda weights, rows: network(weights, x[rows])

    def of_images(network: Network[Adapter], images: Split) -> Predict:
        from mergekit_vl.models.views import eval_view, prefetched

        path = ImageEncoder(model.backbone)

        def predict(weights: Weights, rows: Sequence[int]) -> Tensor:
            def view(i: int) -> Tensor:
                return eval_view(images.source.load(int(images.rows[rows[i]])), path)

            return network(weights, network.prepare(next(prefetched(view, len(rows), len(rows)))))

        return predict

    of_task = of_images if model.adapter.about.reads == "images" else of_features
    return networks[0].weights, [of_task(network, images) for network, (_, images) in zip(networks, tasks)]


def by_sampling(
    log_p: Callable[[Mapping[str, Tensor], int], Tensor], at: Mapping[str, Tensor], n: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Of any weights: log_p(weights, i) gives the log-probabilities [K] of image i; one backward per image."""
    import torch

    leaves = {name: tensor.detach().clone().requires_grad_(True) for name, tensor in at.items()}
    total = {name: torch.zeros_like(tensor) for name, tensor in at.items()}
    for i in range(n):
        logs = log_p(leaves, i)
        label = int(torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator))
        gradients = torch.autograd.grad(logs[label], list(leaves.values()), allow_unused=True)
        for name, gradient in zip(total, gradients):
            if gradient is not None:
                total[name] += gradient.square()
    return {name: tensor / n for name, tensor in total.items()}
