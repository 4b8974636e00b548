"""MergeTune: continued fine-tuning under linear mode connectivity (arXiv 2601.10497).

Between the zero-shot model w1 and the fine-tuned w2, search a w that has a low-loss straight path to both:

    L(w) = CE(w) + beta * mean_alpha CE(w2 + alpha (w - w2)) + lambda * S(w, w1),     w starts at (1 - tau) w1 + tau w2

The last term stands for the path to w1, for which there are no pretraining data: near w1, a minimum of the pretraining
loss, its Taylor expansion is 1/2 (w - w1)^T H (w - w1), and an isotropic H makes that a squared distance.

What "w" means for a prompt:

| path     | surrogate | space of w, w1, w2 in the two path terms   | S                                          | w1 in S                 |
|----------|-----------|--------------------------------------------|--------------------------------------------|-------------------------|
| features | cosine    | raw text features [K, D]                   | mean over K of 1 - cos                     | `anchor` text features  |
| features | l2        | raw text features [K, D]                   | mean over K of the squared distance, raw   | `anchor` text features  |
| weights  | cosine    | context vectors [M, W]                     | mean over M of 1 - cos                     | initial words' context  |
| weights  | l2        | context vectors [M, W]                     | sum over M, W of squared differences       | initial words' context  |

`tau` mixes context vectors in every row, w1 being the embeddings of the initial words. Interpolated features are
normalised after the interpolation, as the classifier does. `anchor=template` compares with the features of the dataset's
hand-written template, `anchor=context` with those of the initial words. In `features` a step is one text forward of K
texts; in `weights` it is one of (1 + N_alpha) K texts, since every point of that path is another context. A context per
class, [K, M, W], works alike, its rows being K M.

Paper and released code differ (the paper's values are known to us second-hand): lambda 8, beta 0.5, tau 0.3, 50 epochs in
the paper; lambda 10 or 8, beta 1, no tau (start at w2, that is tau=1) and 100 epochs in the code. The defaults are the
paper's; path `features` with surrogate `cosine` and the fixed grid of alphas is what the code does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mergekit_vl.data import Augment
from mergekit_vl.errors import UserError
from mergekit_vl.model import Model, Single
from mergekit_vl.options import option
from mergekit_vl.strategies.wise_ft import WiseFT
from mergekit_vl.strategy import MergeInputs
from mergekit_vl.tuners.context import Schedule, cross_entropy, fit_context
from mergekit_vl.weights import anchors

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.tuners.context import Encode, Loss


@dataclass(frozen=True)
class MergeTune:
    """One fine-tuned prompt, continued under linear mode connectivity with it and with zero-shot; see the module's table."""

    lambda_: float = option(8.0, "weight of the path to zero-shot")
    beta: float = option(0.5, "weight of the path to the fine-tuned model")
    tau: float = option(0.3, "start: 0 at zero-shot, 1 at the fine-tuned model")
    alphas: tuple[float, ...] = option(
        (0.1, 0.3, 0.5, 0.7, 0.9), "points of the path; empty: drawn uniformly each step"
    )
    n_alpha: int = option(5, "points a step where alphas is empty")
    surrogate: Literal["l2", "cosine"] = option("cosine", "distance to zero-shot")
    path: Literal["features", "weights"] = option("features", "interpolate classifiers or context vectors")
    anchor: Literal["template", "context"] = option("template", "zero-shot text features of path=features")
    epochs: int = option(50, "passes over the shots")
    batch: int = option(128, "images a step")
    lr: float = option(0.002, "SGD, cosine by epoch")
    crop: float = option(0.08, "smallest share of the area that RandomResizedCrop takes")
    flip: bool = option(True, "flip half of the images")

    def __post_init__(self) -> None:
        for name, valid, mend in (
            ("lambda_", self.lambda_ >= 0, "0 or more"),
            ("beta", self.beta >= 0, "0 or more"),
            ("tau", 0 <= self.tau <= 1, "between 0, zero-shot, and 1, fine-tuned"),
            ("alphas", all(0 <= alpha <= 1 for alpha in self.alphas), "points between 0 and 1"),
            ("n_alpha", self.n_alpha >= 1, "at least 1"),
        ):
            if not valid:
                value = getattr(self, name)
                raise UserError(f"{name.rstrip('_')}={value}", where="strategy mergetune", mend=mend)

    def merge(self, inputs: MergeInputs) -> Model:
        start, loss = self.objective(inputs)
        schedule, augment = Schedule(self.epochs, self.batch, self.lr), Augment(self.crop, self.flip)
        prompt = fit_context(start.backbone, start.adapter, inputs, schedule, augment, loss, what="mergetune")
        return Single(start.backbone, prompt)

    def objective(self, inputs: MergeInputs) -> tuple[Single, Loss]:
        """w0 = (1 - tau) w1 + tau w2, and L as a function of (encode, context, images [B, D] normalised, labels [B])."""
        import torch

        zero_shot, tuned = anchors(inputs)
        if len(tuned) != 1:
            raise UserError(
                f"one tuned model, not {len(tuned)}",
                where="strategy mergetune",
                mend="merge several with linear or task_arithmetic first",
            )
        classes, scale = inputs.data[0].classes, zero_shot.backbone.scale
        ctx1, ctx2 = zero_shot.adapter.tensors["ctx"], tuned[0].adapter.tensors["ctx"]
        text1 = (inputs.base if self.anchor == "template" else zero_shot).text_features(classes)  # [K, D]
        text2 = tuned[0].text_features(classes)
        draw = torch.Generator().manual_seed(inputs.seed + 1)

        def loss(encode: Encode, ctx: Tensor, images: Tensor, labels: Tensor) -> Tensor:
            alphas = torch.tensor(self.alphas) if self.alphas else torch.rand(self.n_alpha, generator=draw)
            alphas = alphas.to(ctx)
            if self.path == "features":
                text = encode(ctx)  # [K, D]
                points = interpolate(text, text2, alphas)  # [A, K, D]
                pull = distance(text, text1, self.surrogate, mean_rows=True)
            else:
                contexts = torch.cat([ctx[None], interpolate(ctx, ctx2, alphas)])  # [1 + A, M, W] or [1 + A, K, M, W]
                text, *points = encode(contexts if ctx.ndim == 3 else contexts[:, None])
                points = torch.stack(points)
                pull = distance(ctx, ctx1, self.surrogate, mean_rows=False)
            task = cross_entropy(scale, text, images, labels)
            return task + self.beta * cross_entropy(scale, points, images, labels) + self.lambda_ * pull

        return WiseFT(self.tau).merge(inputs), loss  # type: ignore[return-value]


def interpolate(w: Tensor, w2: Tensor, alphas: Tensor) -> Tensor:
    """w2 + alpha (w - w2) for each alpha: [A, *w.shape], one batched product."""
    return w2 + alphas.view(-1, *[1] * w.ndim) * (w - w2)


def distance(w: Tensor, w1: Tensor, surrogate: str, *, mean_rows: bool) -> Tensor:
    """The surrogate S(w, w1) of the module's table."""
    import torch.nn.functional as F

    if surrogate == "cosine":
        return (1 - F.cosine_similarity(w, w1, dim=-1)).mean()
    squared = (w - w1).square().sum(-1)
    return squared.mean() if mean_rows else squared.sum()
