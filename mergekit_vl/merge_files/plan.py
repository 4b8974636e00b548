"""The plan of a merge of files, and its models as checkpoints whose headers agree. No tensor is read here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mergekit_vl.checkpoints.checkpoint import Checkpoint
from mergekit_vl.checkpoints.configs import differing_settings
from mergekit_vl.checkpoints.dtypes import FLOATS, NAMES, float_code
from mergekit_vl.checkpoints.foreign import method_of
from mergekit_vl.checkpoints.reader import open_checkpoint, taking
from mergekit_vl.checkpoints.writer import Slot
from mergekit_vl.errors import UserError
from mergekit_vl.merge_files.classes import by_class_name
from mergekit_vl.merge_files.matching import Tensors, matched
from mergekit_vl.merging.chunks import Models, Tensor
from mergekit_vl.merging.coefficients import depths, matches
from mergekit_vl.merging.engine import checked
from mergekit_vl.merging.method import ClosedForm, MethodInfo

if TYPE_CHECKING:
    from mergekit_vl.alignment.symmetries import Symmetries


@dataclass(frozen=True)
class MergePlan:
    """A merge of files as plain data: models, base, method, output dtype. It can be built without the command line."""

    strategy: str
    method: ClosedForm
    models: tuple[str, ...]
    base: str | None = None
    labels: tuple[str, ...] = ()
    base_label: str = ""
    seed: int = 0
    dtype: str | None = None
    keep: tuple[str, ...] = ()
    """Tensors that are not merged but taken from the base (or the first model) as they are: filters as in `coefficients`."""
    rebasin: bool = False
    """Whether every model but the base (or the first) is first reordered to match that one."""
    device: str = "cpu"
    """Where matrices are decomposed: cpu, or a GPU as torch names it."""
    tensors: Tensors = "same"
    """Which tensors the output has where the models differ: none are allowed to, all that any model has, or those that all have."""
    resize_pos_embed: bool = False
    """Whether position embeddings of another image size or context length are interpolated to those of the base (or the first)."""
    weights: str = "plain"
    """Of files that hold several sets of weights, which are taken: plain, ema, or the key of one."""


@dataclass
class AlignedCheckpoints:
    """The plan's models, opened and checked: the tensors to merge, the tensors to copy, and warnings."""

    plan: MergePlan
    info: MethodInfo
    base: Checkpoint | None
    tuned: tuple[Checkpoint, ...]
    models: Models
    copied: tuple[str, ...]
    slots: tuple[Slot, ...]
    notes: list[str] = field(default_factory=list)
    copied_from: dict[str, Checkpoint] = field(default_factory=dict)
    """Of `copied`, those that the reference lacks, and the model that has them."""
    recognised: tuple[str, ...] = ()
    """What was read in another form than it is stored in, a line each."""
    symmetries: Symmetries | None = None
    """Where the models are aligned first: the reorderings that are tried."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {tensor.name: tensor.shape for tensor in self.models.tensors}

    @property
    def all(self) -> tuple[Checkpoint, ...]:
        return (*((self.base,) if self.base else ()), *self.tuned)

    @property
    def reference(self) -> Checkpoint:
        return self.all[0]

    def close(self) -> None:
        for checkpoint in self.all:
            checkpoint.close()


def open_plan(plan: MergePlan) -> AlignedCheckpoints:
    """Read every header; raises UserError for models that cannot be merged. Reads no tensor."""
    with taking(plan.weights):
        tuned = tuple(
            open_checkpoint(given, label) for given, label in zip(plan.models, plan.labels or ("",) * len(plan.models))
        )
        base = open_checkpoint(plan.base, plan.base_label) if plan.base is not None else None
    return aligned(plan, base, tuned)


def aligned(plan: MergePlan, base: Checkpoint | None, tuned: tuple[Checkpoint, ...]) -> AlignedCheckpoints:
    """The plan on checkpoints that are open, or held in memory; raises UserError for what cannot be merged; reads no tensor."""
    found = matched((*((base,) if base else ()), *tuned), plan.keep, plan.tensors, resize=plan.resize_pos_embed)
    everyone, kept = found.models, found.kept
    base, tuned = (everyone[0] if base else None), everyone[1 if base else 0 :]
    reference = everyone[0]
    sources, told = by_class_name(everyone, kept)
    tensors = _tensors(everyone, kept)
    merged = {tensor.name for tensor in tensors}
    labels = tuple(checkpoint.label for checkpoint in tuned)
    models = Models(
        sources[0] if base else None,
        tuple(sources[1 if base else 0 :]),
        tensors,
        labels,
        plan.seed,
        base.label if base else "zero-shot",
        plan.device,
    )
    copied = tuple(name for name in reference.tensors if name not in merged)
    info = checked(plan.method, models)
    opened = AlignedCheckpoints(
        plan,
        info,
        base,
        tuned,
        models,
        (*copied, *found.copied_from),
        _slots(plan, reference, found.copied_from),
        copied_from=found.copied_from,
        recognised=(*(f"{c.label}: {note}" for c in everyone for note in c.notes), *found.notes, *told),
    )
    opened.recognised += tuple(_kept(opened))
    opened.recognised += tuple(
        f"{c.label} holds {method.what}: merged as plain tensors"
        for c in opened.all
        if (method := method_of(c.tensors))
    )
    opened.notes = _notes(opened)
    if plan.rebasin:
        opened.symmetries = _symmetries(opened, kept)
        opened.notes += opened.symmetries.notes
    return opened


def _tensors(everyone: tuple[Checkpoint, ...], kept: Collection[str]) -> tuple[Tensor, ...]:
    """The float tensors that are merged, with the dtype of the arithmetic."""
    reference = everyone[0]
    floats = [name for name in reference.floats if name not in kept]
    if not floats:
        raise UserError("holds no float tensor to merge", where=reference.label)
    deep = depths(floats)

    def dtype(name: str) -> np.dtype:
        return np.dtype(np.float64 if any(c.tensors[name].code == "F64" for c in everyone) else np.float32)

    return tuple(
        Tensor(name, reference.tensors[name].shape, deep[name], dtype(name), reference.twins.get(name, ""))
        for name in floats
    )


def _slots(plan: MergePlan, reference: Checkpoint, copied_from: Mapping[str, Checkpoint]) -> tuple[Slot, ...]:
    """The tensors of the output, as they are stored."""
    code = float_code(plan.dtype) if plan.dtype is not None else None
    return tuple(
        Slot(name, code if code and stored.code in FLOATS else stored.code, stored.shape)
        for name, stored in [
            *reference.tensors.items(),
            *((name, checkpoint.tensors[name]) for name, checkpoint in copied_from.items()),
        ]
    )


def _symmetries(opened: AlignedCheckpoints, kept: Collection[str]) -> Symmetries:
    from mergekit_vl.alignment.symmetries import find, heads_told

    if len(opened.all) < 2:
        raise UserError("--rebasin has one model and none that it is to match", hint="name more models, or a --base")
    reference = opened.reference
    heads = next((told for c in opened.all if (told := heads_told(c.config))), {})
    return find({name: reference.tensors[name].shape for name in reference.floats}, heads, set(kept))


def warnings(opened: AlignedCheckpoints) -> list[str]:
    """What is done but may not be what was meant: `check` tells it, and `merge` warns of it."""
    plan, files = opened.plan, [path for c in opened.all for path in c.files]
    found = []
    if opened.info.by_task:
        found.append(
            f"no task=LABEL: {plan.strategy} writes the vector of all tasks unmasked, which it does not use by itself"
        )
    if opened.base and opened.info.ignores_base:
        found.append(f"{plan.strategy} merges the tuned models alone: of the base it takes nothing but integer tensors")
    settings = differing_settings([(c.label, c.config) for c in opened.all])
    if settings:
        giver = next(c.label for c in opened.all if c.config)
        more = f" and {len(settings) - 4} more" if len(settings) > 4 else ""
        found.append(
            f"the models' configs differ: {'; '.join(settings[:4])}{more}; the merged model gets the config of {giver}"
        )
    found += [
        f"{c.label} holds averaged weights too ({c.passed_over}), which are not taken: --weights ema takes them"
        for c in opened.all
        if c.passed_over
    ]
    if len(set(files)) < len(files):
        found.append("the same file is given twice")
    return found


def _kept(opened: AlignedCheckpoints) -> list[str]:
    """For each --keep, how many tensors it covers, and how many are merged."""
    lines = []
    reference, n = opened.reference, len(opened.models.tensors)
    for key in opened.plan.keep:
        names = [name for name in reference.tensors if matches(name, key)]
        share = sum(reference.tensors[name].size for name in names) / max(
            1, sum(t.size for t in reference.tensors.values())
        )
        some = f": {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if names else ""
        lines.append(
            f"--keep {key}: {len(names)} of {len(reference.tensors)} tensors ({100 * share:.1f}% of the elements){some}, "
            f"are {reference.label}'s; {n} are merged"
        )
    return lines


def _notes(opened: AlignedCheckpoints) -> list[str]:
    reference, plan = opened.reference, opened.plan
    notes = [*opened.recognised, *warnings(opened)]
    whole = [name for name in opened.copied if name in reference.tensors and reference.tensors[name].code not in FLOATS]
    if whole:
        notes.append(
            f"{len(whole)} integer tensors ({', '.join(whole[:3])}{' ...' if len(whole) > 3 else ''}) come from {reference.label}"
        )
    dtypes = {c.label: sorted({t.code for t in c.tensors.values() if t.code in FLOATS}) for c in opened.all}
    if len({tuple(codes) for codes in dtypes.values()}) > 1:
        told = "; ".join(f"{label} {'+'.join(NAMES[c] for c in codes)}" for label, codes in dtypes.items())
        notes.append(f"dtypes differ: {told}; merged in float32, written as {plan.dtype or f'in {reference.label}'}")
    twins = {c.label: len(c.twins) for c in opened.all if c.twins}
    if twins:
        notes.append(
            f"tied weights: {', '.join(f'{k} in {label}' for label, k in twins.items())}; written as separate tensors"
        )
    return notes
