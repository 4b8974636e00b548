"""Makes the headers of models agree: one prefix over all names, buffers that every library makes itself, [1] against [], tensors that only some have.

Nothing is done without a word: every function gives the lines that tell it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mergekit_vl.checkpoints import prefixes
from mergekit_vl.checkpoints.checkpoint import Checkpoint
from mergekit_vl.checkpoints.dtypes import FLOATS
from mergekit_vl.checkpoints.factors import factors
from mergekit_vl.checkpoints.prefixes import same
from mergekit_vl.errors import UserError
from mergekit_vl.merge_files import positions
from mergekit_vl.merging.coefficients import matches

Tensors = Literal["same", "union", "intersection"]
CONSTANTS = (
    *(".position_ids", ".attn_mask", ".attention_mask", ".causal_attn_mask", ".causal_attention_mask", ".causal_mask"),
    *(".relative_position_index", ".relative_coords_table", ".token_prefix", ".token_suffix", ".n_averaged"),
    *(".rope.periods", ".rope.freqs", ".rotary_emb.inv_freq"),
)
"""Ends of the names of buffers that training does not change, or that belong to one list of class names: they are copied from the first model that has them."""
OPTIONAL = (".logit_bias", ".num_batches_tracked")
"""Not needed to compute the same classes: a model without it is like one with it."""
MATCHING = "merge models of one architecture, or --keep what differs as the first has it"


@dataclass(frozen=True)
class Matched:
    """The models under the first one's names, and what is only copied."""

    models: tuple[Checkpoint, ...]
    kept: frozenset[str]
    """Of the first model's names, those that are not merged."""
    copied_from: dict[str, Checkpoint] = field(default_factory=dict)
    """Tensors that the first model lacks, and the model that has them (`union`)."""
    notes: tuple[str, ...] = ()


def matched(everyone: Sequence[Checkpoint], keep: Sequence[str], tensors: Tensors, *, resize: bool = False) -> Matched:
    """The models, so that every tensor that is merged has one name and shape in all of them; raises UserError where they differ."""
    first, notes = everyone[0], []
    models = [first]
    kept = {name for name in first.tensors if any(matches(name, key) for key in keep)}
    for other in everyone[1:]:
        other, told = _under_names_of(first, other)
        notes += told
        if resize:
            other, told = positions.resized(first, other, kept)
            notes += told
        models.append(other)
    for key in keep:
        if not any(matches(name, key) for c in models for name in c.tensors):
            raise UserError(f"--keep {key} covers no tensor", hint="use a part of a tensor's name")
    models, told = _without_one_axes(models, kept)
    notes += told
    constants = {
        name for name in dict.fromkeys(name for c in models for name in c.tensors) if _is_constant(name, models)
    }
    if constants:
        lacking = [c.label for c in models if not constants <= c.tensors.keys()]
        notes.append(
            f"{_few(sorted(constants))}: no weights that training changes; taken as {first.label} has them"
            + (f", {', '.join(lacking)} lack{'s' * (len(lacking) == 1)} some" if lacking else "")
        )
    kept |= constants & first.tensors.keys()
    passed = {name for c in models[1:] for name in c.tensors if any(matches(name, key) for key in keep)} | constants
    _check_no_factors(models, kept | passed)
    common = set.intersection(*(set(c.tensors) for c in models))
    some = {name for c in models for name in c.tensors if name not in common and name not in kept | passed}
    copied_from: dict[str, Checkpoint] = {}
    if some and tensors == "union":
        copied_from = {
            name: c for c in reversed(models) for name in c.tensors if name in some and name not in first.tensors
        }
        kept |= some & first.tensors.keys()
        notes.append(f"--tensors union: {_few(sorted(some))} not in all models, taken from the first that has them")
    elif some and tensors == "intersection":
        notes.append(f"--tensors intersection: {_few(sorted(some))} not in all models, left out")
        models = [_only(c, set(c.tensors) - some) for c in models]
    _check_same(models, kept, passed if tensors == "same" else passed | some, everyone)
    return Matched(tuple(models), frozenset(kept), copied_from, tuple(notes))


def _is_constant(name: str, models: Sequence[Checkpoint]) -> bool:
    end = f".{name}"
    return end.endswith(CONSTANTS) or (end.endswith(OPTIONAL) and any(name not in c.tensors for c in models))


def _under_names_of(first: Checkpoint, other: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """The other model with the names of the first, where one prefix over all names is what they differ in."""
    other, mapped = _of_transformers(first, other)
    wanted, given = shapes(first), shapes(other)
    found, _ = prefixes.find(wanted, given)
    if found is None:
        return other, mapped
    to = {name: renamed for name in given if (renamed := found.renamed(name)) is not None}
    beside = [name for name in given if name not in to]
    told = [*mapped, f"{other.label}: {found.told()}, as {first.label} has them"]
    if beside:
        told.append(f"{other.label}: {_few(beside)} beside that prefix: left out")
    return other.renamed(to), told


CLIP_MODEL = "text_model.final_layer_norm.weight"
OPEN_CLIP = "ln_final.weight"


def _of_transformers(first: Checkpoint, other: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """A CLIPModel of transformers under open_clip's names, in memory, where the first model has those; raises UserError for the other way round."""
    ours, theirs = (
        [any(n.endswith(sign) for n in c.tensors) for sign in (OPEN_CLIP, CLIP_MODEL)] for c in (first, other)
    )
    if ours == [False, True] and theirs == [True, False]:
        raise UserError(
            f"{first.label} has transformers' names and {other.label} open_clip's",
            hint=f"name {other.label} first, or as --base: transformers' names are mapped to open_clip's",
        )
    if ours != [True, False] or theirs != [False, True]:
        return other, []
    from mergekit_vl.backbones.huggingface_names import from_clip_model, prefix_of_clip_model
    from mergekit_vl.checkpoints.pickles import from_torch
    from mergekit_vl.checkpoints.torch_io import tensors

    state = tensors(other)
    prefix = prefix_of_clip_model(state)
    state = from_clip_model({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    held = from_torch(state, str(other.path), other.label)
    made = replace(other, tensors=held.tensors, arrays=held.arrays, twins=held.twins, config=None)
    return made, [f"{other.label}: transformers' names of a CLIPModel are read as open_clip's"]


def _only(checkpoint: Checkpoint, names: Collection[str]) -> Checkpoint:
    return checkpoint.renamed({name: name for name in checkpoint.tensors if name in names})


def _without_one_axes(models: Sequence[Checkpoint], kept: Collection[str]) -> tuple[list[Checkpoint], list[str]]:
    """One number is one number: a tensor of shape [1] or [] is read in the first model's shape."""
    first, out, notes = models[0], [models[0]], []
    for other in models[1:]:
        odd = {
            name: replace(tensor, shape=first.tensors[name].shape)
            for name, tensor in other.tensors.items()
            if name in first.tensors and name not in kept and not tensor.strides
            if tensor.shape != first.tensors[name].shape and same(tensor.shape, first.tensors[name].shape)
        }
        if odd:
            name = next(iter(odd))
            before, now = list(other.tensors[name].shape), list(first.tensors[name].shape)
            notes.append(f"{other.label}: {_few(list(odd))} of shape {before} read as {now}, the same numbers")
            other = replace(other, tensors={**other.tensors, **odd})
        out.append(other)
    return out, notes


def _check_no_factors(models: Sequence[Checkpoint], passed: Collection[str]) -> None:
    for i, each in enumerate(models):
        if i and shapes(each) == shapes(models[0]):
            continue
        found = [name for name in factors(shapes(each)) if name not in passed]
        if found:
            raise UserError(
                f"{each.label} holds factors of low-rank updates (LoRA), {_few(found)}: the mean of A and of B is not the mean of B A",
                where=str(each.path),
                hint="fold each adapter into its model first (in PEFT merge_and_unload(), else W + alpha / r * B A), and merge the folded models",
            )


def shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in checkpoint.tensors.items()}


def _check_same(
    models: Sequence[Checkpoint], kept: Collection[str], passed: Collection[str], given: Sequence[Checkpoint]
) -> None:
    first = models[0]
    for other, before in zip(models[1:], given[1:]):
        differing, missing = [], 0
        for name in [*first.tensors, *(n for n in other.tensors if n not in first.tensors)]:
            if name in kept or (name not in first.tensors and name in passed):
                continue
            shown = [c.tensors[name].shape if name in c.tensors else "missing" for c in (first, other)]
            kinds = [c.tensors[name].code in FLOATS for c in (first, other) if name in c.tensors]
            if shown[0] != shown[1]:
                differing.append(f"{name}: {shown[0]} against {shown[1]}")
                missing += "missing" in shown
            elif len(set(kinds)) > 1:
                differing.append(f"{name}: {first.tensors[name].code} against {other.tensors[name].code}")
        if differing:
            more = f" and {len(differing) - 3} more tensors" if len(differing) > 3 else ""
            raise UserError(
                f"{first.label} and {other.label} differ in {'; '.join(differing[:3])}{more}",
                hint=_hint(first, before if missing else other, differing, missing),
            )


def _hint(first: Checkpoint, other: Checkpoint, differing: Sequence[str], missing: int) -> str:
    for name in [n for n in first.tensors if n in other.tensors and positions.is_position(n)]:
        if what := positions.told(name, first.tensors[name].shape, other.tensors[name].shape):
            return f"{name} is of {what}; --resize-pos-embed interpolates it to {first.label}'s, as open_clip does"
    if missing == len(differing) and first.tensors.keys() & other.tensors.keys():
        return "--tensors intersection merges what both have, union copies the rest from the model that has it"
    if missing and first.tensors.keys().isdisjoint(other.tensors):
        _, tried = prefixes.find(shapes(first), shapes(other))
        what = f"tried the prefix {tried[0].given!r}" if tried else "no prefix makes them the same"
        if len(tried) > 1 and tried[0].wanted == tried[1].wanted:
            what = f"prefixes {tried[0].given!r} and {tried[1].given!r} fit equally well"
        keys = [", ".join(list(c.tensors)[:2]) for c in (first, other)]
        return f"{first.label} begins with {keys[0]}; {other.label} with {keys[1]}; {what}: {MATCHING}"
    return MATCHING


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
