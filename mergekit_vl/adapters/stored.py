"""Adapters as safetensors files with one metadata key of canonical JSON (safetensors writes several keys in varying order)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired

from typing_extensions import TypedDict

from mergekit_vl.checkpoints import reader, torch_io
from mergekit_vl.checkpoints.reader import open_checkpoint
from mergekit_vl.checkpoints.writer import METADATA_KEY
from mergekit_vl.errors import UserError
from mergekit_vl.system.regular_files import check_shape

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.checkpoints.checkpoint import Checkpoint


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
    """`facts` name the `adapter`, the `backbone` and what else its class needs."""
    from safetensors.torch import save

    from mergekit_vl.system.atomic_files import write_bytes

    write_bytes(path, save(separate(tensors), metadata={METADATA_KEY: json.dumps(facts, sort_keys=True)}))


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: on the CPU, contiguous, no two of them in the same memory."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return out


class HeadFacts(TypedDict):
    names: list[str]
    normalise: bool
    unseen: Literal["refuse", "zero_shot"]
    chosen: NotRequired[dict[str, Any]]


class Facts(TypedDict, total=False):
    """What adapters tell of themselves, and trainings that go on."""

    adapter: str
    backbone: str
    init: str
    names: list[str]
    normalise: bool
    unseen: Literal["refuse", "zero_shot"]
    chosen: dict[str, Any]
    head: HeadFacts | None
    epoch: int
    best: float
    best_epoch: int
    done: int


def facts(checkpoint: Checkpoint) -> Facts:
    """What `write` told; nothing of a file that it did not write. Raises UserError for what no adapter tells."""
    found = reader.facts(checkpoint)
    return check_shape(found, Facts, what="its metadata are no adapter's", where=str(checkpoint.path))


def read(path: Path, adapter: str, device: str) -> tuple[dict[str, Tensor], Facts]:
    """Tensors and facts; raises UserError for a file of another kind, or with values that are not finite."""
    checkpoint = open_checkpoint(str(path))
    try:
        told = facts(checkpoint)
        if told.get("adapter") != adapter:
            raise UserError(f"this is not a {adapter}", where=str(path), hint="give a tuned model of a run")
        found = {name: tensor.to(device) for name, tensor in torch_io.tensors(checkpoint).items()}
    finally:
        checkpoint.close()
    torch_io.check_finite(found, where=str(path), hint="tune again with a lower lr")
    return found, told
