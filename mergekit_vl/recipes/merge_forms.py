"""The schemas of recipes of `merge`, of mergekit-vl and of mergekit, as pydantic models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, MinLen
from pydantic import BeforeValidator

from mergekit_vl.recipes.forms import Form, Keys, Told

TEXT = Told("{key}={value}", "write text")


class WeightsForm(Form):
    """The `weights:` section of a recipe. Fields are in the order in which faults are told."""

    models: Annotated[list[object], MinLen(1)]
    dtype: str | None = None
    seed: Annotated[int, Ge(0)] = 0
    keep: Annotated[list[str], BeforeValidator(lambda keep: [keep] if isinstance(keep, str) else keep)] = []
    rebasin: bool = False
    tensors: Literal["same", "union", "intersection"] = "same"
    strategy: Annotated[
        dict[str, Any], BeforeValidator(lambda name: {"name": name} if isinstance(name, str) else name)
    ] = {}
    base: Any = None

    TOLD: ClassVar[Mapping[str, Told]] = {
        "models": Told("weights.models is a list of models", "write models: [a.safetensors, b.safetensors]"),
        "dtype": Told("dtype={value}", "write dtype: bfloat16"),
        "seed": Told("seed={value}", "a whole number from 0"),
        "keep": Told("keep={value}", "parts of tensors' names"),
        "rebasin": Told("rebasin={value}", "write rebasin: true"),
        "tensors": Told("tensors={value}", "same, union or intersection"),
        "strategy": Told("strategy={value}", "write strategy: {{name: ties, density: 0.2}}"),
    }
    KEYS: ClassVar[Mapping[str, Keys]] = {
        "": Keys(("base", "models", "strategy", "seed", "dtype", "keep", "rebasin", "tensors"), within="weights")
    }


class MergekitModelForm(Form):
    model: str
    parameters: dict[str, object] | None = None


class MergekitForm(Form):
    """A recipe of mergekit's. Fields are in the order in which faults are told."""

    merge_method: str
    base_model: str | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    models: Annotated[list[MergekitModelForm], MinLen(1)]
    parameters: dict[str, object] | None = None

    TOLD: ClassVar[Mapping[str, Told]] = {
        "merge_method": TEXT,
        "base_model": TEXT,
        "dtype": TEXT,
        "out_dtype": TEXT,
        "models": Told("models is a list", "write models: [{{model: a.safetensors}}]"),
        "models.*": Told("{place} names no model", "write {{model: a.safetensors}}"),
        "models.*.parameters": Told("{place} is no mapping", "write parameters: {{weight: 0.5}}"),
        "parameters": Told("parameters is a mapping", "write parameters: {{weight: 0.5}}"),
    }
    KEYS: ClassVar[Mapping[str, Keys]] = {
        "": Keys(
            ("merge_method", "models", "base_model", "dtype", "out_dtype", "parameters"), kind="key of mergekit's"
        ),
        "models.*": Keys(("model", "parameters"), kind="key of mergekit's"),
    }
