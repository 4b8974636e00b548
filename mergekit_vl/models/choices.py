"""Choices: values that were chosen while a model was made, and on which split, as data and in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SPLITS = {
    "train": "training images",
    "val": "validation images",
    "held_out": "classes held out of those that are tuned on",
    "development": "development data sets",
}
"""Where something can be chosen, in words."""
SHOWN = 2
"""Values that are told of a choice where a line must be short."""


@dataclass(frozen=True)
class Tried:
    """A candidate of a choice, with what it scored on the images that were chosen on."""

    method: str
    alpha: float | None
    """Its coefficient; None where it has none."""
    accuracy: Mapping[str, float]
    """By what is weighed against each other (new, kept): a fraction."""
    n: Mapping[str, int]
    """Images, by the same."""

    @property
    def label(self) -> str:
        return self.method if self.alpha is None else f"{self.method} {self.alpha:g}"

    def is_chosen(self, values: Mapping[str, object]) -> bool:
        """Whether these are the values that were chosen."""
        return values.get("method") == self.method and values.get("alpha") == self.alpha


@dataclass(frozen=True)
class Choice:
    """Chosen values by name (plain data) and the split they were chosen on; a strategy or tuner returns it with its model."""

    values: Mapping[str, object]
    split: str = "val"
    """One of `SPLITS`."""
    learnt: bool = False
    """Whether the values were fitted, and not the best of candidates."""
    tried: tuple[Tried, ...] = ()
    """The candidates, where reports show them."""


@dataclass(frozen=True)
class Chosen:
    """A value that was chosen, and in how many cells."""

    value: object
    split: str
    cells: int


def counted(cells: Sequence[Mapping[str, tuple[object, str]]]) -> dict[str, tuple[Chosen, ...]]:
    """What was chosen for one row of a table, by what: its values in the cells, given with their splits, the most frequent first."""
    found: dict[str, dict[str, list[tuple[object, str]]]] = {}
    for cell in cells:
        for what, (value, split) in cell.items():
            found.setdefault(what, {}).setdefault(json.dumps([value, split]), []).append((value, split))
    made = {what: [Chosen(*same[0], len(same)) for same in values.values()] for what, values in found.items()}
    return {what: tuple(sorted(values, key=lambda each: -each.cells)) for what, values in made.items()}


def told(chosen: Mapping[str, Sequence[Chosen]], *, most: int | None = None) -> str:
    """Of what `counted` gives: "alpha 0.3", or with the cells' counts "alpha 0.3 (2 cells), 0.5 (1 cell)"."""
    parts = []
    for what, values in chosen.items():
        texts = [text(each.value) for each in values]
        if len(values) > 1:
            cells = [f"{each.cells} cell{'s' * (each.cells > 1)}" for each in values]
            texts = [f"{value} ({n})" for value, n in zip(texts, cells)]
        more = len(texts) - (most or len(texts))
        parts.append(f"{what} {', '.join(texts[:most])}".strip() + (f" and {more} more" if more > 0 else ""))
    return "; ".join(parts)


def text(value: object) -> str:
    """A value as a line shows it."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(text, value))}]"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={text(each)}" for key, each in value.items()) or "defaults"
    return f"{value:g}" if isinstance(value, float) else str(value)
