"""Fine-tuned checkpoints, whoever wrote them, as adapters of a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_vl.adapters import stored
from mergekit_vl.checkpoints.reader import open_checkpoint
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


def with_start(model: Single, inputs: MergeInputs) -> Single:
    """The model, told where its tuning began if its file did not tell."""
    adapter = model.adapter.started_from(inputs.base.adapter, model.backbone, inputs.data[0].classes)
    return model if adapter is model.adapter else Single(model.backbone, adapter)
