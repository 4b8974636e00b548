"""Full fine-tuning of the image tower (as in WiSE-FT, Wortsman et al. 2022), and LP-FT (Kumar et al. 2022, arXiv 2202.10054)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mergekit_vl.adapters.linear_head import Unseen
from mergekit_vl.adapters.tower import Tower
from mergekit_vl.datasets.base import Augment
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.models.model import Single
from mergekit_vl.options import check, option
from mergekit_vl.tuners.head import Init, start_head
from mergekit_vl.tuners.sgd import cross_entropy


@dataclass(frozen=True)
class Full:
    """Cross-entropy over every weight of the image tower, and of a linear head where there is one.

    `head=text` keeps the text tower's classifier of class names: such models take any classes, and those of several tasks can be
    merged. `head=linear_probe` is LP-FT: the head is probed first (its own default options), then tower and head are tuned together.
    The defaults are the field's for a CLIP (10 epochs, lr 3e-5, batch 512, weight decay 0.1, 500 steps of warm-up); a small model
    needs a higher lr and a smaller batch. Encoders run in bfloat16 on a GPU, logits and loss in float32.
    """

    head: Init | Literal["text", "linear_probe"] | None = option(
        None,
        "text, linear_probe (LP-FT), or how the head starts: zero_shot, class_mean, random, own; none: zero_shot, class_mean without a text tower",
    )
    epochs: int = option(10, "passes over the images")
    batch: int = option(512, "images at once")
    accumulate: int = option(1, "batches whose gradients make one step")
    lr: float = option(3e-5, "AdamW, warm-up, then a cosine by step")
    weight_decay: float = option(0.1, "of AdamW")
    warmup: int = option(500, "steps, at most a tenth of all")
    choose: Literal["validation", "last"] = option("validation", "the best epoch on validation images, or the last")
    crop: float = option(0.5, "smallest share of the area that RandomResizedCrop takes")
    flip: bool = option(True, "flip half of the images")
    unseen: Unseen = option("refuse", "other class names: refuse, or zero_shot rows (with a linear head)")

    moves_tower = True

    def __post_init__(self) -> None:
        check(
            self,
            where="tuner full",
            accumulate=(self.accumulate >= 1, "1 or more"),
            weight_decay=(self.weight_decay >= 0, "0 or more"),
            warmup=(self.warmup >= 0, "0 or more"),
        )

    def tune(self, inputs: MergeInputs) -> Single:
        from mergekit_vl.tuners.adamw import AdamWSchedule, AdamWTraining

        backbone, start = inputs.base.backbone, self._start(inputs)
        schedule = AdamWSchedule(
            self.epochs, self.batch, self.lr, self.weight_decay, self.warmup, self.accumulate, self.choose
        )
        (network,) = start.networks(backbone, [inputs.data[0].classes], training=True)
        training = AdamWTraining(backbone, network, schedule)
        for step in training.steps(inputs, Augment(self.crop, self.flip), what="full"):
            with step:
                step.minimise(cross_entropy(network(step.weights, step.x), step.labels))
        return Single(backbone, training.chosen())

    def _start(self, inputs: MergeInputs) -> Tower:
        from mergekit_vl.tuners.linear_probe import LinearProbe

        backbone = inputs.base.backbone
        weights = backbone.image_weights()
        if self.head == "text":
            backbone.require_text()
            return Tower(weights)
        if self.head == "linear_probe":
            return Tower(weights, LinearProbe(unseen=self.unseen).fitted(inputs))
        return Tower(weights, start_head(backbone, inputs, self.head, self.unseen))
