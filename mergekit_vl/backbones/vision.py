"""Image classifiers of timm, by name and pretrained tag or from a local checkpoint: features and their own classifier, no text.

The feature width is measured, not asked: `num_features` is another layer's for some (mobilenetv3_small_100 says 576 and gives 1024).
Distilled models have two heads whose logits they average. LeViT's and EfficientFormer's read the same features, so the average is
one head; DeiT's read two tokens, so its features here are both tokens, [B, 2 D], and not their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from mergekit_vl.checkpoints.reader import taking
from mergekit_vl.errors import UserError, first_line, unknown
from mergekit_vl.options import option
from mergekit_vl.system.atomic_files import is_a_path
from mergekit_vl.system.regular_files import user_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from mergekit_vl.backbones.backbone import Backbone, Classifier, Preprocess
    from mergekit_vl.backbones.timm_features import TimmModel

CROP_MODES = {"shortest": "center", "squash": "squash", "longest": "border"}
"""timm's crop modes by open_clip's names of them."""


@dataclass(frozen=True)
class Vision:
    """A timm model as an image tower. It knows no class names: zero-shot rows and prompts do not exist on it."""

    arch: str = option(help="timm model, its pretrained tag after a dot loads that: resnet50.a1_in1k")
    pretrained: str | None = option(
        None, "tag, or a local checkpoint or folder; none: the tag in arch, else random weights"
    )
    batch: int = option(128, "images encoded at once")
    precision: Literal["float32", "bfloat16"] | None = option(
        None, "arithmetic of the image tower; none: bfloat16 on a GPU, float32 elsewhere"
    )
    weights: str | None = option(
        None, "of a checkpoint with several sets of weights, which: plain, ema, or the key of one; none: plain"
    )

    base = "class means"
    """What stands in the place of zero-shot."""

    def __post_init__(self) -> None:
        given = self.pretrained
        if given and is_a_path(given) and not user_path(given).exists():
            where = f"backbone vision arch={self.arch} pretrained={given}"
            raise UserError("no such checkpoint", where=where, hint="give a file, a folder or a tag")

    def build(self, device: str) -> Backbone:
        import torch

        from mergekit_vl.backbones.backbone import Backbone
        from mergekit_vl.backbones.timm_features import TimmFeatures, own_classifier

        where = f"backbone vision arch={self.arch}" + (f" pretrained={self.pretrained}" if self.pretrained else "")
        if self.batch < 1:
            raise UserError(f"batch={self.batch}", where=where, hint="at least 1")
        with taking(self.weights):
            model, notes = self._model(where)
        model.eval()
        preprocess = _preprocess(model)
        with torch.no_grad():
            probe = torch.randn(2, *_input_size(model), generator=torch.Generator().manual_seed(0))
            logits = model(probe)
            features = TimmFeatures(model)
            classifier = own_classifier(model, features(probe), logits)
            model.reset_classifier(0)  # it is no part of the features, nor of their key
        arch = self.arch.split(".")[0]
        names = _classifier_names(arch)
        return Backbone(
            image=features,
            text=None,
            preprocess=preprocess,
            spec=f"vision:{self.arch}" + (f":{self.pretrained}" if self.pretrained else ""),
            pretrained=self.pretrained or self.arch.partition(".")[2] or "random",
            width=features(probe).shape[1],
            config={"architecture": arch, "classifier": names},
            read=lambda state: _split(state, names),
            settings=arch,
            device=device,
            classifier=classifier,
            classes=self._classes(classifier),
            notes=notes,
            block=self.batch,
            precision=self.precision,
        )

    def _classes(self, classifier: Classifier | None) -> tuple[str, ...]:
        """The names that the checkpoint's config has for the classifier's rows; WordNet ids are none."""
        from mergekit_vl.checkpoints.configs import class_names

        given = user_path(self.pretrained) if self.pretrained else None
        names = class_names(given if given is None or given.is_dir() else given.parent)
        return names if classifier is not None and len(names) == len(classifier.weight) else ()

    def _model(self, where: str) -> tuple[TimmModel, tuple[str, ...]]:
        import timm
        import torch

        arch, _, tag = self.arch.partition(".")
        if not timm.is_model(arch):
            raise unknown("arch", arch, timm.list_models(), where="backbone vision", see="timm.list_models()")
        given = user_path(self.pretrained) if self.pretrained else None
        if given and given.exists():
            return _from_checkpoint(arch, given)
        tag = self.pretrained or tag
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights, the same ones each time
            if not tag:
                return _created(arch), ()
            tags = [name.partition(".")[2] for name in timm.list_models(f"{arch}.*", pretrained=True)]
            if tag not in tags:
                raise unknown("pretrained tag", tag, tags, where=where)
            try:
                return _created(f"{arch}.{tag}", pretrained=True), ()
            except Exception as error:  # timm and the hub's client raise many kinds
                cfg = timm.get_pretrained_cfg(f"{arch}.{tag}")
                what = (cfg.hf_hub_id or cfg.url) if cfg else f"{arch}.{tag}"
                first = first_line(error)
                raise UserError(
                    f"{what} is not on this machine and cannot be fetched: {first[:200]}",
                    where=where,
                    hint="download it elsewhere and set backbone.pretrained=FILE",
                ) from None


def _created(name: str, *, pretrained: bool = False, classes: int | None = None) -> TimmModel:
    """A model of timm's; with as many classes as its configuration says where none are given."""
    import timm

    given: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    return cast("TimmModel", timm.create_model(name, pretrained=pretrained, **given))


def _from_checkpoint(arch: str, path: Path) -> tuple[TimmModel, tuple[str, ...]]:
    """A timm model with a checkpoint's tensors, and as many classes as it has; what is to be told of it."""
    from mergekit_vl.checkpoints.torch_io import load_into, read_told, under_names_of

    state, told = read_told(path)
    names = _classifier_names(arch)
    if not any(f"{name}.weight" in state for name in names):
        state, more = under_names_of(_created(arch, classes=0).state_dict(), state, where=str(path))
        told += more
    weight = state.get(f"{names[0]}.weight")
    model = _created(arch, classes=0 if weight is None else weight.shape[0])
    load_into(model, state, where=str(path), hint=f"give {arch} its own weights")
    return model, told


def _classifier_names(arch: str) -> tuple[str, ...]:
    """Where timm keeps the classifier: fc, head.fc; distilled models have two."""
    import timm

    told = timm.get_pretrained_cfg(arch, allow_unregistered=True)
    found = (told.classifier if told else None) or "head"
    return (found,) if isinstance(found, str) else tuple(found)


def _split(state: Mapping[str, Tensor], names: tuple[str, ...]) -> tuple[Mapping[str, Tensor], Classifier | None]:
    """A checkpoint's tower and its classifier; the two of a distilled model are left out."""
    import torch

    from mergekit_vl.backbones.backbone import Classifier

    heads = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    tower = {name: tensor for name, tensor in state.items() if name not in heads}
    weight = state.get(f"{names[0]}.weight")
    if weight is None or len(names) > 1 or weight.ndim != 2:
        return tower, None
    bias = state.get(f"{names[0]}.bias")
    return tower, Classifier(weight, torch.zeros(len(weight)) if bias is None else bias)


def _preprocess(model: nn.Module) -> Preprocess:
    import timm

    data = timm.data.resolve_model_data_config(model)
    height, width = data["input_size"][1:]
    return {
        "image_size": height if height == width else [height, width],
        "mean": list(data["mean"]),
        "std": list(data["std"]),
        "interpolation": data["interpolation"],
        "resize_mode": next(mode for mode, timms in CROP_MODES.items() if timms == data["crop_mode"]),
        "crop_pct": data["crop_pct"],
    }


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    import timm

    size: tuple[int, int, int] = timm.data.resolve_model_data_config(model)["input_size"]
    return size
