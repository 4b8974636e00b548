"""Classifiers whose configs name the same classes in another order: their rows are read in the order of the first that names them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import numpy as np

from mergekit_vl.checkpoints.checkpoint import Checkpoint
from mergekit_vl.checkpoints.configs import class_names
from mergekit_vl.errors import UserError
from mergekit_vl.merging.chunks import Source

HEAD = re.compile(
    r"(?:^|\.)(?:classifier|cls_classifier|distillation_classifier|heads?|head_dist|fc|last_linear|linear_head|logits|score|output_layer)"
    r"(?:\.\w+)*\.(?:weight|bias)$"
)
"""Where libraries keep the classifier."""


def by_class_name(everyone: Sequence[Checkpoint], kept: Collection[str]) -> tuple[list[Source], list[str]]:
    """The models with their classifiers' rows in one order, and what was done in words.

    Raises UserError where two name different classes, or where no tensor is known to be the classifier.
    """
    named = {c.label: class_names(c.config) for c in everyone}
    first = next((c for c in everyone if named[c.label]), None)
    sources: list[Source] = list(everyone)
    if first is None:
        return sources, []
    from mergekit_vl.alignment.permuted import Permuted

    order, notes = named[first.label], []
    for i, other in enumerate(everyone):
        own = named[other.label]
        if not own or own == order or len(own) != len(order):  # of other numbers, the shapes tell
            continue
        heads = [
            name
            for name, tensor in other.tensors.items()
            if tensor.shape[:1] == (len(order),) and HEAD.search(name) and name not in kept
        ]
        matrices = [name for name in other.floats if name not in kept and other.tensors[name].shape[:1] == (len(own),)]
        if not heads and not matrices:  # the classifier is kept, or left out
            continue
        if sorted(own) != sorted(order) or len(set(own)) < len(own):
            alone = [name for name in own if name not in order] or ["two of one name"]
            raise UserError(
                f"{first.label} and {other.label} are classifiers of different classes: {other.label} has {alone[0]!r}",
                hint=f"--keep {_module(heads or matrices)} takes {everyone[0].label}'s classifier; `run` merges heads by class name",
            )
        if not heads:
            raise UserError(
                f"the configs of {first.label} and {other.label} name the same classes in another order, and no tensor is known to be the classifier",
                hint="--keep the classifier's tensors, or reorder one model's rows",
            )
        rows = np.array([own.index(name) for name in order])
        shapes = {name: tensor.shape for name, tensor in other.tensors.items()}
        sources[i] = Permuted(other, shapes, {name: {0: rows} for name in heads})
        notes.append(
            f"{other.label} names the classes of {first.label} in another order: its classifier's rows ({', '.join(heads)}) are read by class name"
        )
    return sources, notes


def _module(names: Sequence[str]) -> str:
    return names[0].rpartition(".")[0] or names[0]
