"""Recipes: YAML and `key=value` overrides in, frozen plain data out."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

from mergekit_vl import __version__, references, yaml_text
from mergekit_vl.errors import UserError, first_line, unknown
from mergekit_vl.system.regular_files import read_text, user_path

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from mergekit_vl.recipe_forms import NamedForm, StrategyForm
    from mergekit_vl.registry.plugins import Registry

TYPED = "command line"
OWN_WEIGHTS = ("local-dir:", "hf-hub:")
"""What a `backbone.arch` starts with that brings its weights: an override with it takes the recipe's `pretrained` away."""
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
    of: str | None = None
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


def recipe_folders() -> tuple[Path, ...]:
    here = Path(__file__).parent
    return tuple(folder for folder in (here / "recipes", here.parent / "recipes") if folder.is_dir())


def installed_recipes() -> dict[str, Path]:
    return {path.stem: path for folder in reversed(recipe_folders()) for path in sorted(folder.glob("*.yaml"))}


def find_recipe(given: str) -> Path:
    """A path, or the name of an installed recipe."""
    path = user_path(given)
    if os.path.exists(path) and not path.is_dir():
        return path
    recipes = installed_recipes()
    if path.suffix == "" and len(path.parts) == 1 and given in recipes:
        return recipes[given]
    if path.parent == Path("recipes") and path.stem in recipes:  # as the README writes it, from any folder
        return recipes[path.stem]
    raise unknown("recipe", given, recipes)


def load_recipe(
    given: str,
    overrides: Sequence[str] = (),
    *,
    allow_env: Sequence[str] = (),
    check: Callable[[Recipe], object] = lambda recipe: None,
) -> Recipe:
    """Read, override and check a recipe's form; names and options are checked by `check`, that is `experiment.build`.

    What an override brought about is told of the override, and not of the recipe's file.
    """
    path = find_recipe(given)
    where = str(path)
    config = yaml_text.parse(read_text(path, most=yaml_text.MOST_BYTES), where=where)
    if not isinstance(config, dict):
        from mergekit_vl.recipe_forms import RUN_KEYS

        raise UserError("a recipe is a mapping of keys", where=where, hint=f"use {', '.join(RUN_KEYS)}")
    for (
        key,
        value,
    ) in DEFAULTS.items():  # before the overrides: protocol.shots=4 finds the protocol of a recipe without one
        config.setdefault(key, copy.deepcopy(value))
    environment = {name: os.environ.get(name) for name in allow_env}
    config = _config(config, where=where)

    def made(words: Sequence[str]) -> Recipe:
        changed = copy.deepcopy(config)
        for word in words:
            key, equals, value = word.partition("=")
            if not equals or not key:
                raise UserError(
                    f"{word!r} is not an override", where=TYPED, hint="write key=value, for instance seed=2"
                )
            _apply(changed, word, key, value, merge=True, hint="list items are written tuned.0.tuner.epochs=5")
            if key == "backbone.arch" and value.startswith(OWN_WEIGHTS):  # the recipe's tag is another architecture's
                if not any(other.startswith("backbone.pretrained=") for other in words):
                    changed["backbone"].pop("pretrained", None)
        recipe = parse(_plain(changed), name=path.stem, where=where, environment=environment)
        check(recipe)
        return recipe

    try:
        return made(overrides)
    except UserError as error:
        guilty = None if error.where == TYPED else _guilty(made, overrides, error.what)
        if guilty is None:
            raise
        rest = "" if error.where == where else error.where.removeprefix(f"{where}: ").removeprefix(f"{path.stem}: ")
        what = f"{rest}: {error.what}" if rest else error.what
        raise type(error)(what, where=f"{TYPED}, {guilty}", hint=error.hint) from None


def _guilty(made: Callable[[Sequence[str]], Recipe], words: Sequence[str], what: str) -> str | None:
    """The override that brought a fault about; None where the recipe has it without."""

    def fault(words: Sequence[str]) -> str | None:
        try:
            made(words)
        except UserError as error:
            return error.what
        return None

    before = next((n for n in reversed(range(len(words))) if fault(words[:n]) != what), None)
    if before is None:
        return None
    if fault(words[:before]) is None or fault(()) is None:
        return words[before]
    return next((word for i, word in enumerate(words) if fault([*words[:i], *words[i + 1 :]]) is None), None)


def set_option(chosen: dict[str, object], word: str, key: str, value: str) -> None:
    """Apply `word`, that is key=value, to plain options as `run` applies it to a recipe, but for mappings: they replace the old ones."""
    config = _config(chosen, where=TYPED)
    _apply(config, word, key, value, merge=False, hint="")
    applied = _plain(config)
    references.check_none(applied, where=TYPED)
    chosen.clear()
    chosen.update(applied)


def _config(plain: dict[str, object], *, where: str) -> DictConfig:
    """Plain data as OmegaConf holds them, references unresolved (`references.py` resolves them); raises UserError for broken ones."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    references.check_form(plain, where=where)
    try:
        return OmegaConf.create(plain)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0], where=where, hint="write ${key} or ${oc.env:NAME}") from None


def _plain(config: DictConfig) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return cast("dict[str, Any]", OmegaConf.to_container(config, resolve=False))


def _apply(config: DictConfig, word: str, key: str, value: str, *, merge: bool, hint: str) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        new = yaml_text.parse(f"v: {value}", where="")["v"]
        references.check_form(new, where="")
        whole = isinstance(new, dict) and "name" in new  # another thing by name brings all of its options
        OmegaConf.update(config, key, new, merge=merge and not whole, force_add=True)
    except UserError as error:
        raise UserError(f"{word!r} cannot be applied: {error.what}", where=TYPED, hint=hint) from None
    except (OmegaConfBaseException, IndexError, TypeError, ValueError, RecursionError) as error:
        what = first_line(error)
        raise UserError(f"{word!r} cannot be applied: {what}", where=TYPED, hint=hint) from None


def with_datasets(recipe: Recipe, names: Sequence[str], registry: Registry) -> Recipe:
    """The recipe on these datasets: its own by label or by the option that names one, or others of the kind of its first."""
    from mergekit_vl.datasets.base import named_by

    stored, given = recipe.plain["dataset"], recipe.values["dataset"]
    own = given if isinstance(given, list) else [given]
    kept = stored if isinstance(stored, list) else [stored]

    def key_of(plain: Mapping[str, Any]) -> str | None:
        return named_by(registry.find("datasets", plain["name"]).resolve())

    chosen = []
    for name in names:
        found = [
            plain
            for d, plain in zip(own, kept)
            if name in (d.get("label"), d["name"]) or name == str(d.get(key_of(d) or "", ""))
        ]
        key = key_of(own[0])
        if not found and key is None:
            raise unknown("dataset", name, [str(d.get("label", d["name"])) for d in own], where="--datasets")
        chosen += found or [{k: v for k, v in kept[0].items() if k != "label"} | {key: name}]
    return parse(
        {**recipe.plain, "dataset": chosen}, name=recipe.name, where=recipe.name, environment=recipe.environment
    )


def dataset_specs(given: Sequence[Mapping[str, object]], *, where: str) -> tuple[Spec, ...]:
    """Specs of datasets that stand elsewhere than under `dataset`."""
    from mergekit_vl import forms
    from mergekit_vl.recipe_forms import NamedForm

    read = [(forms.read(NamedForm, value, where=f"{where}.{i}"), f"{where}.{i}") for i, value in enumerate(given)]
    return tuple(Spec(form.name, form.options, place, form.label or form.name) for form, place in read)


def parse(
    given: Mapping[str, object], *, name: str, where: str, environment: Mapping[str, str | None] = MappingProxyType({})
) -> Recipe:
    """A Recipe from plain data; the door for tests and notebooks. `environment` holds the variables it may refer to."""
    from mergekit_vl import forms
    from mergekit_vl.recipe_forms import RunForm

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
        replace(spec(item, place), of=item.of, grid=item.grid, batch_norm=item.batch_norm)
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
        if strategy.of is not None and strategy.of not in earlier:
            raise unknown("tuned model or earlier strategy", strategy.of, earlier, where=f"{strategy.where}: of")
        earlier.append(strategy.label)
