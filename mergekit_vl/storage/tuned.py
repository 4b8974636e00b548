"""Fine-tuned checkpoints, whoever wrote them, as adapters of a backbone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_vl.adapters import stored
from mergekit_vl.checkpoints.factors import factors
from mergekit_vl.checkpoints.foreign import method_of
from mergekit_vl.checkpoints.reader import open_checkpoint
from mergekit_vl.errors import UserError
from mergekit_vl.models.adapter import HasInit, ReadsOthers
from mergekit_vl.models.model import Single

if TYPE_CHECKING:
    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.adapter import Adapter
    from mergekit_vl.models.inputs import MergeInputs
    from mergekit_vl.registry.plugins import Registry


def load_tuned(path: Path, backbone: Backbone, registry: Registry, *, init: str | None = None) -> Adapter:
    """What a run wrote, by the adapter that its file tells; another file by the first adapter that recognises its tensors.

    `init` are the words that tuning started from, for adapters that start from words. Raises UserError for a file that is missing,
    damaged, of another architecture or of another width.
    """
    checkpoint = open_checkpoint(str(path))
    names, told = list(checkpoint.tensors), stored.facts(checkpoint).get("adapter")
    checkpoint.close()
    for line in checkpoint.told():
        warnings.warn(line, stacklevel=2)
    if told is None:
        _check_method({name: tensor.shape for name, tensor in checkpoint.tensors.items()}, path)
    found: Adapter
    if told is not None:
        found = registry.adapter(told).load(path, device=backbone.device)
    else:
        readers = [cls for cls in registry.adapters() if isinstance(cls, ReadsOthers)]
        found = next(cls for cls in readers if cls.recognises(names)).read(path, backbone)
    if init is not None and isinstance(found, HasInit):
        found = found.with_init(init)
    found.check(backbone)
    return found


def _check_method(shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise UserError for a file of a method that is not here, called what it is."""
    found = method_of(shapes)
    what = (
        f"{found.what}, a method that is not here"
        if found
        else "factors of low-rank updates (LoRA)"
        if factors(shapes)
        else ""
    )
    if not what:
        return
    hint = (
        "fold it into the model first, and give the folded weights"
        if not found
        else "read are contexts of CoOp and KgCoOp, linear heads and whole towers: load it by its own code"
    )
    raise UserError(f"it holds {what}: {', '.join(list(shapes)[:3])}", where=str(path), hint=hint)


def with_start(model: Single, inputs: MergeInputs) -> Single:
    """The model, told where its tuning began if its file did not tell."""
    adapter = model.adapter.started_from(inputs.base.adapter, model.backbone, inputs.data[0].classes)
    return model if adapter is model.adapter else Single(model.backbone, adapter)
