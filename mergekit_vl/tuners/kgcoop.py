"""KgCoOp (Yao et al. 2023, "Visual-language prompt tuning with knowledge-guided context optimization", arXiv 2303.13283, eq. 5)."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.adapters.text_network import TextNetwork
from mergekit_vl.datasets.base import Augment
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.models.model import Single
from mergekit_vl.options import option
from mergekit_vl.tuners.sgd import cross_entropy
from mergekit_vl.tuners.training import train


@dataclass(frozen=True)
class KgCoOp:
    """CoOp + guide * mean_k (1 - cos(text_k, zero-shot text_k)).

    The paper writes a squared distance of normalised features; its released code uses 1 - cos, half of that, and so does this.
    """

    epochs: int = option(100, "passes over the shots")
    batch: int = option(128, "images a step")
    lr: float = option(0.002, "SGD, cosine by epoch")
    guide: float = option(8.0, "weight of the pull towards the template's text features (lambda in the paper)")
    init: str | None = option("a photo of a", "words that the context starts from; null: at random")
    n_context: int = option(4, "context tokens where init is null")
    crop: float = option(0.5, "smallest share of the area that RandomResizedCrop takes, 0.08 in CoOp's code")
    flip: bool = option(True, "flip half of the images")

    def tune(self, inputs: MergeInputs) -> Single:
        import torch.nn.functional as F

        backbone = inputs.base.backbone
        start = Prompt.start(backbone, init=self.init, n_context=self.n_context, seed=inputs.seed)
        zero_shot = inputs.base.text_features(inputs.data[0].classes)
        training = train(
            Single(backbone, start),
            inputs,
            what="kgcoop",
            epochs=self.epochs,
            batch=self.batch,
            lr=self.lr,
            augment=Augment(self.crop, self.flip),
        )
        network = training.network
        assert isinstance(network, TextNetwork)
        for step in training:
            with step:
                text = network.encode(step.weights)
                step.minimise(self.guide * (1 - F.cosine_similarity(text, zero_shot, dim=-1).mean()))
                step.minimise(cross_entropy(network.logits(text, step.x), step.labels))
        return Single(backbone, training.adapter())
