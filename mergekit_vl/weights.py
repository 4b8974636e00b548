"""The algebra of models whose tensors agree in name, shape and space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergekit_vl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.model import Model, Single
    from mergekit_vl.strategy import MergeInputs

Tensors = Mapping[str, "Tensor"]


def check_aligned(models: Sequence[Tensors], names: Sequence[str]) -> None:
    """Raise UserError with the first three tensors that differ in name or shape."""
    first = models[0]
    for name, other in zip(names[1:], models[1:]):
        differing = []
        for key in sorted(first.keys() | other.keys()):
            shapes = [tuple(m[key].shape) if key in m else "missing" for m in (first, other)]
            if shapes[0] != shapes[1]:
                differing.append(f"{key}: {shapes[0]} against {shapes[1]}")
        if differing:
            raise UserError(
                f"{names[0]} and {name} differ in {'; '.join(differing[:3])}",
                mend="merge models of one architecture and one adapter",
            )


def linear_sum(models: Sequence[Tensors], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum_i weights_i * models_i for each tensor, accumulated in float32 or better, in the order given."""
    import torch

    out = {}
    for key, tensor in models[0].items():
        wide = torch.promote_types(tensor.dtype, torch.float32)
        total = torch.zeros_like(tensor, dtype=wide)
        for model, weight in zip(models, weights):
            total += weight * model[key].to(wide)
        out[key] = total.to(tensor.dtype)
    return out


def anchors(inputs: MergeInputs) -> tuple[Single, tuple[Single, ...]]:
    """The zero-shot point in the space of the tuned models, and the tuned models; checked to be of one space and shape."""
    from mergekit_vl.model import Single

    tuned = inputs.tuned
    if not tuned:
        raise UserError("there is no fine-tuned model to merge", mend="name at least one under `tuned`")
    for model in tuned:
        if not isinstance(model, Single):
            raise UserError(
                f"a {type(model).__name__.lower()} has no tensors of its own to merge", mend="merge its members"
            )
    first = tuned[0]
    assert isinstance(first, Single)
    start = first.adapter.anchor(first.backbone)
    spaces = [m.adapter.space for m in tuned]  # type: ignore[attr-defined]
    if len(set(spaces)) > 1:
        raise UserError(
            f"models of different spaces cannot be merged: {', '.join(spaces)}",
            mend="merge in the space `features`, or ensemble them",
        )
    check_aligned(
        [start.tensors, *(m.adapter.tensors for m in tuned)], ["zero-shot", *(f"tuned.{i}" for i in range(len(tuned)))]
    )  # type: ignore[attr-defined]
    return Single(first.backbone, start), tuned  # type: ignore[return-value]


def as_model(like: Model, tensors: Tensors) -> Single:
    """A model like `like`, with other tensors."""
    from mergekit_vl.model import Single

    assert isinstance(like, Single)
    return Single(like.backbone, like.adapter.with_tensors(tensors))
