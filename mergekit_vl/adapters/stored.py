"""Adapters as files: safetensors with one metadata key of canonical JSON (several keys come out in any order)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_vl.errors import UserError
from mergekit_vl.output import METADATA_KEY

if TYPE_CHECKING:
    from torch import Tensor


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """`facts` name the `adapter`, the `backbone` and what else its class needs."""
    from safetensors.torch import save

    from mergekit_vl.files import write_bytes

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


def adapter_name(path: Path) -> str | None:
    """The adapter that a file holds, by its metadata; None for a file that `write` did not write."""
    from mergekit_vl.checkpoints import open_checkpoint

    checkpoint = open_checkpoint(str(path))
    facts = json.loads(checkpoint.metadata.get(METADATA_KEY, "{}"))
    checkpoint.close()
    return facts.get("adapter")


def read(path: Path, adapter: str, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts; raises UserError for a file of another kind, or with values that are not finite."""
    from mergekit_vl.checkpoints import open_checkpoint
    from mergekit_vl.loading import tensors

    checkpoint = open_checkpoint(str(path))
    facts = json.loads(checkpoint.metadata.get(METADATA_KEY, "{}"))
    if facts.get("adapter") != adapter:
        raise UserError(f"this is not a {adapter}", where=str(path), mend="give a tuned model of a run")
    found = {name: tensor.to(device) for name, tensor in tensors(checkpoint).items()}
    checkpoint.close()
    for name, tensor in found.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{name} has values that are not finite", where=str(path), mend="tune again with a lower lr"
            )
    return found, facts
