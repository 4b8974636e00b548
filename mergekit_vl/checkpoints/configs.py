"""What the configs beside weights tell: names of classes, and settings on which the meaning of the weights depends."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_vl.errors import UserError
from mergekit_vl.system.regular_files import MOST_TEXT, parse_json, read_regular

CONFIGS = ("open_clip_config.json", "config.json", "preprocessor_config.json")
"""Those that belong to weights: open_clip's, and timm's or transformers'."""
GENERIC = re.compile(r"(?:label|class)?[ _]?\d+", re.I)
"""Names that tell nothing: LABEL_0."""
MATTERS = re.compile(
    r"quick_gelu|act|pool|mean|std|interpolation|resample|resize|crop|size$|length|precision|fill_color"
    r"|normali[sz]e|rescale|logit|class_token|cls|patch|layers|heads|width|embed_dim|projection_dim|eos|no_causal"
)
"""Keys whose values change what the same weights compute."""
MOST_SETTINGS = 200
"""Of one config; a stranger's could hold any number."""


def read_config(folder: Path | None, name: str) -> Mapping[str, Any]:
    """A config of this folder; empty where there is none, or none that is JSON by key."""
    if folder is None or not (folder / name).is_file():
        return {}
    try:
        found = parse_json(read_regular(folder / name, most=MOST_TEXT), where=str(folder / name))
    except UserError:
        return {}
    return found if isinstance(found, Mapping) else {}


def class_names(folder: Path | None) -> tuple[str, ...]:
    """The classes of a classifier in the order of its rows, as its config.json names them: timm's `label_names`, transformers' `id2label`.

    Empty where it does not, or only as LABEL_0 and so on.
    """
    config = read_config(folder, "config.json")
    nested = config.get("pretrained_cfg")
    listed = config.get("label_names") or (nested.get("label_names") if isinstance(nested, Mapping) else None)
    names = list(listed) if isinstance(listed, list) else _by_number(config.get("id2label"))
    texts = [name for name in names if isinstance(name, str) and name.strip()]
    if len(texts) < len(names) or all(GENERIC.fullmatch(name) for name in texts):
        return ()
    return tuple(texts)


def _by_number(found: object) -> list[object]:
    """The values of {"0": ..., "1": ...} in order; empty for anything else."""
    if not isinstance(found, Mapping):
        return []
    by = {str(key): value for key, value in found.items()}
    return [by[str(i)] for i in range(len(by))] if all(str(i) in by for i in range(len(by))) else []


def differing_settings(folders: Sequence[tuple[str, Path | None]]) -> list[str]:
    """Of models by label, a line for each setting that matters and differs between their configs; what a config leaves out counts as unsaid."""
    lines = []
    for file in CONFIGS:
        told = {label: dict(_settings(read_config(folder, file))) for label, folder in folders}
        told = {label: settings for label, settings in told.items() if settings}
        if len(told) < 2:
            continue
        for key in dict.fromkeys(key for settings in told.values() for key in settings):
            values = {label: settings.get(key, "not said") for label, settings in told.items()}
            if len({str(value) for value in values.values()}) > 1:
                said = ", ".join(f"{value} in {label}" for label, value in values.items())
                lines.append(f"{file}: {key} is {said}")
    return lines


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """The leaves of a config that matter, by dotted key."""
    waiting: list[tuple[str, object]] = [("", config)]
    told = 0
    while waiting and told < MOST_SETTINGS:
        place, value = waiting.pop(0)
        if isinstance(value, Mapping):
            waiting += [(f"{place}.{key}" if place else str(key), inner) for key, inner in value.items()]
        elif MATTERS.search(place.rpartition(".")[2]) and "label" not in place:
            told += 1
            yield place, str(value)[:60]
