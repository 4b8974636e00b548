"""`mergekit_vl.merge`: models in, a model out, by the engine of the command `merge`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from mergekit_vl import options
from mergekit_vl.api.notebook import PYTHON_WARNINGS
from mergekit_vl.checkpoints.pickles import from_torch
from mergekit_vl.checkpoints.reader import distinct, label_of, open_checkpoint
from mergekit_vl.checkpoints.torch_io import as_tensor, read
from mergekit_vl.checkpoints.writer import claimed
from mergekit_vl.errors import UserError, unknown
from mergekit_vl.merge_files import streaming
from mergekit_vl.merge_files.matching import Tensors
from mergekit_vl.merge_files.plan import AlignedCheckpoints, MergePlan, aligned
from mergekit_vl.merging.method import ClosedForm, MethodInfo, info_of
from mergekit_vl.registry.plugins import registry
from mergekit_vl.system.devices import check_device, device_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mergekit_vl.checkpoints.checkpoint import Checkpoint
    from mergekit_vl.merge_files.provenance import Metadata

    StateDict: TypeAlias = Mapping[str, Tensor]
    Mergeable: TypeAlias = StateDict | nn.Module | str | Path
    """A state dict, a module, or a model on disk as the command takes it."""

WHERE = "merge"


@dataclass(frozen=True)
class MergedFolder:
    """What `merge` wrote."""

    folder: Path
    metadata: Metadata
    """The resolved recipe, and the hashes of the inputs."""

    def state_dict(self) -> dict[str, Tensor]:
        """The merged tensors, read from the folder."""
        return read(self.folder)

    def __repr__(self) -> str:
        of = ", ".join(m["label"] for m in (self.metadata["base"], *self.metadata["models"]) if m)
        return f"<{self.metadata['strategy']} of {of}: {self.folder}>"


def check_models(
    models: object, base: object, strategy: str | ClosedForm, method_options: Mapping[str, object]
) -> list[str]:
    """What `merge` would do, from headers alone: a line each. Raises UserError for what cannot be merged."""
    from mergekit_vl.merge_files.forecast import described

    plan, given = _planned(models, base, strategy, method_options)
    opened = _opened(plan, base, given)
    try:
        return [*described(opened), *(f"note      {note}" for note in opened.notes)]
    finally:
        opened.close()


def _planned(
    models: object,
    base: object,
    strategy: str | ClosedForm,
    method_options: Mapping[str, object],
    *,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    keep: str | Sequence[str] = (),
    rebasin: bool = False,
    device: str = "auto",
    tensors: Tensors = "same",
    resize_pos_embed: bool = False,
) -> tuple[MergePlan, list[object]]:
    """The plan, and the models that it merges; reads none of them."""
    given, labels = _labelled(models)
    base_label = "" if base is None else _label(base, "base")
    labels = distinct([*([base_label] if base_label else []), *labels])[1 if base_label else 0 :]
    method, name = _method(strategy, method_options, labels, base_label)
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    if "" in keep:
        raise UserError("keep='' is part of every name", where=WHERE, hint="give a part of the names to be kept")
    return MergePlan(
        name,
        method,
        tuple(_place(model, label) for model, label in zip(given, labels)),
        None if base is None else _place(base, base_label),
        tuple(labels),
        base_label,
        seed,
        None if dtype is None else str(dtype),
        keep,
        rebasin,
        _device(method, len(given), device),
        tensors,
        resize_pos_embed,
    ), given


@overload
def merge(
    models: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module],
    base: Mergeable | None = None,
    strategy: str | ClosedForm = "ties",
    out: None = None,
    **more: Any,
) -> nn.Module: ...
@overload
def merge(
    models: Mergeable | Sequence[Mergeable] | Mapping[str, Mergeable],
    base: Mergeable | None = None,
    strategy: str | ClosedForm = "ties",
    out: None = None,
    **more: Any,
) -> dict[str, Tensor]: ...
@overload
def merge(
    models: Mergeable | Sequence[Mergeable] | Mapping[str, Mergeable],
    base: Mergeable | None = None,
    strategy: str | ClosedForm = "ties",
    *,
    out: str | Path,
    **more: Any,
) -> MergedFolder: ...
def merge(
    models: Any,
    base: Any = None,
    strategy: str | ClosedForm = "ties",
    out: str | Path | None = None,
    *,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    keep: str | Sequence[str] = (),
    rebasin: bool = False,
    tensors: Tensors = "same",
    resize_pos_embed: bool = False,
    device: str = "auto",
    threads: int | None = None,
    max_ram: int | None = None,
    shard_size: int | None = None,
    force: bool = False,
    **method_options: Any,
) -> Any:
    """Merge models with a closed-form strategy; the inputs stay as they are.

    `models` is a list of state dicts, of nn.Modules, or of paths (files, folders, hf-hub:ORG/NAME, open_clip:ARCH/TAG); they may be
    mixed, and a mapping gives each a label: `{"cars": a, "pets": b}`. `base` is the model that they were tuned from. `strategy` is a
    registered name, or a method itself: `Ties(density=0.3)`. Whatever else is given by name is an option of the strategy
    (`list_strategies()["ties"].options`); weights may be a list, or a mapping by label.

    What comes back: a new module, like the base or the first that is one, where models are modules; else a state dict on the device of the base or first
    model. With `out`, models are written into that folder as the command `merge` writes them, and a MergedFolder comes back.
    Tensors and files have the bytes of the command's.

    `seed` is of random draws, `dtype` of the result (default: each tensor as the base or first model has it), `keep` are parts of names
    of tensors that are taken from there unmerged, `tensors` says which the result has where models differ (`union`, `intersection`), `resize_pos_embed` interpolates position embeddings of another image size, `rebasin` reorders units, heads and channels to match it first, `device` is where
    SVDs are taken, `max_ram` and `shard_size` are bytes, `force` replaces an earlier merge in `out`.

    Raises UserError for models that do not fit each other, for options that do not fit the models, and for a merge that fails.
    """
    plan, given = _planned(
        models,
        base,
        strategy,
        method_options,
        seed=seed,
        dtype=dtype,
        keep=keep,
        rebasin=rebasin,
        device=device,
        tensors=tensors,
        resize_pos_embed=resize_pos_embed,
    )
    everyone = [*([base] if base is not None else []), *given]
    if out is not None:
        folder = Path(out).expanduser()
        with claimed(folder, force=force):
            metadata = streaming.merge_opened(
                _opened(plan, base, given),
                folder,
                threads=threads,
                max_ram=max_ram,
                shard_size=shard_size,
                reporter=PYTHON_WARNINGS,
            )
        return MergedFolder(folder, metadata)
    opened = _opened(plan, base, given)
    merged = streaming.merge_into_arrays(opened, threads=threads, max_ram=max_ram, reporter=PYTHON_WARNINGS)
    return _like(everyone, {slot.name: as_tensor(merged[slot.name], slot.code) for slot in opened.slots})


def _labelled(models: Any) -> tuple[list[object], list[str]]:
    """Models and their labels; one model may stand alone."""
    if isinstance(models, Mapping) and not _is_state_dict(models):
        return list(models.values()), [str(label) for label in models]
    given = [models] if isinstance(models, (str, Path, Mapping)) or _is_module(models) else list(models)
    if not given:
        raise UserError("no model to merge", where=WHERE, hint="give a list of state dicts, modules or paths")
    return given, [_label(model, f"model-{i}") for i, model in enumerate(given, 1)]


def _is_state_dict(models: Mapping[str, object]) -> bool:
    """Whether it is one model, and no mapping of labels to models."""
    return bool(models) and not any(
        isinstance(each, (Mapping, str, Path)) or _is_module(each) for each in models.values()
    )


def _is_module(model: object) -> bool:
    from torch import nn

    return isinstance(model, nn.Module)


def _label(model: object, otherwise: str) -> str:
    return label_of(str(model)) if isinstance(model, (str, Path)) else otherwise


def _method(
    strategy: str | ClosedForm, given: Mapping[str, object], labels: Sequence[str], base_label: str
) -> tuple[ClosedForm, str]:
    """The method with its options, and the name that it is registered by."""
    if not isinstance(strategy, str):
        if given:
            raise UserError(
                f"{next(iter(given))}= beside a strategy that is made", where=WHERE, hint="give it to the class"
            )
        info = info_of(type(strategy))
        if info is None:
            raise UserError(f"{strategy!r} is no closed form", where=WHERE, hint="use `mergekit_vl.run` with it")
        return strategy, info.name
    cls = registry().find("strategies", strategy, where=WHERE).resolve()
    info = info_of(cls)
    if info is None:
        raise UserError(f"{strategy} needs data or an evaluation", where=WHERE, hint="use `mergekit_vl.run` with it")
    chosen = {key.rstrip("_"): value for key, value in given.items()}
    if isinstance(weights := chosen.get(info.weights), Mapping):
        chosen[info.weights] = _by_label(weights, info, labels, base_label)
    return options.build(cls, chosen, where=f"strategy {strategy}"), strategy


def _by_label(weights: Mapping[str, object], info: MethodInfo, labels: Sequence[str], base_label: str) -> list[object]:
    weighed = [*([base_label] if info.weighs_base and base_label else []), *labels]
    for label in weights:
        if label not in weighed:
            raise unknown("model", label, weighed, where=f"strategy {info.name}: {info.weights}")
    if missing := [label for label in weighed if label not in weights]:
        raise UserError(f"{missing[0]} has no weight", where=f"strategy {info.name}", hint="give one for each model")
    return [weights[label] for label in weighed]


def _device(method: ClosedForm, n: int, asked: str) -> str:
    """Where SVDs of n models are taken; a method without one stays on the CPU."""
    check_device(asked)
    return device_of(asked) if method.describe(n).svds else "cpu"


def _place(model: object, label: str) -> str:
    return str(model) if isinstance(model, (str, Path)) else label


def _opened(plan: MergePlan, base: object, models: Sequence[object]) -> AlignedCheckpoints:
    tuned = tuple(_checkpoint(model, label) for model, label in zip(models, plan.labels))
    return aligned(plan, None if base is None else _checkpoint(base, plan.base_label), tuned)


def _checkpoint(model: object, label: str) -> Checkpoint:
    """Headers of a model on disk; a state dict, or a module's, as it is held."""
    if isinstance(model, (str, Path)):
        return open_checkpoint(str(model), label)
    import torch

    state = model.state_dict() if isinstance(model, torch.nn.Module) else model
    if not isinstance(state, Mapping):
        raise UserError(
            f"a {type(model).__name__} is not a model", where=label, hint="give a state dict, a module or a path"
        )
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{name} is a {type(tensor).__name__}, not a tensor",
                where=label,
                hint="give the state dict alone: checkpoint['state_dict'], for instance",
            )
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            raise UserError(
                f"{name} is a tensor without values of its own ({tensor.layout}, {tensor.device})", where=label
            )
    return from_torch(state, label, label)


def _like(models: Sequence[object], merged: Mapping[str, Tensor]) -> Any:
    """A state dict on the devices of the first model, or a new module like the first that is one."""
    import torch

    module = next((model for model in models if isinstance(model, torch.nn.Module)), None)
    if module is None:
        state = models[0] if isinstance(models[0], Mapping) else {}
        return {name: tensor.to(state[name].device) if name in state else tensor for name, tensor in merged.items()}
    made = copy.deepcopy(module)
    for name, tensor in made.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(merged[name].dtype)
    made.load_state_dict(merged)
    return made
