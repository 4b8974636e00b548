"""MergeTune: continued fine-tuning under linear mode connectivity (arXiv 2601.10497).

Between the zero-shot model w1 and the fine-tuned w2, search a w that has a low-loss straight path to both:

    L(w) = CE(w) + beta * mean_alpha CE(w2 + alpha (w - w2)) + lambda * S(w, w1),     w starts at (1 - tau) w1 + tau w2

The last term stands for the line to w1, for which there are no pretraining data: near w1, a minimum of the pretraining
loss, its Taylor expansion is 1/2 (w - w1)^T H (w - w1), and an isotropic H makes that a squared distance. `surrogate=fisher`
takes a diagonal H instead (`fisher_information.py`); nobody has published that, and docs/suite.md shows what it does.

What "w" means, by what was tuned:

| tuned  | space       | w, w1, w2 in the two line terms         | S with cosine            | S with l2, that is |w - w1|^2 divided by |
|--------|-------------|-----------------------------------------|--------------------------|------------------------------------------|
| prompt | classifiers | raw text features [K, D]                | mean over K of 1 - cos   | K                                        |
| prompt | weights     | context vectors [M, W]                  | mean over M of 1 - cos   | 1                                        |
| head   | weights     | weight and bias [K, D + 1]              | mean over K of 1 - cos   | |w1|^2 + |w2|^2                          |
| tower  | weights     | the image tower's weights, and the head | not there                | |w2 - w1|^2                              |

With fisher each coordinate of the squared distance is weighted by F, which has mean 1, and the divisor is that of l2; but for text
features it is 2 |w1|^2, so that F = 1 and features that turn without growing give the cosine's S and lambda keeps its meaning.

In prompts `tau` mixes context vectors in both rows, w1 being the embeddings of the initial words; in the space of
classifiers the w1 of S is `zero_shot`: `template`, the features of the dataset's hand-written template, or `context`, those of the initial words. Interpolated
features are normalised after the interpolation, as the classifier does. With `classifiers` a step is one text forward of K
texts; in `weights` it is one of (1 + N_alpha) K texts, since every point of that path is another context. A context per
class, [K, M, W], works alike, its rows being K M.

The logits of a head are linear in its weights, so the points of its path cost nothing: z2 + alpha (z - z2). A tower's step is
1 + N_alpha forwards and backwards of the image tower; `alphas=[] n_alpha=1` draws one point a step, which is unbiased. What the
paper divides by in S for heads and towers is not known to us. Ours make lambda comparable between models of any size: a head's S is
about 1 - cos, a tower's is the price of standing as far from zero-shot as the fine-tuned model does.

`settings` says whose values stand where an option is not given. The paper's and the released code's differ (the paper's are known to us
second-hand): lambda 8, beta 0.5, tau 0.3, 50 epochs in the paper; lambda 10 or 8, beta 1, no tau (start at w2, that is tau=1) and 100
epochs in the code. Both warm up for an epoch at a rate of 1e-5, in which momentum sums gradients of norm 10 that the first step at
the full rate then takes at once: a context can be thrown ten times its length away. `robust`, the default, is the paper's
with a linear warm-up, no step longer than a tenth of the distance from w1 to w2, crops of half of the area or more, and for prompts
lambda 2 and 8 steps a pass or more, since few shots in large batches are a step a pass: chosen on development sets of photographs and of the
microworld (docs/photographs.md).
The space of classifiers with surrogate `cosine` and the fixed grid of alphas is what the code does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from mergekit_vl.datasets.base import Augment
from mergekit_vl.errors import Unsuitable
from mergekit_vl.estimators import fisher_information, surrogates
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.models.model import Mixture, Model, Single
from mergekit_vl.options import check, check_effect, option
from mergekit_vl.strategies.in_memory import Space, endpoints
from mergekit_vl.strategies.wise_ft import WiseFT
from mergekit_vl.tuners.sgd import Warmup, cross_entropy
from mergekit_vl.tuners.training import train

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergekit_vl.models.adapter import About, Adapter, Line, Network

WHERE = "strategy mergetune"


@dataclass(frozen=True)
class Settings:
    """Values that are published or recommended together."""

    lambda_: float
    """Of prompts."""
    others: float
    """Lambda of heads and towers, whose distance to zero-shot has another unit."""
    beta: float
    tau: float
    epochs: int
    warmup: Warmup
    longest: float
    crop: float
    steps: int
    """Of a pass over the shots of a prompt, at least."""


SETTINGS = {
    "robust": Settings(2.0, 8.0, 0.5, 0.3, epochs=50, warmup="linear", longest=0.1, crop=0.5, steps=8),
    "paper": Settings(8.0, 8.0, 0.5, 0.3, epochs=50, warmup="constant", longest=0.0, crop=0.08, steps=1),
    "released": Settings(10.0, 10.0, 1.0, 1.0, epochs=100, warmup="constant", longest=0.0, crop=0.08, steps=1),
}
SMALLEST = 8
"""Images a step that a pass with more steps does not go below."""

TRAINING = ("settings", "warmup", "longest", "epochs", "batch", "lr", "views", "crop", "flip", "accumulate")
"""Options that say how it is trained, and not on what."""


@dataclass(frozen=True)
class MergeTune:
    """One fine-tuned prompt, linear head or image tower, continued under linear mode connectivity with it and with zero-shot."""

    settings: Literal["robust", "paper", "released"] = option(
        "robust", "whose values stand where an option is not given: ours, the paper's or the released code's"
    )
    lambda_: float | None = option(None, "weight of the loss on the line to zero-shot; none: by settings")
    beta: float | None = option(None, "weight of the loss on the line to the fine-tuned model; none: by settings")
    tau: float | None = option(None, "start: 0 at zero-shot, 1 at the fine-tuned model; none: by settings")
    alphas: tuple[float, ...] = option(
        (0.1, 0.3, 0.5, 0.7, 0.9), "points of each line; empty: drawn uniformly each step"
    )
    n_alpha: int = option(5, "points a step where alphas is empty")
    surrogate: Literal["l2", "cosine", "fisher"] | None = option(
        None, "distance to zero-shot; none: cosine, l2 for a tower"
    )
    space: Space = option(
        "classifiers",
        "of a prompt: interpolate the classifiers that it makes, or its context vectors",
        formerly="path",
        values_formerly={"features": "classifiers"},
    )
    zero_shot: Literal["template", "context"] = option(
        "template", "of a prompt in the space of classifiers: which text features are zero-shot's", formerly="anchor"
    )
    epochs: int | None = option(None, "passes over the shots; none: by settings")
    batch: int = option(
        128, "images a step; with settings=robust a prompt sees at most an eighth of the shots a step, or 8"
    )
    warmup: Warmup | None = option(
        None, "first epoch of prompts and heads: constant at 1e-5, as in the field, or linear; none: by settings"
    )
    longest: float | None = option(
        None,
        "longest step of prompts and heads, in distances from zero-shot to the fine-tuned; none: by settings, 0: any",
    )
    lr: float | None = option(
        None, "none: 0.002 for a prompt (SGD), 1.0 for a head (see linear_probe), 3e-5 for a tower (AdamW)"
    )
    views: int = option(0, "of a head: augmented views of each image; 0: the test view alone, as linear_probe")
    crop: float | None = option(None, "smallest share of the area that RandomResizedCrop takes; none: by settings")
    flip: bool = option(True, "flip half of the images")
    fisher_images: int = option(
        256, "images of the estimate, at most, where it takes a backward each (contexts, towers)"
    )
    accumulate: int = option(1, "of a tower: batches whose gradients make one step")
    middle: bool = option(
        False,
        "the result is the middle of the path from w to the fine-tuned model, in the same space, and not w itself",
    )

    grid = {"lambda": (2.0, 4.0, 16.0)}

    trains = True

    def controls(self) -> tuple[tuple[str, MergeTune], ...]:
        """w2 trained on for the same steps, and the start trained on without the terms."""
        plain = replace(self, lambda_=0.0, beta=0.0)
        continued = ("continued", replace(plain, tau=1.0))
        return (continued,) if self.used.tau == 1 else (continued, ("CE only", plain))

    @property
    def used(self) -> Settings:
        """The values of `settings`, and what was given in their places."""
        given: dict[str, Any] = {
            "lambda_": self.lambda_,
            "others": self.lambda_,
            "beta": self.beta,
            "tau": self.tau,
            "epochs": self.epochs,
            "warmup": self.warmup,
            "longest": self.longest,
            "crop": self.crop,
        }
        return replace(SETTINGS[self.settings], **{name: value for name, value in given.items() if value is not None})

    @classmethod
    def continued(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Of `options`, a MergeTune's or a tuner's, those of plain training, from w2 and without the terms."""
        own = {key: options[key] for key in TRAINING if options.get(key) is not None}
        if options.get("views") == 0:  # crop and flip are read with views alone
            own = {key: value for key, value in own.items() if key not in ("crop", "flip")}
        return {**own, "lambda": 0.0, "beta": 0.0, "tau": 1.0}

    def __post_init__(self) -> None:
        used = self.used
        check(
            self,
            where=WHERE,
            lambda_=(used.lambda_ >= 0, "0 or more"),
            beta=(used.beta >= 0, "0 or more"),
            tau=(0 <= used.tau <= 1, "between 0, zero-shot, and 1, fine-tuned"),
            longest=(used.longest >= 0, "0 or more"),
            alphas=(all(0 <= alpha <= 1 for alpha in self.alphas), "points between 0 and 1"),
            n_alpha=(self.n_alpha >= 1, "at least 1"),
            fisher_images=(self.fisher_images >= 1, "at least 1"),
            accumulate=(self.accumulate >= 1, "at least 1"),
            views=(self.views >= 0, "0 or more"),
        )

    def merge(self, inputs: MergeInputs) -> Model:
        zero_shot, tuned = self.ends(inputs)
        used = self.used
        start = WiseFT(used.tau).merge(inputs)
        assert isinstance(start, Single)
        training = train(
            start,
            inputs,
            what="mergetune",
            epochs=used.epochs,
            batch=self.at_once(tuned, len(inputs.data[0].train)),
            lr=self.lr,
            augment=Augment(used.crop, self.flip),
            views=self.views,
            accumulate=self.accumulate,
            warmup=used.warmup,
            longest=used.longest * distance(zero_shot, tuned) or None,
        )
        objective = self.objective(training.network, training.x, zero_shot, tuned, inputs)
        for step in training:
            with step:
                for term in objective.terms(step.weights, step.x, step.labels, step.draw):
                    step.minimise(term)
        w = Single(start.backbone, training.adapter())
        return self.halfway(w, tuned) if self.middle else w

    def at_once(self, tuned: Single, images: int) -> int:
        """Images a step: `batch`, or fewer where a pass over a prompt's shots would have fewer steps than `settings` say."""
        if not tuned.adapter.about.makes_texts:
            return self.batch
        return min(self.batch, max(SMALLEST, math.ceil(images / self.used.steps)))

    def halfway(self, w: Single, tuned: Single) -> Model:
        """The point of the second term at alpha = 1/2; of two prompts in the space of classifiers it is no prompt, but the mean of their text features."""
        if w.adapter.about.makes_texts and self.space == "classifiers":
            return Mixture((w, tuned), (0.5, 0.5))
        ends = w.adapter.tensors, tuned.adapter.tensors
        return Single(
            w.backbone, w.adapter.with_tensors({name: t.lerp(ends[1][name].to(t), 0.5) for name, t in ends[0].items()})
        )

    def objective(
        self, network: Network[Adapter], x: Tensor | None, zero_shot: Single, tuned: Single, inputs: MergeInputs
    ) -> Objective:
        """L(w) for this network; x [E, N, ...] are the prepared inputs that a Fisher in closed form is of."""
        import torch

        about = tuned.adapter.about
        template = about.makes_texts and self.space == "classifiers" and self.zero_shot == "template"
        line = network.line((inputs.base if template else zero_shot).adapter, tuned.adapter, self.space)
        fisher = None
        if self.surrogate == "fisher":
            exact = None if x is None else line.fisher(self._seen(network, x, zero_shot, inputs))
            fisher = surrogates.mean_one(
                fisher_information.of_model(zero_shot, inputs.data[0], inputs, self.fisher_images)
                if exact is None
                else exact
            )
        alphas = torch.tensor(self.alphas) if self.alphas else None
        surrogate = self.surrogate or ("l2" if about.reads == "images" else "cosine")
        used, unit = self.used, line.unit(weighted=fisher is not None)
        lambda_ = used.lambda_ if about.makes_texts else used.others
        return Objective(line, lambda_, used.beta, alphas, self.n_alpha, surrogate, fisher, unit)

    def _seen(self, network: Network[Adapter], x: Tensor, zero_shot: Single, inputs: MergeInputs) -> Tensor:
        """What a Fisher in closed form is of: the views that are trained on, or the test views where those change by epoch."""
        if not zero_shot.adapter.about.fresh_views:
            return x.flatten(0, 1)
        return network.prepare(inputs.features.features(zero_shot.encoders[0], inputs.data[0].train))

    def ends(self, inputs: MergeInputs) -> tuple[Single, Single]:
        """The zero-shot point and the tuned model; raises Unsuitable for others than one model that this can continue."""
        inputs.only(WHERE, "merge several with linear or task_arithmetic first")
        zero_shot, (tuned,) = endpoints(inputs)
        for names, read, why in self._readers(tuned.adapter.about):
            check_effect(self, names, where=WHERE, why=why, read=read)
        if self.surrogate == "cosine" and tuned.adapter.about.reads == "images":
            raise Unsuitable(
                f"surrogate=cosine is not there for {tuned.adapter.about.many}", where=WHERE, hint="l2 or fisher"
            )
        return zero_shot, tuned

    def _readers(self, about: About) -> tuple[tuple[tuple[str, ...], bool, str], ...]:
        """Options, whether something reads them for such a model, and what is so if not."""
        images, on = about.reads == "images", f"on {about.one}"
        texts = about.makes_texts and self.space == "classifiers"
        path = " with space=classifiers" * about.makes_texts
        return (
            (("space", "zero_shot"), about.makes_texts, on),
            (("views",), not (images or about.fresh_views), on),
            (("accumulate",), images, on),
            (("warmup", "longest"), not images, on),
            (("zero_shot",), self.space == "classifiers", "with space=weights"),
            (("n_alpha",), not self.alphas, "beside alphas"),
            (("crop", "flip"), images or about.fresh_views or self.views > 0, "without views"),
            (("fisher_images",), not (about.exact_fisher or texts), f"{on}{path}: all images count"),
            (("fisher_images",), self.surrogate == "fisher", f"with surrogate={self.surrogate}"),
        )


@dataclass(frozen=True)
class Objective:
    """L(w) of one network: the three terms of the formula above, in the representation of the table."""

    line: Line
    lambda_: float
    beta: float
    alphas: Tensor | None
    """[A] of lines whose points are fixed; None: `n_alpha` are drawn at each step."""
    n_alpha: int
    surrogate: Literal["l2", "cosine", "fisher"]
    fisher: Mapping[str, Tensor] | None
    unit: Tensor | float
    """What squared distances are divided by."""

    def terms(
        self, weights: Mapping[str, Tensor], x: Tensor, labels: Tensor, draw: torch.Generator | None
    ) -> Iterator[Tensor]:
        """Of prepared inputs of B images and labels [B]; a term's graph may go before the next is made."""
        alphas = self._alphas(draw, x) if self.beta else x.new_empty(0)
        w, logits = self.line.at(weights, alphas, x)
        if self.lambda_:
            yield self.lambda_ * self.distance(w)
        yield cross_entropy(next(logits), labels)  # [B, K] at w
        for part in logits if self.beta else ():  # [A, B, K] at points
            yield self.beta * (len(part) / len(alphas)) * cross_entropy(part, labels)

    def distance(self, w: Mapping[str, Tensor]) -> Tensor:
        """S(w, w1), the surrogate of the table."""
        w1 = self.line.first
        if self.surrogate == "cosine":
            first, *others = (surrogates.cosine(each, w1[name]) for name, each in w.items())
            return sum(others, first) / len(w) if others else first
        fisher = self.fisher or {}
        first, *others = (surrogates.squared(each, w1[name], fisher.get(name)).sum() for name, each in w.items())
        return sum(others, first) / self.unit

    def _alphas(self, draw: torch.Generator | None, like: Tensor) -> Tensor:
        import torch

        alphas = self.alphas
        return (torch.rand(self.n_alpha, generator=draw) if alphas is None else alphas).to(like)


def distance(first: Single, second: Single) -> float:
    """|w2 - w1| over all tensors of two adapters."""
    others = second.adapter.tensors
    squares = (float((others[name].double() - t.double()).square().sum()) for name, t in first.adapter.tensors.items())
    return math.sqrt(sum(squares))
