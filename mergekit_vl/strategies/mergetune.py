"""MergeTune: continued fine-tuning under linear mode connectivity (arXiv 2601.10497).

Between the zero-shot model w1 and the fine-tuned w2, search a w that has a low-loss straight path to both:

    L(w) = CE(w) + beta * mean_alpha CE(w2 + alpha (w - w2)) + lambda * S(w, w1),     w starts at (1 - tau) w1 + tau w2

The last term stands for the path to w1, for which there are no pretraining data: near w1, a minimum of the pretraining
loss, its Taylor expansion is 1/2 (w - w1)^T H (w - w1), and an isotropic H makes that a squared distance. `surrogate=fisher`
takes a diagonal H instead (`information.py`); nobody has published that, and docs/suite.md shows what it does.

What "w" means, by what was tuned:

| tuned  | path     | space of w, w1, w2 in the two path terms   | S with cosine            | S with l2, that is |w - w1|^2 divided by |
|--------|----------|--------------------------------------------|--------------------------|------------------------------------------|
| prompt | features | raw text features [K, D]                   | mean over K of 1 - cos   | K                                        |
| prompt | weights  | context vectors [M, W]                     | mean over M of 1 - cos   | 1                                        |
| head   | weights  | weight and bias [K, D + 1]                 | mean over K of 1 - cos   | |w1|^2 + |w2|^2                          |
| tower  | weights  | the image tower's weights, and the head's  | not there                | |w2 - w1|^2                              |

With fisher each coordinate of the squared distance is weighted by F, which has mean 1, and the divisor is that of l2; but for text
features it is 2 |w1|^2, so that F = 1 and features that turn without growing give the cosine's S and lambda keeps its meaning.

In prompts `tau` mixes context vectors in both rows, w1 being the embeddings of the initial words; in the path `features` the w1 of S
is `anchor`: `template`, the features of the dataset's hand-written template, or `context`, those of the initial words. Interpolated
features are normalised after the interpolation, as the classifier does. In `features` a step is one text forward of K
texts; in `weights` it is one of (1 + N_alpha) K texts, since every point of that path is another context. A context per
class, [K, M, W], works alike, its rows being K M.

The logits of a head are linear in its weights, so the points of its path cost nothing: z2 + alpha (z - z2). A tower's step is
1 + N_alpha forwards and backwards of the image tower; `alphas=[] n_alpha=1` draws one point a step, which is unbiased. What the
paper divides by in S for heads and towers is not known to us. Ours make lambda comparable between models of any size: a head's S is
about 1 - cos, a tower's is the price of standing as far from zero-shot as the fine-tuned model does.

Paper and released code differ (the paper's values are known to us second-hand): lambda 8, beta 0.5, tau 0.3, 50 epochs in
the paper; lambda 10 or 8, beta 1, no tau (start at w2, that is tau=1) and 100 epochs in the code. The defaults are the
paper's; path `features` with surrogate `cosine` and the fixed grid of alphas is what the code does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from mergekit_vl.datasets.base import Augment
from mergekit_vl.errors import Unsuitable, UserError
from mergekit_vl.estimators import fisher_information, surrogates
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.models.model import ImageEncoder, Model, Single
from mergekit_vl.options import check_effect, option
from mergekit_vl.strategies.in_memory import anchors
from mergekit_vl.strategies.wise_ft import WiseFT
from mergekit_vl.tuners.context import cross_entropy, fit_context
from mergekit_vl.tuners.head import fit_head, inputs_of, matrix
from mergekit_vl.tuners.sgd import Schedule

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

    from mergekit_vl.tuners import context, head, tower

LR = {"ctx": 0.002, "head": 1.0, "tower": 3e-5}
"""Where none is given: SGD's for prompts, SGD's in units of 1 / mean squared feature norm for heads, AdamW's for towers."""

TRAINING = ("epochs", "batch", "lr", "views", "crop", "flip", "accumulate")
"""Options that say how it is trained, and not on what."""


@dataclass(frozen=True)
class MergeTune:
    """One fine-tuned prompt, linear head or image tower, continued under linear mode connectivity with it and with zero-shot."""

    lambda_: float = option(8.0, "weight of the path to zero-shot")
    beta: float = option(0.5, "weight of the path to the fine-tuned model")
    tau: float = option(0.3, "start: 0 at zero-shot, 1 at the fine-tuned model")
    alphas: tuple[float, ...] = option(
        (0.1, 0.3, 0.5, 0.7, 0.9), "points of the path; empty: drawn uniformly each step"
    )
    n_alpha: int = option(5, "points a step where alphas is empty")
    surrogate: Literal["l2", "cosine", "fisher"] | None = option(
        None, "distance to zero-shot; none: cosine, l2 for a tower"
    )
    path: Literal["features", "weights"] = option("features", "of a prompt: interpolate classifiers or context vectors")
    anchor: Literal["template", "context"] = option("template", "of a prompt: zero-shot text features of path=features")
    epochs: int = option(50, "passes over the shots")
    batch: int = option(128, "images a step")
    lr: float | None = option(
        None, "none: 0.002 for a prompt (SGD), 1.0 for a head (see linear_probe), 3e-5 for a tower (AdamW)"
    )
    views: int = option(0, "of a head: augmented views of each image; 0: the test view alone, as linear_probe")
    crop: float = option(0.08, "smallest share of the area that RandomResizedCrop takes")
    flip: bool = option(True, "flip half of the images")
    fisher_images: int = option(
        256, "images of the estimate, at most, where it takes a backward each (contexts, towers)"
    )
    accumulate: int = option(1, "of a tower: batches whose gradients make one step")

    grid = {"lambda": (2.0, 4.0, 16.0)}

    trains = True

    def controls(self) -> tuple[tuple[str, MergeTune], ...]:
        """w2 trained on for the same steps, and the start trained on without the terms."""
        plain = replace(self, lambda_=0.0, beta=0.0)
        return ("continued", replace(plain, tau=1.0)), ("CE only", plain)

    @classmethod
    def continued(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Of `options`, a MergeTune's or a tuner's, those of plain training, from w2 and without the terms."""
        own = {key: options[key] for key in TRAINING if options.get(key) is not None}
        if options.get("views") == 0:  # crop and flip are read with views alone
            own = {key: value for key, value in own.items() if key not in ("crop", "flip")}
        return {**own, "lambda": 0.0, "beta": 0.0, "tau": 1.0}

    def __post_init__(self) -> None:
        for name, valid, hint in (
            ("lambda_", self.lambda_ >= 0, "0 or more"),
            ("beta", self.beta >= 0, "0 or more"),
            ("tau", 0 <= self.tau <= 1, "between 0, zero-shot, and 1, fine-tuned"),
            ("alphas", all(0 <= alpha <= 1 for alpha in self.alphas), "points between 0 and 1"),
            ("n_alpha", self.n_alpha >= 1, "at least 1"),
            ("fisher_images", self.fisher_images >= 1, "at least 1"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
            ("views", self.views >= 0, "0 or more"),
        ):
            if not valid:
                value = getattr(self, name)
                raise UserError(f"{name.rstrip('_')}={value}", where="strategy mergetune", hint=hint)

    def merge(self, inputs: MergeInputs) -> Model:
        return {"ctx": self._prompt, "head": self._head, "tower": self._tower}[self._space(inputs)](inputs)

    def _space(self, inputs: MergeInputs) -> str:
        if len(inputs.tuned) != 1:
            raise Unsuitable(
                f"one tuned model, not {len(inputs.tuned)}",
                where="strategy mergetune",
                hint="merge several with linear or task_arithmetic first",
            )
        space = anchors(inputs)[1][0].adapter.space
        if space not in LR:
            raise Unsuitable(
                f"a model of the space {space}", where="strategy mergetune", hint="tune a prompt, a head or a tower"
            )
        for names, read, why in self._readers(space):
            if not read:
                check_effect(self, names, where="strategy mergetune", why=why)
        return space

    def _readers(self, space: str) -> Iterator[tuple[tuple[str, ...], bool, str]]:
        """Options, whether something reads them for models of this space, and what is so if not."""
        what = {"ctx": "a prompt", "head": "a head", "tower": "a tower"}[space]
        yield ("path", "anchor"), space == "ctx", f"on {what}"
        yield ("views",), space == "head", f"on {what}"
        yield ("accumulate",), space == "tower", f"on {what}"
        yield ("anchor",), self.path == "features", "with path=weights"
        yield ("n_alpha",), not self.alphas, "beside alphas"
        yield ("crop", "flip"), space != "head" or self.views > 0, "without views"
        exact = space == "head" or (space == "ctx" and self.path == "features")
        yield ("fisher_images",), not exact, f"on {what}{' with path=features' * (space == 'ctx')}: all images count"
        yield ("fisher_images",), self.surrogate == "fisher", f"with surrogate={self.surrogate}"

    def _lr(self, space: str) -> float:
        return LR[space] if self.lr is None else self.lr

    def _draw_alphas(self, generator: torch.Generator | None, like: Tensor) -> Tensor:
        import torch

        alphas = torch.tensor(self.alphas) if self.alphas else torch.rand(self.n_alpha, generator=generator)
        return alphas.to(like)

    # prompts

    def _prompt(self, inputs: MergeInputs) -> Model:
        start, loss = self.objective(inputs)
        schedule, augment = Schedule(self.epochs, self.batch, self._lr("ctx")), Augment(self.crop, self.flip)
        prompt = fit_context(start.backbone, start.adapter, inputs, schedule, augment, loss, what="mergetune")  # type: ignore[arg-type]
        return Single(start.backbone, prompt)

    def objective(self, inputs: MergeInputs) -> tuple[Single, context.Loss]:
        """Of a prompt: w0 = (1 - tau) w1 + tau w2, and L as a function of (encode, context, images [B, D] normalised, labels [B])."""
        import torch

        zero_shot, tuned = anchors(inputs)
        self._space(inputs)
        classes, scale = inputs.data[0].classes, zero_shot.backbone.scale
        ctx1, ctx2 = zero_shot.adapter.tensors["ctx"], tuned[0].adapter.tensors["ctx"]
        text1 = (inputs.base if self.anchor == "template" else zero_shot).text_features(classes)  # [K, D]
        text2 = tuned[0].text_features(classes)
        draw = torch.Generator().manual_seed(inputs.seed + 1)
        fisher = self._prompt_fisher(inputs, zero_shot, text1) if self.surrogate == "fisher" else None
        apart = 2 * float(text1.square().sum())

        def loss(encode: context.Encode, ctx: Tensor, images: Tensor, labels: Tensor) -> Tensor:
            alphas = self._draw_alphas(draw, ctx)
            if self.path == "features":
                text = encode(ctx)  # [K, D]
                points = interpolate(text, text2, alphas)  # [A, K, D]
                pull = self._distance(text, text1, fisher, divisor=len(text) if fisher is None else apart)
            else:
                contexts = torch.cat([ctx[None], interpolate(ctx, ctx2, alphas)])  # [1 + A, M, W] or [1 + A, K, M, W]
                text, *points = encode(contexts if ctx.ndim == 3 else contexts[:, None])
                points = torch.stack(points)
                pull = self._distance(ctx, ctx1, fisher, divisor=1)
            task = cross_entropy(scale, text, images, labels)
            return task + self.beta * cross_entropy(scale, points, images, labels) + self.lambda_ * pull

        return WiseFT(self.tau).merge(inputs), loss  # type: ignore[return-value]

    def _distance(self, w: Tensor, w1: Tensor, fisher: Tensor | None, *, divisor: float) -> Tensor:
        """The surrogate S(w, w1) of the module's table."""
        if self.surrogate in (None, "cosine"):
            return surrogates.cosine(w, w1)
        return surrogates.squared(w, w1, fisher).sum() / divisor

    def _prompt_fisher(self, inputs: MergeInputs, zero_shot: Single, text1: Tensor) -> Tensor:
        import torch.nn.functional as F

        backbone, data = zero_shot.backbone, inputs.data[0]
        if self.path == "weights":
            fisher = fisher_information.of_model(zero_shot, data, inputs, self.fisher_images)["ctx"]
        else:
            images = F.normalize(
                inputs.features.features(ImageEncoder(backbone), data.train).to(backbone.device), dim=-1
            )
            fisher = fisher_information.of_text_features(text1, images, backbone.scale)
        return surrogates.mean_one({"w": fisher})["w"]

    # linear heads

    def _head(self, inputs: MergeInputs) -> Model:
        import torch

        start = WiseFT(self.tau).merge(inputs)
        assert isinstance(start, Single)
        data, path = inputs.data[0], ImageEncoder(start.backbone)
        views = inputs.features.features(path, data.train)[None]
        if self.views:
            augment = Augment(self.crop, self.flip)
            views = inputs.features.views(path, data.train, epochs=self.views, seed=inputs.seed, augment=augment)
        labels = torch.from_numpy(data.train.labels)
        schedule = Schedule(self.epochs, self.batch, self._lr("head"), weight_decay=0.0)
        loss = self.head_objective(inputs, views)
        head = fit_head(start.adapter, views, labels, schedule, loss, inputs, what="mergetune")  # type: ignore[arg-type]
        return Single(start.backbone, head)

    def head_objective(self, inputs: MergeInputs, views: Tensor) -> head.Loss:
        """Of a head: L as a function of (w [K, D + 1], x [B, D + 1], labels [B]); views [E, N, D] are what the Fisher is estimated on."""
        import torch

        zero_shot, tuned = anchors(inputs)
        first, second = zero_shot.adapter, tuned[0].adapter
        w1, w2 = matrix(first), matrix(second)  # type: ignore[arg-type]
        apart = float((w1.square() + w2.square()).sum())
        x1 = inputs_of(first, views.to(w1.device)).flatten(0, 1)  # type: ignore[arg-type]
        fisher = (
            surrogates.mean_one({"w": fisher_information.of_head(w1, x1)})["w"] if self.surrogate == "fisher" else None
        )
        draw = torch.Generator().manual_seed(inputs.seed + 1)

        def loss(w: Tensor, x: Tensor, labels: Tensor) -> Tensor:
            z, z2 = x @ w.T, x @ w2.T  # [B, K]; logits are linear in w, so those of a point lie between them
            points = interpolate(z, z2, self._draw_alphas(draw, z)).flatten(0, 1)  # [A B, K]
            pull = self._distance(w, w1, fisher, divisor=apart)
            path = torch.nn.functional.cross_entropy(points, labels.repeat(len(points) // len(labels)))
            return torch.nn.functional.cross_entropy(z, labels) + self.beta * path + self.lambda_ * pull

        return loss

    # towers

    def _tower(self, inputs: MergeInputs) -> Model:
        from mergekit_vl.tuners.tower import TowerSchedule, fit_tower

        if self.surrogate == "cosine":
            raise Unsuitable(
                "surrogate=cosine is not there for towers", where="strategy mergetune", hint="l2 or fisher"
            )
        start = WiseFT(self.tau).merge(inputs)
        assert isinstance(start, Single)
        schedule = TowerSchedule(self.epochs, self.batch, self._lr("tower"), accumulate=self.accumulate)
        augment = Augment(self.crop, self.flip)
        losses = self.tower_objective(inputs)
        tower = fit_tower(start.backbone, start.adapter, inputs, schedule, augment, losses, what="mergetune")  # type: ignore[arg-type]
        return Single(start.backbone, tower)

    def tower_objective(self, inputs: MergeInputs) -> tower.Losses:
        """Of a tower: the terms of L, one after the other, so that memory holds the graph of one of them."""
        import torch.nn.functional as F

        zero_shot, tuned = anchors(inputs)
        w1, w2 = dict(zero_shot.adapter.tensors), dict(tuned[0].adapter.tensors)
        apart = {name: surrogates.squared(w2[name], w1[name]).sum() for name in w1}
        fisher = {}
        if self.surrogate == "fisher":
            fisher = fisher_information.of_model(zero_shot, inputs.data[0], inputs, self.fisher_images)
            fisher = surrogates.mean_one(fisher)

        def losses(forward, weights, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
            yield F.cross_entropy(forward(weights, images), labels)
            if self.lambda_:  # over what is trained: neither running statistics nor a text tower can be pulled
                pulls = [surrogates.squared(w, w1[name], fisher.get(name)).sum() for name, w in weights.items()]
                yield self.lambda_ * sum(pulls) / sum(apart[name] for name in weights).clamp_min(1e-12)  # type: ignore[union-attr]
            # drawn from the global generator: the loop seeds it by epoch, so a training that goes on draws the same
            alphas = self._draw_alphas(None, images) if self.beta else ()
            for alpha in alphas:
                point = {name: w2[name] + alpha * (w - w2[name]) for name, w in weights.items()}
                yield self.beta / len(alphas) * F.cross_entropy(forward(point, images), labels)

        return losses


def interpolate(w: Tensor, w2: Tensor, alphas: Tensor) -> Tensor:
    """w2 + alpha (w - w2) for each alpha: [A, *w.shape], one batched product."""
    return w2 + alphas.view(-1, *[1] * w.ndim) * (w - w2)
