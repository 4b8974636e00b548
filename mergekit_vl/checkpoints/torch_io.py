"""Reading checkpoints as torch tensors, and copying them into a module of the same architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from mergekit_vl.checkpoints.dtypes import NAMES, Array, float_code, narrowest, too_large
from mergekit_vl.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from mergekit_vl.checkpoints.checkpoint import Checkpoint


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint file or folder; raises UserError for a file that is not a checkpoint."""
    from mergekit_vl.checkpoints.reader import open_checkpoint

    checkpoint = open_checkpoint(str(path))
    try:
        return tensors(checkpoint)
    finally:
        checkpoint.close()


def read_told(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """As `read`, with what is to be told of how the file was read."""
    from mergekit_vl.checkpoints.reader import open_checkpoint

    checkpoint = open_checkpoint(str(path))
    try:
        return tensors(checkpoint), checkpoint.told()
    finally:
        checkpoint.close()


def under_names_of(
    wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], *, where: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors under the names that a model wants, where one prefix over all names is what they differ in; and what was done.

    What stands beside the prefix is left out. Tensors whose names no prefix explains come back as they are.
    """
    from mergekit_vl.checkpoints import prefixes

    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (wanted, given)]
    found, _ = prefixes.find(*shapes)
    if found is None:
        return dict(given), ()
    to = {name: renamed for name in given if (renamed := found.renamed(name)) is not None}
    beside = [name for name in given if name not in to]
    more = f"; {len(beside)} beside that prefix left out ({', '.join(beside[:3])})" if beside else ""
    return {to[name]: given[name] for name in to}, (f"{where}: {found.told()}{more}",)


def tensors(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The named tensors of a checkpoint (all of them by default), as they are stored. Tied ones share no memory."""
    checkpoint.check_recorded()
    out = {}
    for name in checkpoint.tensors if names is None else names:
        array, place = checkpoint.raw(name), checkpoint.tensors[name]
        out[name] = as_tensor(array, place.code).reshape(place.shape)
    return out


def as_tensor(array: Array, code: str) -> Tensor:
    """An array that is stored under `code` as a torch tensor; they share their memory."""
    import torch

    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if code == "BF16" else tensor


def load_into(module: nn.Module, given: Mapping[str, Tensor], *, where: str, hint: str) -> None:
    """Copy tensors into a module that has exactly those, in the module's dtypes; raises UserError with the first three that differ."""
    given = without_made(module, given)
    check_fits(module.state_dict(), given, where=where, hint=hint)
    check_finite(given, where=where, hint="use an undamaged checkpoint")
    own = module.state_dict()
    given = {name: cast(tensor, own[name].dtype, name=name, where=where) for name, tensor in given.items()}
    module.load_state_dict(given, strict=True)


def without_made(module: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without buffers that the module makes itself and does not store (a causal mask, say)."""
    made = dict(module.named_buffers()).keys() - module.state_dict().keys()
    return {name: tensor for name, tensor in given.items() if name not in made}


def check_fits(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], *, where: str, hint: str, than: str = ""
) -> None:
    """Raise UserError with the first three that differ, unless both hold the same names and shapes."""
    differing = []
    for name in [*own, *(name for name in given if name not in own)]:
        needed, found = (tuple(t[name].shape) if name in t else "missing" for t in (own, given))
        if needed != found:
            differing.append(f"{name} is {found} in the checkpoint, {needed} in the model")
    if differing and own.keys().isdisjoint(given):
        hint += f"; its names begin with {', '.join(list(given)[:3])}, and no one prefix makes them the model's"
    if differing:
        count = len(differing)
        raise UserError(
            f"a checkpoint of another architecture{than}, {count} tensor{'s' * (count > 1)} differ{'s' * (count == 1)}: "
            + "; ".join(differing[:3]),
            where=where,
            hint=hint,
        )


def cast(tensor: Tensor, dtype: torch.dtype, *, name: str, where: str) -> Tensor:
    """A tensor in another dtype; raises UserError where finite values become infinite."""
    made = tensor.to(dtype)
    if tensor.is_floating_point() and dtype.itemsize <= tensor.dtype.itemsize and dtype != tensor.dtype:
        lost = tensor[tensor.isfinite() & ~made.isfinite()].double()
        if len(lost):
            largest = float(lost[lost.abs().argmax()])
            raise UserError(
                too_large(name, float_code(str(dtype)), len(lost), largest),
                where=where,
                hint=f"{NAMES[narrowest(largest)]} would hold all: use smaller weights",
            )
    return made


def check_finite(given: Mapping[str, Tensor], *, where: str, hint: str) -> None:
    """Raise UserError for the first tensor with values that are not finite."""
    for name, tensor in given.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{name} has values that are not finite", where=where, hint=hint)
