"""Recipes of `run` and `bench`: plain data in, a frozen `Recipe` out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from mergekit_vl import __version__
from mergekit_vl.errors import UserError, unknown
from mergekit_vl.recipes import references

if TYPE_CHECKING:
    from mergekit_vl.recipes.run_forms import NamedForm, StrategyForm
    from mergekit_vl.registry.plugins import Registry

ALL = "all"
"""As `strategy`, or among them: every registered one, for `bench`."""
DEFAULTS: dict[str, object] = {
    "backbone": {"name": "micro"},
    "protocol": {"name": "base_to_novel"},
    "tuned": [{"tuner": {"name": "coop"}}],
    "controls": True,
    "seed": 1,
}


@dataclass(frozen=True)
class Spec:
    """A registered name with its options."""

    name: str
    options: Mapping[str, object]
    where: str
    label: str
    """The name of its row in reports: `label` of the recipe, or the name."""
    input: str | None = None
    """Of a strategy: the label of an earlier one, or of a tuned model, that it merges with the base instead of all tuned ones."""
    grid: Mapping[str, Sequence[object]] | None = None
    """Of a strategy: values of its options that `bench` tries, instead of the strategy's own grid."""
    batch_norm: Literal["images", "mean"] = "images"
    """Of a strategy: where the running statistics of a merged tower come from, `images` or the `mean` over the models."""


@dataclass(frozen=True)
class TunedSpec:
    """A fine-tuned model: made by a tuner, or read from a checkpoint."""

    tuner: Spec | None = None
    checkpoint: str | None = None
    init: str | None = None
    """The words that a checkpoint's context started from, where its file does not tell."""
    label: str | None = None


@dataclass(frozen=True)
class Recipe:
    """One experiment, or a grid of them where `dataset` and `seed` are lists."""

    name: str
    backbone: Spec
    datasets: tuple[Spec, ...]
    protocol: Spec
    tuned: tuple[TunedSpec, ...]
    strategies: tuple[Spec, ...]
    every: bool
    """Whether all other registered strategies come to these, for `bench`."""
    controls: bool
    seeds: tuple[int, ...]
    search: Mapping[str, object]
    """How `bench` chooses options; read by nothing else."""
    plain: Mapping[str, Any]
    """The recipe as nested dicts and lists, defaults included, as it is stored: with references to the environment."""
    values: Mapping[str, Any]
    """The same with the environment's values in their place; stored nowhere."""
    environment: Mapping[str, str | None]
    """The variables that may be referred to, and their values."""

    @property
    def allowing(self) -> list[str]:
        """The words of a command that let it read the environment as this recipe does."""
        return [word for name in references.names(self.plain) for word in ("--allow-env", name)]

    @property
    def hash(self) -> str:
        """Of the resolved recipe and the version of the code."""
        return hashlib.sha256(json.dumps([self.values, __version__], sort_keys=True).encode()).hexdigest()[:12]


def with_datasets(recipe: Recipe, names: Sequence[str], registry: Registry) -> Recipe:
    """The recipe on these datasets: its own by label or by the option that names one, or others of the kind of its first."""
    stored, given = _as_list(recipe.plain["dataset"]), _as_list(recipe.values["dataset"])
    key = _naming_key(given[0], registry)
    chosen = []
    for name in names:
        own = [kept for dataset, kept in zip(given, stored) if _is_called(name, dataset, registry)]
        if not own and key is None:
            raise unknown("dataset", name, [str(d.get("label", d["name"])) for d in given], where="--datasets")
        chosen += own or [{k: v for k, v in stored[0].items() if k != "label"} | {key: name}]
    return parse(
        {**recipe.plain, "dataset": chosen}, name=recipe.name, where=recipe.name, environment=recipe.environment
    )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _naming_key(dataset: Mapping[str, Any], registry: Registry) -> str | None:
    """The option that tells one dataset of this kind from another."""
    from mergekit_vl.datasets.base import named_by

    return named_by(registry.find("datasets", dataset["name"]).resolve())


def _is_called(name: str, dataset: Mapping[str, Any], registry: Registry) -> bool:
    if name in (dataset.get("label"), dataset["name"]):
        return True
    return name == str(dataset.get(_naming_key(dataset, registry) or "", ""))


def dataset_specs(given: Sequence[Mapping[str, object]], *, where: str) -> tuple[Spec, ...]:
    """Specs of datasets that stand elsewhere than under `dataset`."""
    from mergekit_vl.recipes import forms
    from mergekit_vl.recipes.run_forms import NamedForm

    read = [(forms.read(NamedForm, value, where=f"{where}.{i}"), f"{where}.{i}") for i, value in enumerate(given)]
    return tuple(Spec(form.name, form.options, place, form.label or form.name) for form, place in read)


def parse(
    given: Mapping[str, object], *, name: str, where: str, environment: Mapping[str, str | None] = MappingProxyType({})
) -> Recipe:
    """A Recipe from plain data; the door for tests and notebooks. `environment` holds the variables it may refer to."""
    from mergekit_vl.recipes import forms
    from mergekit_vl.recipes.run_forms import RunForm

    stored = references.expand({**DEFAULTS, **given}, where=where)
    plain = references.fill(stored, environment, where=where)
    named, every = _without_all(plain.get("strategy"))
    form = forms.read(RunForm, {**plain, "strategy": named} if "strategy" in plain else plain, where=where)
    if not form.strategy and not every:
        raise UserError("strategy is an empty list", where=where, hint="name at least one")

    def spec(form: NamedForm | StrategyForm, place: str) -> Spec:
        return Spec(form.name, form.options, f"{where}: {place} {form.name}", form.label or form.name)

    tuned = tuple(
        TunedSpec(None, item.checkpoint, item.init, item.label)
        if item.tuner is None
        else TunedSpec(spec(item.tuner, f"tuned.{i}.tuner"))
        for i, item in enumerate(form.tuned)
    )
    strategies = tuple(
        replace(spec(item, place), input=item.input, grid=item.grid, batch_norm=item.batch_norm)
        for item, place in zip(form.strategy, _places("strategy", named, form.strategy))
    )
    _check_parents(tuned, strategies)
    datasets = zip(form.dataset, _places("dataset", plain["dataset"], form.dataset))
    return Recipe(
        name=name,
        backbone=spec(form.backbone, "backbone"),
        datasets=tuple(spec(item, place) for item, place in datasets),
        protocol=spec(form.protocol, "protocol"),
        tuned=tuned,
        strategies=strategies,
        every=every,
        controls=form.controls,
        seeds=tuple(dict.fromkeys(form.seed)),
        search=form.search,
        plain=stored,
        values=plain,
        environment=environment,
    )


def _without_all(strategies: object) -> tuple[object, bool]:
    """What is named, and whether `all` stands there too."""
    if strategies == ALL:
        return [], True
    if not isinstance(strategies, list):
        return strategies, False
    named = [each for each in strategies if each != ALL]
    return named, len(named) < len(strategies)


def _places(key: str, given: object, items: Sequence[object]) -> list[str]:
    """Where each stands: "dataset" alone, or "dataset.0" in a list."""
    return [f"{key}.{i}" for i in range(len(items))] if isinstance(given, list) else [key]


def _check_parents(tuned: Sequence[TunedSpec], strategies: Sequence[Spec]) -> None:
    """Raise UserError for a strategy of a row that does not come before it."""
    earlier = [t.tuner.label if t.tuner else t.label or Path(str(t.checkpoint)).stem for t in tuned]
    for strategy in strategies:
        if strategy.input is not None and strategy.input not in earlier:
            raise unknown("tuned model or earlier strategy", strategy.input, earlier, where=f"{strategy.where}: input")
        earlier.append(strategy.label)
