"""A plugin with an adapter of its own: a residual on the text features of each class (TaskRes, Yu et al. 2023, arXiv 2211.10277)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mergekit_vl import (
    About,
    Augment,
    ImageEncoder,
    Single,
    TextNetwork,
    Unsuitable,
    Usage,
    UserError,
    ZeroShot,
    cosine_head,
    cross_entropy,
    hookimpl,
    option,
    read_adapter,
    train,
    write_adapter,
)


@hookimpl
def register_adapters(register):
    register("text_residual", TextResidual, "a residual on the text features of each class")


@hookimpl
def register_tuners(register):
    register("task_res", TaskRes, "tune a residual on the text features")


@dataclass(frozen=True, eq=False)
class TextResidual:
    """text(class) + residual, residual [K, D]; the template's text features are those of the classes that it was tuned on."""

    residual: torch.Tensor
    names: tuple[str, ...]

    space = "text_residual"
    about = About("a text residual", "residuals", makes_texts=True, lr=1.0, weight_decay=0.0)
    chosen = {}

    # merging

    @property
    def tensors(self):
        return {"residual": self.residual}

    def with_tensors(self, tensors):
        return replace(self, residual=tensors["residual"])

    def untuned(self, backbone):
        return replace(self, residual=torch.zeros_like(self.residual))

    def aligned(self, others):
        if any(other.names != self.names for other in others):
            raise Unsuitable(
                "text residuals of different classes cannot be merged", hint="tune them on the same classes"
            )
        return others

    # logits

    def image_encoder(self, backbone):
        return ImageEncoder(backbone)

    def bind(self, backbone, classes):
        return cosine_head(backbone, self.text_features(backbone, classes))

    def text_features(self, backbone, classes):
        if classes.names != self.names:
            raise Unsuitable("a text residual knows its own classes alone", hint="test it on them")
        return ZeroShot().text_features(backbone, classes) + self.residual

    def networks(self, backbone, classes, *, training):
        def network(each):
            text = ZeroShot().text_features(backbone, each)
            return TextNetwork(self, backbone, each, lambda tensors: text + tensors["residual"])

        return [network(each) for each in classes]

    def linear_maps(self, features):
        return {}

    # files and reports

    def with_chosen(self, chosen):
        return self

    def started_from(self, base, backbone, classes):
        return self

    def check(self, backbone):
        if self.residual.shape[1] != backbone.width:
            raise UserError(
                "the residual is of another width", where=backbone.spec, hint="use the backbone it was tuned on"
            )

    def save(self, path, *, backbone):
        write_adapter(path, self.tensors, {"adapter": "text_residual", "backbone": backbone, "names": list(self.names)})

    @classmethod
    def load(cls, path, *, device="cpu"):
        tensors, facts = read_adapter(path, "text_residual", device)
        return cls(tensors["residual"], tuple(facts["names"]))

    def usage(self, backbone):
        return Usage("`merged.safetensors` holds the text residual that {main} made.", ("# text = text + residual",))

    def whole(self, backbone):
        return None


@dataclass(frozen=True)
class TaskRes:
    """Cross-entropy over the residual, by SGD."""

    epochs: int = option(20, "passes over the shots")
    batch: int = option(32, "images a step")
    lr: float = option(1.0, "SGD")

    def tune(self, inputs):
        backbone, data = inputs.base.backbone, inputs.data[0]
        text = ZeroShot().text_features(backbone, data.classes)
        start = Single(backbone, TextResidual(torch.zeros_like(text), data.classes.names))
        training = train(
            start, inputs, what="task_res", epochs=self.epochs, batch=self.batch, lr=self.lr, augment=Augment()
        )
        for step in training:
            with step:
                step.minimise(cross_entropy(training.network(step.weights, step.x), step.labels))
        return Single(backbone, training.adapter())
