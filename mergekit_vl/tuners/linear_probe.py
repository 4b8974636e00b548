"""Linear probing: a head on cached features of a frozen image tower (Radford et al. 2021, arXiv 2103.00020, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from mergekit_vl.adapters.head_network import HeadNetwork, matrix, mean_square
from mergekit_vl.adapters.linear_head import LinearHead, Unseen
from mergekit_vl.datasets.base import Augment
from mergekit_vl.models.evaluate import evaluate
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.models.model import ImageEncoder, Single
from mergekit_vl.options import check, option
from mergekit_vl.tuners.head import Init, start_head
from mergekit_vl.tuners.sgd import Schedule, cross_entropy, sgd

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
NO_VALIDATION = 1e-2


@dataclass(frozen=True)
class LinearProbe:
    """Multinomial logistic regression with a penalty l2 / 2 * u * |w - w_start|^2, w = [weight, bias], u the mean squared feature norm.

    CLIP's protocol pulls towards 0 and searches the strength on validation images; here the pull is towards the start (L2-SP, Li et
    al. 2018), which for `init=random` is almost the same, and for zero-shot or class means is what keeps what was known. Without
    l2 it is chosen among seven powers of ten by accuracy on validation, the stronger one where they tie; without validation images
    it is 0.01. L-BFGS runs to the optimum (the problem is convex); SGD is there for many images and for comparison.
    """

    init: Init | None = option(
        None, "zero_shot, class_mean, random, own; none: zero_shot, class_mean without a text tower"
    )
    solver: Literal["lbfgs", "sgd"] = option("lbfgs", "full batch to the optimum, or minibatches")
    l2: float | None = option(
        None, "pull towards the start, in units of the mean squared feature norm; none: by validation"
    )
    views: int = option(0, "augmented views of each image to train on; 0: the test view alone")
    epochs: int = option(50, "passes over the shots (sgd)")
    batch: int = option(128, "images a step (sgd)")
    lr: float = option(1.0, "cosine by epoch, in units of 1 / mean squared feature norm (sgd)")
    crop: float = option(0.5, "smallest share of the area that RandomResizedCrop takes (views)")
    flip: bool = option(True, "flip half of the images (views)")
    unseen: Unseen = option("refuse", "other class names: refuse, or zero_shot rows")

    def __post_init__(self) -> None:
        l2, views = self.l2 is None or self.l2 >= 0, self.views >= 0
        check(self, where="tuner linear_probe", l2=(l2, "0 or more"), views=(views, "0 or more"))

    def tune(self, inputs: MergeInputs) -> Single:
        return Single(inputs.base.backbone, self.fitted(inputs))

    def fitted(self, inputs: MergeInputs) -> LinearHead:
        import torch

        backbone, data = inputs.base.backbone, inputs.data[0]
        start = start_head(backbone, inputs, self.init, self.unseen)
        path = ImageEncoder(backbone)
        if self.views:
            augment = Augment(self.crop, self.flip)
            views = inputs.features.views(path, data.train, epochs=self.views, seed=inputs.seed, augment=augment)
        else:
            views = inputs.features.features(path, data.train)[None]
        labels = torch.from_numpy(data.train.labels)
        if self.l2 is not None or data.val is None or not len(data.val):
            head = self._fit(start, start, NO_VALIDATION if self.l2 is None else self.l2, views, labels, inputs)
            inputs.reporter.progress(1, 1, "linear_probe")
            return head
        best, score, head = start, -1.0, start
        for i, l2 in enumerate(GRID):
            head = self._fit(head if self.solver == "lbfgs" else start, start, l2, views, labels, inputs)
            inputs.reporter.progress(i + 1, len(GRID), "linear_probe")
            accuracy = evaluate(Single(backbone, head), data.classes, data.val, inputs.features)[0].acc1
            if accuracy > score:
                best, score = replace(head, chosen={"l2": l2}), accuracy
        return best

    def _fit(
        self, warm: LinearHead, start: LinearHead, l2: float, views: Tensor, labels: Tensor, inputs: MergeInputs
    ) -> LinearHead:
        network = HeadNetwork(start, inputs.data[0].classes)
        x, w0 = network.prepare(views), matrix(start.tensors)
        labels = labels.to(x.device)
        if self.solver == "lbfgs":
            w = lbfgs(matrix(warm.tensors), w0, x.flatten(0, 1), labels.repeat(len(views)), l2).to(w0)
            return network.adapter({"w": w})
        unit = network.unit(x)
        leaves = {name: tensor.clone().requires_grad_(True) for name, tensor in network.leaves.items()}
        schedule = Schedule(self.epochs, self.batch, self.lr, weight_decay=0.0)
        for step in sgd(leaves, x, labels, schedule, inputs, what="linear_probe", unit=unit):
            with step:
                step.minimise(cross_entropy(step.x @ step.weights["w"].T, step.labels))
                step.minimise(l2 / 2 * unit * (step.weights["w"] - w0).square().sum())
        return network.adapter(leaves)


def lbfgs(
    warm: Float[Tensor, "K D1"],
    w0: Float[Tensor, "K D1"],
    x: Float[Tensor, "N D1"],
    labels: Int[Tensor, " N"],
    l2: float,
) -> Float[Tensor, "K D1"]:
    """argmin_w CE(x w^T, labels) + l2 / 2 * mean |x|^2 * |w - w0|^2, in float64, from `warm`; all [K, D + 1]."""
    import torch
    import torch.nn.functional as F

    x, w0, w = x.double(), w0.double(), warm.double().clone().requires_grad_(True)
    unit = mean_square(x)
    optimizer = torch.optim.LBFGS(
        [w], lr=1, max_iter=1000, tolerance_grad=1e-7 * float(unit.sqrt()), tolerance_change=1e-12, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ w.T, labels) + l2 / 2 * unit * (w - w0).square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return w.detach()
