"""mergekit's YAML, for the methods that both tools have, read as a recipe of ours with the option values of mergekit's variant.

Read against mergekit 0.1.5. What is not listed here is refused by name. Two differences stay: arithmetic runs in float32 whatever
`dtype` says (it is the output's dtype), and random draws are ours, so that DARE and DELLA agree in distribution only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mergekit_vl.errors import UserError, unknown

TOP = ("merge_method", "models", "base_model", "dtype", "out_dtype", "parameters")
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
NEED_BASE = ("slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs")
NEED_BASE += ("breadcrumbs_ties", "model_stock", "sce")
MEAN_BY_DEFAULT = ("ties", "della")


def translate(content: Mapping[str, Any], *, where: str) -> tuple[dict[str, Any], list[str]]:
    """The `weights:` section that means the same, and lines that say what it runs."""
    for key in content:
        if key not in TOP:
            raise unknown("key of mergekit's", key, TOP, where=where)
    for key in ("merge_method", "base_model", "dtype", "out_dtype"):
        if not isinstance(content.get(key), str | None):
            raise UserError(f"{key}={content[key]!r}", where=where, hint="write text")
    method = content["merge_method"]
    if method not in METHODS:
        raise unknown("merge_method", method, METHODS, where=where)
    entries, base = _models(content, method, where)
    shared = _checked(content.get("parameters") or {}, METHODS[method], f"{where}: parameters")
    own = [_checked(e.get("parameters") or {}, METHODS[method], f"{where}: models.{i}") for i, e in enumerate(entries)]

    def each(name: str, default: Any = None) -> list[Any]:
        values = [parameters.get(name, shared.get(name, default)) for parameters in own]
        if None in values:
            raise UserError(
                f"{entries[values.index(None)]['model']} has no {name}", where=where, hint=f"give its {name}"
            )
        return [_coefficient(value, f"{where}: {name}") for value in values]

    def one(name: str, default: Any) -> Any:
        values = [parameters[name] for parameters in own if name in parameters] or [shared.get(name, default)]
        if any(value != values[0] for value in values):
            raise UserError(f"{name} differs between the models", where=where, hint="give one value")
        return _coefficient(values[0], f"{where}: {name}")

    def number(name: str, default: float) -> float:
        value = one(name, default)
        if not isinstance(value, float) or not math.isfinite(value):
            raise UserError(f"{name}={value!r}", where=where, hint="give one number")
        return value

    options = _options(method, each, one, number, base is not None, where)
    section = {
        "strategy": {"name": method, **options},
        "models": [{"path": e["model"]} for e in entries],
        "base": base,
        "dtype": content.get("out_dtype") or content.get("dtype"),
    }
    told = " ".join(f"{key}={value}" for key, value in options.items()) or "no options"
    notes = [f"mergekit's {method}: {told}"]
    if content.get("dtype") not in (None, "float32"):
        notes.append(f"dtype: {content['dtype']} is the output's; the arithmetic is float32's")
    return section, notes


def _models(content: Mapping[str, Any], method: str, where: str) -> tuple[list[Mapping[str, Any]], str | None]:
    """The models that are merged, and the base apart from them."""
    given, base = content.get("models"), content.get("base_model")
    if not isinstance(given, list) or not given:
        raise UserError("models is a list", where=where, hint="write models: [{model: a.safetensors}]")
    for i, entry in enumerate(given):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), str):
            raise UserError(f"models.{i} names no model", where=where, hint="write {model: a.safetensors}")
        for key in entry:
            if key not in ("model", "parameters"):
                raise unknown("key of mergekit's", key, ("model", "parameters"), where=f"{where}: models.{i}")
    if method in NEED_BASE and base is None:
        raise UserError(f"{method} needs a base_model", where=where, hint="add base_model")
    if method in ("linear", "karcher"):  # a base is one of the models there
        listed = [entry["model"] for entry in given]
        return [*given, *([{"model": base}] if base is not None and base not in listed else [])], None
    return [entry for entry in given if entry["model"] != base], base


def _options(method: str, each: Any, one: Any, number: Any, has_base: bool, where: str) -> dict[str, Any]:
    """Our options for mergekit's parameters and defaults."""
    if method == "linear":
        return {"weights": each("weight"), "normalise": one("normalize", True)}
    if method == "slerp":
        t = one("t", None)
        return {"t": _needed(t, "t", where), "line_above": 0.9995}
    if method == "nuslerp":
        along = "tensor" if one("nuslerp_flatten", True) else "first" if one("nuslerp_row_wise", False) else "last"
        return {"weights": each("weight"), "along": along, "task_vectors": has_base}
    if method == "multislerp":
        return {"weights": each("weight"), "normalise": one("normalize_weights", True), "task_vectors": has_base}
    if method == "karcher":
        return {"steps": int(number("max_iter", 10)), "tolerance": one("tol", 1e-5)}
    if method == "sce":
        return {"density": one("select_topk", 1.0), "share_of": "varying", "mean": True, "equal_below": 1e-6}
    if method == "model_stock":
        return {"along": "row" if one("filter_wise", False) else "tensor"}
    return _task_vectors(method, each, one, number, where)


def _task_vectors(method: str, each: Any, one: Any, number: Any, where: str) -> dict[str, Any]:
    weights, scale = each("weight"), one("lambda", 1.0)
    mean = one("normalize", method in MEAN_BY_DEFAULT)
    elects = method in ("ties", "dare_ties", "della", "breadcrumbs_ties")
    if mean and not elects:
        if not all(isinstance(weight, float) for weight in weights):
            raise UserError("normalize with weights that vary", where=where, hint="give plain numbers")
        total = sum(weights)
        weights = [weight / (total if abs(total) >= 1e-8 else 1) for weight in weights]
    if method == "task_arithmetic":
        return {"scales": [_times(weight, scale, where) for weight in weights]}
    options: dict[str, Any] = {"weights": weights, "scale": scale, "densities": each("density", 1.0)}
    if elects:
        options |= {"elect": "weighted", "mean": mean}
    if method == "ties":
        options["trim"] = "tensor"
    if method.startswith(("dare", "della")):
        options["rescale"] = "l1" if one("rescale", True) else "none"
    if method.startswith("della"):
        dense = all(density == 1 for density in options["densities"])
        options["epsilon"] = 0.0 if dense else 2 * number("epsilon", 0.15)
    if method.startswith("breadcrumbs"):
        densest = max(d if isinstance(d, float) else 0.0 for d in options["densities"])
        options["gamma"] = min(number("gamma", 0.01), max(0.0, 1 - densest))
    return options


def _checked(parameters: Any, known: tuple[str, ...], where: str) -> Mapping[str, Any]:
    if not isinstance(parameters, Mapping):
        raise UserError("parameters is a mapping", where=where, hint="write parameters: {weight: 0.5}")
    for key in parameters:
        if key not in known:
            raise unknown("parameter", key, known, where=where)
    return parameters


def _coefficient(value: Any, where: str) -> Any:
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


def _needed(value: Any, name: str, where: str) -> Any:
    if value is None:
        raise UserError(f"{name} is missing", where=where, hint=f"give {name} under parameters")
    return value
