"""Estimate the BatchNorm statistics of a merged tower again, from images.

Merged weights give other activations than any of the models that were merged, so no mean of their statistics fits: Jordan et al. 2023
("REPAIR", arXiv 2211.08403, section 3.1, the reset of BatchNorm), and before them SWA (Izmailov et al. 2018, arXiv 1803.05407, section 3.2).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from mergekit_vl.errors import Failed
from mergekit_vl.merging.engine import BATCH_NORM
from mergekit_vl.models.model import ImageEncoder, Single
from mergekit_vl.models.views import eval_view, prefetched

if TYPE_CHECKING:
    from mergekit_vl.datasets.base import ImageSource
    from mergekit_vl.models.inputs import MergeInputs


@torch.no_grad()
def estimated(model: Single, inputs: MergeInputs) -> Single:
    """A tower with the statistics of its own activations on the training images of all tasks (test views), labels unread.

    Nothing is drawn: of n images every ceil(n / block)-th makes a block, so that blocks hold all tasks and classes and are of one size
    to within one image, and each block counts equally. `block` is how many images the backbone encodes at once.
    """
    tower, backbone = model.adapter, model.backbone
    made = model.encoders[0].backbone.with_weights({})  # a copy
    norms = [m for m in made.image.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    tasks = {id(task): task for task in inputs.data}.values()
    images = [(task.train.source, int(row)) for task in tasks for row in task.train.rows]
    if not norms or len(images) < 2:
        return model
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over blocks
        norm.train()
    path, blocks = ImageEncoder(made), math.ceil(len(images) / made.block)
    for number in range(blocks):
        block = images[number::blocks]

        def view(i: int, block: list[tuple[ImageSource, int]] = block) -> torch.Tensor:
            source, row = block[i]
            return eval_view(source.load(row), path)

        made.image(next(prefetched(view, len(block), len(block))).to(made.device))
        inputs.reporter.progress(number + 1, blocks, "BatchNorm statistics")
    state = made.model.state_dict()
    found = {name: state[name] for name in tower.tensors if BATCH_NORM.search(name)}
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise Failed(
                f"the merged model's activations are not finite at {name}",
                where="BatchNorm statistics",
                hint="use smaller weights",
            )
    return Single(backbone, tower.with_tensors({**tower.tensors, **found}))
