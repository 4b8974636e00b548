"""The record of a merge of files: the resolved recipe with the hashes of the inputs, in the output's metadata and as a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, cast

from typing_extensions import TypedDict

from mergekit_vl import __version__, options
from mergekit_vl.checkpoints.checkpoint import Checkpoint
from mergekit_vl.checkpoints.reader import facts, open_checkpoint, read_header
from mergekit_vl.checkpoints.writer import METADATA_KEY
from mergekit_vl.errors import UserError
from mergekit_vl.merge_files.matching import Tensors
from mergekit_vl.merge_files.plan import AlignedCheckpoints
from mergekit_vl.printable import in_code, in_markdown
from mergekit_vl.system.regular_files import check_shape

NO_HASH = "0" * 64
ADAPTER = ("adapter", "backbone", "init", "names", "normalise", "unseen", "head")


class Input(TypedDict):
    label: str
    path: str
    blake3: dict[str, str]


class Metadata(TypedDict):
    """What `describe` tells, beside what an adapter tells of itself."""

    version: str
    strategy: str
    options: dict[str, object]
    models: list[Input]
    base: Input | None
    seed: int
    dtype: str | None
    keep: list[str]
    rebasin: bool
    device: str
    tensors: NotRequired[Tensors]
    """Where it is not "same"."""
    resize_pos_embed: NotRequired[bool]
    weights: NotRequired[str]
    """Where it is not "plain"."""


def canonical(metadata: Metadata) -> str:
    return json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def describe(opened: AlignedCheckpoints, hashes: Mapping[Path, str]) -> Metadata:
    """The resolved recipe with the hashes of its inputs, from which `verify` repeats the merge."""
    plan = opened.plan

    def model(checkpoint: Checkpoint, given: str) -> Input:
        return {
            "label": checkpoint.label,
            "path": given,
            "blake3": {file.name: hashes[file] for file in checkpoint.hashed},
        }

    told: Metadata = {
        "version": __version__,
        "strategy": plan.strategy,
        "options": option_values(plan.method),
        "models": [model(c, given) for c, given in zip(opened.tuned, plan.models)],
        "base": model(opened.base, plan.base) if opened.base and plan.base else None,
        "seed": plan.seed,
        "dtype": plan.dtype,
        "keep": list(plan.keep),
        "rebasin": plan.rebasin,
        "device": plan.device,
    }
    if plan.tensors != "same":
        told["tensors"] = plan.tensors
    if plan.resize_pos_embed:
        told["resize_pos_embed"] = True
    if plan.weights != "plain":
        told["weights"] = plan.weights
    return cast("Metadata", {**_adapter(opened), **told})


def _adapter(opened: AlignedCheckpoints) -> dict[str, object]:
    """What a run wrote into the files of an adapter, so that the merge is one too; it must be the same in all, the order of a head's classes included.

    What was chosen while a model was tuned is its own, and not the merge's.
    """
    told = [facts(c) for c in opened.all]
    adapters: list[dict[str, object]] = [
        {key: each[key] for key in ADAPTER if key in each} if "adapter" in each else {} for each in told
    ]
    for adapter in adapters:
        if isinstance(head := adapter.get("head"), Mapping):
            adapter["head"] = {key: value for key, value in head.items() if key != "chosen"}
    for checkpoint, adapter in zip(opened.all, adapters):
        for key in adapter.keys() | adapters[0].keys():
            if adapter.get(key) != adapters[0].get(key):
                raise UserError(
                    f"{opened.reference.label} and {checkpoint.label} are adapters of different {key}",
                    hint="merge adapters that were tuned in the same way; `run` merges heads by class name",
                )
    return adapters[0]


def option_values(method: options.Options) -> dict[str, object]:
    """A method's options as a recipe writes them."""
    found: dict[str, object] = json.loads(json.dumps(options.values(method)))
    return found


def model_card(opened: AlignedCheckpoints, metadata: Metadata) -> str:
    """The README.md of the output."""
    plan = opened.plan
    lines = [
        "---",
        "library_name: mergekit-vl",
        "tags: [merge, mergekit-vl]",
        "---",
        "",
        f"# A merge with {in_markdown(plan.strategy)}",
        "",
        (type(plan.method).__doc__ or "").strip().splitlines()[0],
        "",
        f"Made by mergekit-vl {metadata['version']} of",
        "",
    ]
    for role, model in [("base", metadata["base"]), *(("model", m) for m in metadata["models"])]:
        if model:
            lines.append(f"- {role} **{in_markdown(model['label'])}**: {in_code(model['path'])}")
            lines += [f"  - {in_markdown(name)} blake3 `{value}`" for name, value in model["blake3"].items()]
    lines += ["", "| option | value |", "|---|---|"]
    lines += [f"| {in_markdown(key)} | {in_code(json.dumps(value))} |" for key, value in metadata["options"].items()]
    if plan.rebasin:
        lines.append(f"| rebasin | every model is reordered to match {in_code(opened.reference.label)} |")
    lines += [f"| seed | `{plan.seed}` |", f"| dtype | `{plan.dtype or 'as the first model'}` |", ""]
    lines += ["`mergekit-vl verify` of this folder repeats the merge from the same files and compares every byte.", ""]
    return "\n".join(lines)


def read_metadata(folder: Path) -> tuple[Metadata, Checkpoint]:
    """What `describe` wrote, and the merged checkpoint."""
    checkpoint = open_checkpoint(str(folder))
    found = checkpoint.metadata
    if not found:
        first = next((f for f in checkpoint.files if f.suffix == ".safetensors"), None)
        found = read_header(first)[1] if first else {}
    if METADATA_KEY not in found:
        raise UserError("no merge of mergekit-vl", where=str(folder), hint="give the folder that merge wrote")
    checkpoint.metadata = found
    early = "was merged by an early version, or is no merge"
    metadata = check_shape(facts(checkpoint), Metadata, what=early, where=str(folder))
    if not metadata["models"]:
        raise UserError("is no merge: it names no model", where=str(folder), hint="merge again")
    return metadata, checkpoint
