"""What a recipe of `run` and `bench` looks like, as pydantic models."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le, MinLen
from pydantic import ConfigDict, model_validator

from mergekit_vl.errors import UserError
from mergekit_vl.options import MOST_SEED
from mergekit_vl.recipes.forms import AsText, Form, Keys, Listed, Told

RUN_KEYS = ("backbone", "dataset", "protocol", "tuned", "strategy", "controls", "seed", "search")
NAMED = Told("{place} needs a name", "write {place}: {{name: ...}}")


class NamedForm(Form):
    """A registered name; all other keys are its options."""

    model_config = ConfigDict(extra="allow")
    TOLD: ClassVar[Mapping[str, Told]] = {"": Told("a dataset needs a name", "write {{name: ...}}")}
    name: str
    label: AsText | None = None

    @property
    def options(self) -> dict[str, object]:
        return dict(self.model_extra or {})


class StrategyForm(Form):
    """A strategy, with the keys that any of them may have."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, given: Any) -> Any:
        """`input` was called `of` in 0.1.0."""
        if not isinstance(given, dict) or "of" not in given:
            return given
        where = f"strategy {given.get('name')}"
        if "input" in given:
            raise UserError("input is given twice, once as of", where=where, hint="leave one out")
        warnings.warn(f"{where}: of={given['of']} is now written input={given['of']}", FutureWarning, stacklevel=2)
        return {"input" if key == "of" else key: value for key, value in given.items()}

    name: str
    label: AsText | None = None
    input: AsText | None = None
    grid: dict[str, Annotated[list[object], MinLen(1)]] | None = None
    batch_norm: Literal["images", "mean"] = "images"

    @property
    def options(self) -> dict[str, object]:
        return dict(self.model_extra or {})


class TunedForm(Form):
    """A tuned model: its tuner, or its checkpoint."""

    tuner: NamedForm | None = None
    checkpoint: AsText | None = None
    init: AsText | None = None
    label: AsText | None = None

    @model_validator(mode="after")
    def _one(self) -> TunedForm:
        given = self.model_fields_set
        if (self.tuner is None) == (self.checkpoint is None) or ("tuner" in given and len(given) > 1):
            raise ValueError("either a tuner or a checkpoint")
        return self


class RunForm(Form):
    """A whole recipe, `all` taken out of its strategies. Fields are in the order in which faults are told."""

    tuned: Annotated[list[TunedForm], MinLen(1)]
    seed: Annotated[list[Annotated[int, Ge(0), Le(MOST_SEED)]], Listed, MinLen(1)]
    controls: bool
    strategy: Annotated[list[StrategyForm], Listed]
    search: dict[str, object] = {}
    backbone: NamedForm
    dataset: Annotated[list[NamedForm], Listed, MinLen(1)]
    protocol: NamedForm

    TOLD: ClassVar[Mapping[str, Told]] = {
        "tuned": Told("tuned is a list of models", "write tuned: [{{tuner: {{name: coop}}}}]"),
        "tuned.*": Told(
            "{place} needs either a tuner or a checkpoint",
            "write {{tuner: {{name: coop}}}} or {{checkpoint: file}}, which may have init and label",
        ),
        "tuned.*.tuner": NAMED,
        "seed": Told("seed={value}", f"a whole number from 0 to {MOST_SEED}, or a list of them"),
        "controls": Told("controls={value}", "true or false"),
        "strategy": Told("strategy is an empty list", "name at least one"),
        "strategy.*": NAMED,
        "strategy.*.grid": Told("grid is a mapping of lists", "write grid: {{alpha: [0.25, 0.5, 0.75]}}", within=True),
        "strategy.*.batch_norm": Told("batch_norm={value}", "images or mean", within=True),
        "search": Told("search is a mapping", "write search: {{budget: 8}}"),
        "backbone": NAMED,
        "dataset": Told("dataset is an empty list", "name at least one"),
        "dataset.*": NAMED,
        "protocol": NAMED,
    }
    KEYS: ClassVar[Mapping[str, Keys]] = {
        "": Keys(
            RUN_KEYS,
            missing={"dataset": "dataset: {name: ...}", "strategy": "strategy: {name: ...}"},
        )
    }
