"""CoOp (Zhou et al. 2022, "Learning to prompt for vision-language models", arXiv 2109.01134, eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.datasets.base import Augment
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.models.model import Single
from mergekit_vl.options import option
from mergekit_vl.tuners.sgd import cross_entropy
from mergekit_vl.tuners.training import train


@dataclass(frozen=True)
class CoOp:
    """Cross-entropy of the shots over the context vectors, by SGD. Defaults are the base-to-novel ones of the field."""

    epochs: int = option(200, "passes over the shots")
    batch: int = option(32, "images a step")
    lr: float = option(0.002, "SGD, cosine by epoch")
    init: str | None = option("a photo of a", "words that the context starts from; null: at random")
    n_context: int = option(4, "context tokens where init is null")
    class_specific: bool = option(False, "one context per class; refused for novel classes")
    crop: float = option(0.5, "smallest share of the area that RandomResizedCrop takes, 0.08 in CoOp's code")
    flip: bool = option(True, "flip half of the images")

    def tune(self, inputs: MergeInputs) -> Single:
        backbone = inputs.base.backbone
        names = inputs.data[0].classes.names if self.class_specific else ()
        start = Prompt.start(backbone, init=self.init, n_context=self.n_context, seed=inputs.seed, names=names)
        training = train(
            Single(backbone, start),
            inputs,
            what="coop",
            epochs=self.epochs,
            batch=self.batch,
            lr=self.lr,
            augment=Augment(self.crop, self.flip),
        )
        for step in training:
            with step:
                step.minimise(cross_entropy(training.network(step.weights, step.x), step.labels))
        return Single(backbone, training.adapter())
