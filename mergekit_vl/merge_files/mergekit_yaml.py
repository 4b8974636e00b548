"""Translate mergekit's YAML into a recipe of `merge` with the options of mergekit's variant, for the methods that both tools have.

Read against mergekit 0.1.5. What is not listed here is refused by name. Two differences stay: arithmetic runs in float32 whatever
`dtype` says (it is the output's dtype), and random draws differ, so DARE and DELLA agree in distribution only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_vl.errors import UserError, unknown
from mergekit_vl.merge_files.mergekit_documents import Document, plain, taken_parameters
from mergekit_vl.recipes import forms
from mergekit_vl.recipes.merge_forms import MergekitForm, MergekitModelForm, WeightsForm

TASK = ("weight", "density", "lambda", "normalize", "rescale", "int8_mask")
METHODS: dict[str, tuple[str, ...]] = {
    "linear": ("weight", "normalize"),
    "slerp": ("t",),
    "nuslerp": ("weight", "nuslerp_row_wise", "nuslerp_flatten"),
    "multislerp": ("weight", "normalize_weights"),
    "karcher": ("max_iter", "tol"),
    "task_arithmetic": ("weight", "lambda", "normalize", "int8_mask"),
    "ties": ("weight", "density", "lambda", "normalize", "int8_mask"),
    "dare_linear": TASK,
    "dare_ties": TASK,
    "della": (*TASK, "epsilon"),
    "della_linear": (*TASK, "epsilon"),
    "breadcrumbs": (*TASK[:4], "gamma", "int8_mask"),
    "breadcrumbs_ties": (*TASK[:4], "gamma", "int8_mask"),
    "model_stock": ("filter_wise",),
    "sce": ("select_topk", "int8_mask"),
}
"""The parameters of each method that are understood, of a model or of all."""
NEED_BASE = (
    *("slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs"),
    *("breadcrumbs_ties", "model_stock", "sce"),
)
MEAN_BY_DEFAULT = ("ties", "della")


def translate(content: Mapping[str, object], *, where: str) -> tuple[WeightsForm, list[str]]:
    """The `weights:` section that means the same, and lines that say what it runs."""
    document = plain(content, where=where)
    method = document.content.get("merge_method")
    if isinstance(method, str) and method not in METHODS:
        document.problems.append(str(unknown("merge_method", method, METHODS)))
    try:
        given = forms.read(MergekitForm, document.content, where="")
    except UserError as error:
        document.problems.append(str(error))
        document.check()
        raise
    known = METHODS.get(given.merge_method, ())
    shared = taken_parameters(given.parameters or {}, known, "parameters", document) if known else {}
    entries, base = _models(given, document)
    own = tuple(
        taken_parameters(entry.parameters or {}, known, f"models.{i}", document) if known else {}
        for i, entry in enumerate(entries)
    )
    document.check()
    method = given.merge_method
    asked = _Parameters(where, tuple(entry.model for entry in entries), shared, own)
    options = _options(method, asked, base is not None)
    section = WeightsForm(
        strategy={"name": method, **options},
        models=[{"path": model} for model in asked.models],
        base=base,
        dtype=given.out_dtype or given.dtype,
    )
    told = " ".join(f"{key}={value}" for key, value in options.items()) or "no options"
    notes = [f"mergekit's {method}: {told}", *document.notes]
    if given.dtype not in (None, "float32"):
        notes.append(f"dtype: {given.dtype} is the output's; the arithmetic is float32's")
    return section, notes


def _models(given: MergekitForm, document: Document) -> tuple[list[MergekitModelForm], str | None]:
    """The models that are merged, and the base apart from them."""
    method, base = given.merge_method, given.base_model
    if method in NEED_BASE and base is None:
        document.problems.append(f"{method} needs a base_model (add base_model)")
    if method in ("linear", "karcher"):  # a base is one of the models there
        listed = [entry.model for entry in given.models]
        more = [MergekitModelForm(model=base)] if base is not None and base not in listed else []
        return [*given.models, *more], None
    return [entry for entry in given.models if entry.model != base], base


@dataclass(frozen=True)
class _Parameters:
    """The parameters of a recipe, of all models and of each."""

    where: str
    models: tuple[str, ...]
    shared: Mapping[str, object]
    own: tuple[Mapping[str, object], ...]

    def each(self, name: str, default: object = None) -> list[Any]:
        """A coefficient for each model."""
        values = [parameters.get(name, self.shared.get(name, default)) for parameters in self.own]
        if None in values:
            what = f"{self.models[values.index(None)]} has no {name}"
            raise UserError(what, where=self.where, hint=f"give its {name}")
        return [_coefficient(value, f"{self.where}: {name}") for value in values]

    def one(self, name: str, default: object) -> Any:
        """A value that all models share."""
        values = [parameters[name] for parameters in self.own if name in parameters] or [self.shared.get(name, default)]
        if any(value != values[0] for value in values):
            raise UserError(f"{name} differs between the models", where=self.where, hint="give one value")
        return _coefficient(values[0], f"{self.where}: {name}")

    def number(self, name: str, default: float) -> float:
        value = self.one(name, default)
        if not isinstance(value, float) or not math.isfinite(value):
            raise UserError(f"{name}={value!r}", where=self.where, hint="give one number")
        return value


def _options(method: str, asked: _Parameters, has_base: bool) -> dict[str, object]:
    """Our options for mergekit's parameters and defaults."""
    each, one = asked.each, asked.one
    if method == "linear":
        return {"weights": each("weight"), "normalise": one("normalize", True)}
    if method == "slerp":
        return {"t": _needed(one("t", None), "t", asked.where), "line_above": 0.9995}
    if method == "nuslerp":
        along = "tensor" if one("nuslerp_flatten", True) else "first" if one("nuslerp_row_wise", False) else "last"
        return {"weights": each("weight"), "along": along, "task_vectors": has_base}
    if method == "multislerp":
        return {"weights": each("weight"), "normalise": one("normalize_weights", True), "task_vectors": has_base}
    if method == "karcher":
        return {"steps": int(asked.number("max_iter", 10)), "tolerance": one("tol", 1e-5)}
    if method == "sce":
        return {"density": one("select_topk", 1.0), "share_of": "varying", "mean": True, "equal_below": 1e-6}
    if method == "model_stock":
        return {"along": "row" if one("filter_wise", False) else "tensor"}
    return _task_vectors(method, asked)


def _task_vectors(method: str, asked: _Parameters) -> dict[str, object]:
    weights, scale = asked.each("weight"), asked.one("lambda", 1.0)
    mean = asked.one("normalize", method in MEAN_BY_DEFAULT)
    elects = method in ("ties", "dare_ties", "della", "breadcrumbs_ties")
    if mean and not elects:
        weights = _summing_to_one(weights, asked.where)
    if method == "task_arithmetic":
        return {"scales": [_times(weight, scale, asked.where) for weight in weights]}
    densities = asked.each("density", 1.0)
    options: dict[str, object] = {"weights": weights, "scale": scale, "densities": densities}
    if elects:
        options |= {"elect": "weighted", "mean": mean}
    return options | _dropping(method, asked, densities)


def _summing_to_one(weights: list[Any], where: str) -> list[float]:
    if not all(isinstance(weight, float) for weight in weights):
        raise UserError("normalize with weights that vary", where=where, hint="give plain numbers")
    total = sum(weights)
    return [weight / (total if abs(total) >= 1e-8 else 1) for weight in weights]


def _dropping(method: str, asked: _Parameters, densities: list[object]) -> dict[str, object]:
    """The options of what is dropped of task vectors."""
    options: dict[str, object] = {"trim": "tensor"} if method == "ties" else {}
    if method.startswith(("dare", "della")):
        options["rescale"] = "l1" if asked.one("rescale", True) else "none"
    if method.startswith("della"):
        dense = all(density == 1 for density in densities)
        options["epsilon"] = 0.0 if dense else 2 * asked.number("epsilon", 0.15)
    if method.startswith("breadcrumbs"):
        densest = max(d if isinstance(d, float) else 0.0 for d in densities)
        options["gamma"] = min(asked.number("gamma", 0.01), max(0.0, 1 - densest))
    return options


def _coefficient(value: object, where: str) -> Any:
    """A scalar, a gradient, or mergekit's list of filters as a mapping."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, list) and value and all(isinstance(v, int | float) for v in value):
        return [float(v) for v in value]
    if isinstance(value, list) and value and all(isinstance(v, Mapping) and "value" in v for v in value):
        named = [(str(v.get("filter", "*")), _coefficient(v["value"], where)) for v in value]
        return {key if key == "*" else f"*{key}*": number for key, number in named}
    raise UserError(f"{value!r} is no number, gradient or list of filters", where=where, hint="write 0.5 or [0, 1]")


def _times(weight: Any, scale: Any, where: str) -> Any:
    if not isinstance(scale, float):
        raise UserError("lambda that varies", where=where, hint="vary the weights")
    if isinstance(weight, float):
        return weight * scale
    if isinstance(weight, list):
        return [number * scale for number in weight]
    return {key: _times(number, scale, where) for key, number in weight.items()}


def _needed(value: object, name: str, where: str) -> Any:
    if value is None:
        raise UserError(f"{name} is missing", where=where, hint=f"give {name} under parameters")
    return value
