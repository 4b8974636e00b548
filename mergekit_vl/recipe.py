"""Recipes: YAML and `key=value` overrides in, frozen plain data out."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mergekit_vl import __version__, references, yaml_text
from mergekit_vl.errors import UserError, unknown
from mergekit_vl.system.regular_files import read_text, user_path

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from mergekit_vl.registry.plugins import Registry

KEYS = ("backbone", "dataset", "protocol", "tuned", "strategy", "controls", "seed", "search")
MOST_SEED = 2**32 - 1
"""Every generator takes one as large, and those that are derived from it."""
OF_STRATEGY = ("of", "grid", "batch_norm")
"""Keys that any strategy may have beside its own options."""
TYPED = "command line"
OWN_WEIGHTS = ("local-dir:", "hf-hub:")
"""What a `backbone.arch` starts with that brings its weights: an override with it takes the recipe's `pretrained` away."""
ALL = "all"
"""As `strategy`, or among them: every registered one, for `bench`."""
DEFAULTS: dict[str, Any] = {
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
    options: Mapping[str, Any]
    where: str
    label: str
    """The name of its row in reports: `label` of the recipe, or the name."""
    of: str | None = None
    """Of a strategy: the label of an earlier one, or of a tuned model, that it merges with the base instead of all tuned ones."""
    grid: Mapping[str, Any] | None = None
    """Of a strategy: values of its options that `bench` tries, instead of the strategy's own grid."""
    batch_norm: str = "images"
    """Of a strategy: where the running statistics of a merged tower come from, `images` or the `mean` over the models."""


@dataclass(frozen=True)
class TunedSpec:
    """A fine-tuned anchor: made by a tuner, or read from a checkpoint."""

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
    search: Mapping[str, Any]
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
        raise UserError("a recipe is a mapping of keys", where=where, hint=f"use {', '.join(KEYS)}")
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


def set_option(chosen: dict[str, Any], word: str, key: str, value: str) -> None:
    """Apply `word`, that is key=value, to plain options as `run` applies it to a recipe, but for mappings: they replace the old ones."""
    config = _config(chosen, where=TYPED)
    _apply(config, word, key, value, merge=False, hint="")
    applied = _plain(config)
    references.check_none(applied, where=TYPED)
    chosen.clear()
    chosen.update(applied)


def _config(plain: dict[str, Any], *, where: str) -> DictConfig:
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

    return OmegaConf.to_container(config, resolve=False)  # type: ignore[return-value]


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
        what = (str(error).splitlines() or [type(error).__name__])[0]
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


def dataset_specs(given: Sequence[Mapping[str, Any]], *, where: str) -> tuple[Spec, ...]:
    """Specs of datasets that stand elsewhere than under `dataset`."""
    out = []
    for i, value in enumerate(given):
        if not isinstance(value.get("name"), str):
            raise UserError("a dataset needs a name", where=f"{where}.{i}", hint="write {name: ...}")
        rest = {k: v for k, v in value.items() if k not in ("name", "label")}
        out.append(Spec(value["name"], rest, f"{where}.{i}", str(value.get("label", value["name"]))))
    return tuple(out)


def parse(
    given: Mapping[str, Any], *, name: str, where: str, environment: Mapping[str, str | None] = MappingProxyType({})
) -> Recipe:
    """A Recipe from plain data; the door for tests and notebooks. `environment` holds the variables it may refer to."""
    for key in given:
        if key not in KEYS:
            raise unknown("key", key, KEYS, where=where)
    for key in ("dataset", "strategy"):
        if key not in given:
            raise UserError(f"{key!r} is missing", where=where, hint=f"add {key}: {{name: ...}}")
    stored = references.expand({**DEFAULTS, **given}, where=where)
    plain = references.fill(stored, environment, where=where)

    def spec(value: Any, key: str) -> Spec:
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise UserError(f"{key} needs a name", where=where, hint=f"write {key}: {{name: ...}}")
        place, label = f"{where}: {key} {value['name']}", str(value.get("label", value["name"]))
        own = ("name", "label", *(OF_STRATEGY if key.startswith("strategy") else ()))
        given = {k: v for k, v in value.items() if k not in own}
        if not key.startswith("strategy"):
            return Spec(value["name"], given, place, label)
        grid = value.get("grid")
        if grid is not None and not (
            isinstance(grid, Mapping) and all(isinstance(values, list) and values for values in grid.values())
        ):
            raise UserError("grid is a mapping of lists", where=place, hint="write grid: {alpha: [0.25, 0.5, 0.75]}")
        if (batch_norm := value.get("batch_norm", "images")) not in ("images", "mean"):
            raise UserError(f"batch_norm={batch_norm}", where=place, hint="images or mean")
        of = str(value["of"]) if "of" in value else None
        return Spec(value["name"], given, place, label, of, grid, batch_norm)

    def specs(value: Any, key: str) -> tuple[Spec, ...]:
        values = value if isinstance(value, list) else [value]
        if not values:
            raise UserError(f"{key} is an empty list", where=where, hint="name at least one")
        return tuple(spec(v, f"{key}.{i}" if isinstance(value, list) else key) for i, v in enumerate(values))

    tuned = []
    if not isinstance(plain["tuned"], list) or not plain["tuned"]:
        raise UserError("tuned is a list of anchors", where=where, hint="write tuned: [{tuner: {name: coop}}]")
    for i, item in enumerate(plain["tuned"]):
        keys = set(item) if isinstance(item, Mapping) else set()
        if keys != {"tuner"} and not {"checkpoint"} <= keys <= {"checkpoint", "init", "label"}:
            raise UserError(
                f"tuned.{i} needs either a tuner or a checkpoint",
                where=where,
                hint="write {tuner: {name: coop}} or {checkpoint: file}, which may have init and label",
            )
        tuned.append(
            TunedSpec(None, **{key: str(value) for key, value in item.items()})
            if "checkpoint" in item
            else TunedSpec(spec(item["tuner"], f"tuned.{i}.tuner"))
        )
    seeds = plain["seed"] if isinstance(plain["seed"], list) else [plain["seed"]]
    if not seeds or any(not isinstance(s, int) or isinstance(s, bool) or not 0 <= s <= MOST_SEED for s in seeds):
        hint = f"a whole number from 0 to {MOST_SEED}, or a list of them"
        raise UserError(f"seed={plain['seed']!r}", where=where, hint=hint)
    if not isinstance(plain["controls"], bool):
        raise UserError(f"controls={plain['controls']!r}", where=where, hint="true or false")
    given_strategies = plain["strategy"] if isinstance(plain["strategy"], list) else [plain["strategy"]]
    named = [strategy for strategy in given_strategies if strategy != ALL]
    every = len(named) < len(given_strategies)
    strategies = (
        () if every and not named else specs(named if isinstance(plain["strategy"], list) else named[0], "strategy")
    )
    anchors = [t.tuner.label if t.tuner else t.label or Path(str(t.checkpoint)).stem for t in tuned]
    for i, strategy in enumerate(strategies):
        if strategy.of is not None and strategy.of not in (earlier := [*anchors, *(s.label for s in strategies[:i])]):
            raise unknown("tuned model or earlier strategy", strategy.of, earlier, where=f"{strategy.where}: of")
    if not isinstance(search := plain.get("search", {}), Mapping):
        raise UserError("search is a mapping", where=where, hint="write search: {budget: 8}")
    return Recipe(
        name=name,
        backbone=spec(plain["backbone"], "backbone"),
        datasets=specs(plain["dataset"], "dataset"),
        protocol=spec(plain["protocol"], "protocol"),
        tuned=tuple(tuned),
        strategies=strategies,
        every=every,
        controls=plain["controls"],
        seeds=tuple(dict.fromkeys(seeds)),
        search=search,
        plain=stored,
        values=plain,
        environment=environment,
    )
