"""Text towers that ship with few rows of open_clip's vocabulary: those that training saw, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

TABLE, IDS = "token_embedding.weight", "token_ids"


def write(state: Mapping[str, Tensor], ids: Tensor, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write fp16 tensors to a safetensors file; `state`'s token embedding has the rows of `ids` only, in that order."""
    import torch
    from safetensors.torch import save_file

    from mergekit_vl.checkpoints.torch_io import cast

    out = {**{k: v.detach() for k, v in state.items() if k != "attn_mask"}, IDS: ids}
    kinds = {k: torch.float16 if v.is_floating_point() else torch.int32 for k, v in out.items()}
    save_file({k: cast(v, kinds[k], name=k, where=str(path)).contiguous() for k, v in out.items()}, path, metadata)


def read(path: Path, vocabulary: int) -> tuple[dict[str, Tensor], Tensor]:
    """A file of `write` in float32 with all [vocabulary, W] rows of the token embedding, and the ids of the known ones.

    The other rows are drawn from the seeded distribution of the known ones.
    """
    import torch
    from safetensors.torch import load_file

    state = {k: v.float() if v.is_floating_point() else v.long() for k, v in load_file(path).items()}
    ids, rows = state.pop(IDS), state[TABLE]
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(vocabulary, rows.shape[1], generator=generator) * rows.std(0) + rows.mean(0)
    table[ids] = rows
    state[TABLE] = table
    return state, ids
