"""Fine-tuned checkpoints, whoever wrote them, as adapters of a backbone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_vl.adapters import stored
from mergekit_vl.adapters.linear_head import LinearHead
from mergekit_vl.adapters.prompt import DASSL_KEYS, Prompt
from mergekit_vl.adapters.tower import Tower
from mergekit_vl.checkpoints.reader import open_checkpoint
from mergekit_vl.checkpoints.torch_io import cast, check_finite, check_fits, read, without_made
from mergekit_vl.errors import UserError
from mergekit_vl.models.model import Single

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.inputs import MergeInputs
    from mergekit_vl.storage.model_files import AdapterClass


def load_tuned(path: Path, backbone: Backbone, adapter: AdapterClass, *, init: str | None = None) -> Any:
    """What a run wrote, a prompt of CoOp or KgCoOp, or weights of the backbone's architecture (all of them or the image tower's).

    A classifier among the weights becomes a linear head over the classes of the data set, in its order. Raises UserError for a
    file that is missing, damaged, of another architecture or of another width.
    """
    checkpoint = open_checkpoint(str(path))
    names, told = list(checkpoint.tensors), stored.facts(checkpoint).get("adapter")
    checkpoint.close()
    if told not in (None, "prompt"):
        found = adapter(told).load(path, device=backbone.device)
    elif told == "prompt" or "ctx" in names or set(names) & set(DASSL_KEYS):
        found = Prompt.load(path, device=backbone.device, init=init)
    else:
        found = _weights(read(path), backbone, where=str(path))
    found.check(backbone)
    return found


def with_start(model: Single, inputs: MergeInputs) -> Single:
    """The model, told where its tuning began if its file did not tell."""
    adapter = model.adapter.started_from(inputs.base.adapter, model.backbone, inputs.data[0].classes)
    return model if adapter is model.adapter else Single(model.backbone, adapter)


def _weights(state: Mapping[str, Tensor], backbone: Backbone, *, where: str) -> Tower:
    import torch

    own = backbone.model.state_dict()
    given, classifier = backbone.read(state)
    given = without_made(backbone.model, given)
    if all(name.startswith("visual.") for name in state):  # what reading adds for a whole model is not the file's
        given = {name: tensor for name, tensor in given.items() if name.startswith("visual.")}
    visual = {name: tensor for name, tensor in own.items() if name.startswith("visual.")}
    needed = visual if visual and given.keys() <= visual.keys() else own
    hint = "give weights that were tuned from the recipe's backbone"
    check_fits(needed, given, where=where, hint=hint, than=f" than {backbone.spec}")
    check_finite(state, where=where, hint="use an undamaged checkpoint")  # the classifier's too
    weights = {
        name: cast(tensor, own[name].dtype, name=name, where=where).to(own[name]) for name, tensor in given.items()
    }
    head = None
    if classifier is not None:
        weight, bias = (
            cast(tensor, torch.float32, name=f"classifier.{name}", where=where).to(backbone.device)
            for name, tensor in (("weight", classifier.weight), ("bias", classifier.bias))
        )
        head = LinearHead(weight, bias, (), normalise=False)
    elif backbone.text is None:
        raise UserError("no classifier is in it", where=where, hint="give a timm checkpoint with its classifier")
    return Tower(weights, head)
