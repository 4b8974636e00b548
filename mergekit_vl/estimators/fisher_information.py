"""What images tell of a model's weights: its answers as a function of them, and the diagonal Fisher information.

That is the mean of squared gradients of log p(y | x) over images x, with labels y from the model's own predictions (Martens 2020,
arXiv 1412.1193, section 9): how much its answers depend on each weight. Where the logits are known in closed form the mean over labels
is taken exactly, else one label is drawn per image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from mergekit_vl.errors import Unsuitable, UserError
from mergekit_vl.models.model import ImageEncoder
from mergekit_vl.tuners.context import encoder
from mergekit_vl.tuners.head import inputs_of, matrix

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergekit_vl.datasets.base import Split
    from mergekit_vl.models.inputs import MergeInputs, TaskData
    from mergekit_vl.models.model import Classes, Single

    Weights = Mapping[str, Tensor]
    Predict = Callable[[Weights, Sequence[int]], Tensor]
    """(weights by name, rows of the images [B]) -> logits [B, K]."""


def of_model(model: Single, data: TaskData, inputs: MergeInputs, images: int) -> dict[str, Tensor]:
    """Of a prompt, a linear head or a tower at its own weights, by their names, on its training images.

    `images` is how many at most are taken where each costs a backward (prompts, towers). Of a tower there is none for running statistics
    and for a text tower, which these images do not move.
    """
    measure = {"ctx": _by_sampling, "head": _of_linear_head, "tower": _by_sampling}.get(model.adapter.space)
    if measure is None:
        raise UserError(
            f"no Fisher information of the space {model.adapter.space}", hint="tune a prompt, a head or a tower"
        )
    return measure(model, data, inputs, images)


def some(inputs: MergeInputs, n: int, at_most: int) -> Tensor:
    """Which of n images are taken."""
    import torch

    return torch.randperm(n, generator=torch.Generator().manual_seed(inputs.seed + 3))[:at_most]


def _labels(inputs: MergeInputs) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(inputs.seed + 2)


def _by_sampling(model: Single, data: TaskData, inputs: MergeInputs, images: int) -> dict[str, Tensor]:
    weights, (predict,) = predictors(model, [(data.classes, data.train)], inputs)
    rows = some(inputs, len(data.train), images).tolist()

    def log_p(weights: Weights, i: int) -> Tensor:
        inputs.progress(i + 1, len(rows), "Fisher information")
        return predict(weights, rows[i : i + 1])[0].log_softmax(-1)

    return by_sampling(log_p, weights, len(rows), _labels(inputs))


def _of_linear_head(model: Single, data: TaskData, inputs: MergeInputs, images: int) -> dict[str, Tensor]:
    head = model.adapter
    w = matrix(head)  # type: ignore[arg-type]
    x = inputs_of(head, inputs.features.features(ImageEncoder(model.backbone), data.train).to(w.device))  # type: ignore[arg-type]
    fisher = of_head(w, x)
    return {"weight": fisher[:, :-1], "bias": fisher[:, -1]}


def predictors(
    model: Single, tasks: Sequence[tuple[Classes, Split]], inputs: MergeInputs
) -> tuple[Weights, list[Predict]]:
    """The weights of a prompt, a linear head or an image tower that its answers depend on, and for each task the logits of its
    images (test views) as a function of such weights. A tower is in evaluation mode, and one for all tasks.
    """
    make = {"ctx": _of_contexts, "head": _of_heads, "tower": _of_towers}.get(model.adapter.space)
    if make is None:
        raise Unsuitable(
            f"answers of the space {model.adapter.space} do not depend on weights",
            hint="tune a prompt, a head or a tower",
        )
    return make(model, tasks, inputs)


def _of_contexts(model, tasks, inputs) -> tuple[Weights, list[Predict]]:
    import torch.nn.functional as F

    backbone = model.backbone

    def of_task(classes: Classes, images: Split) -> Predict:
        x = F.normalize(inputs.features.features(ImageEncoder(backbone), images).to(backbone.device), dim=-1)
        encode = encoder(backbone, classes, model.adapter)
        return lambda weights, rows: backbone.scale * x[rows] @ F.normalize(encode(weights["ctx"]), dim=-1).T

    return model.adapter.tensors, [of_task(*task) for task in tasks]


def _of_heads(model, tasks, inputs) -> tuple[Weights, list[Predict]]:
    head = model.adapter

    def of_task(classes: Classes, images: Split) -> Predict:
        x = inputs_of(head, inputs.features.features(ImageEncoder(model.backbone), images).to(head.weight.device))[
            :, :-1
        ]
        rows_of = head.rows(classes)
        return lambda weights, rows: x[rows] @ weights["weight"][rows_of].T + weights["bias"][rows_of]

    return head.tensors, [of_task(*task) for task in tasks]


def _of_towers(model, tasks, inputs) -> tuple[Weights, list[Predict]]:
    from mergekit_vl.models.views import prefetched, test_view
    from mergekit_vl.tuners.tower import Forward

    path = ImageEncoder(model.backbone)
    forward = Forward(model.backbone, model.adapter, tasks[0][0])
    forward.image.eval()

    def of_task(classes: Classes, images: Split) -> Predict:
        of_classes = forward.of(classes)

        def predict(weights: Weights, rows: Sequence[int]) -> Tensor:
            def view(i: int) -> Tensor:
                return test_view(images.source.load(int(images.rows[rows[i]])), path)

            batch = next(prefetched(view, len(rows), len(rows)))
            return of_classes(weights, batch.to(model.backbone.device))

        return predict

    return forward.weights, [of_task(*task) for task in tasks]


def of_head(w: Tensor, x: Tensor) -> Tensor:
    """Of a head w [K, D + 1] that reads x [N, D + 1]: mean_i p_ik (1 - p_ik) x_id^2."""
    p = (x @ w.T).softmax(-1)
    return (p * (1 - p)).T @ x.square() / len(x)


def of_text_features(text: Tensor, images: Tensor, scale: Tensor) -> Tensor:
    """Of raw text features [K, D], logits scale x . t / |t| of normalised images [N, D]."""
    import torch.nn.functional as F

    unit = F.normalize(text, dim=-1)
    cosines = images @ unit.T  # [N, K]
    p = (scale * cosines).softmax(-1)
    q = p * (1 - p)
    # d logit_k / d t_k = scale (x - cos t_hat) / |t|, squared and summed with weights q
    squares = (
        q.T @ images.square()
        - 2 * (q * cosines).T @ images * unit
        + (q * cosines.square()).sum(0)[:, None] * unit.square()
    )
    return squares.clamp_min(0) * (scale / text.norm(dim=-1, keepdim=True)).square() / len(images)


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
