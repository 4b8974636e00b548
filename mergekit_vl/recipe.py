"""Recipes: YAML and `key=value` overrides in, frozen plain data out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_vl import __version__
from mergekit_vl.errors import UserError, unknown

if TYPE_CHECKING:
    from mergekit_vl.plugins import Registry

KEYS = ("backbone", "dataset", "protocol", "tuned", "strategy", "controls", "seed", "search")
OF_STRATEGY = ("of", "grid", "batch_norm")
"""Keys that any strategy may have beside its own options."""
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
    """The resolved recipe as nested dicts and lists, defaults included."""

    @property
    def hash(self) -> str:
        """Of the resolved recipe and the version of the code."""
        return hashlib.sha256(json.dumps([self.plain, __version__], sort_keys=True).encode()).hexdigest()[:12]


def recipe_folders() -> tuple[Path, ...]:
    here = Path(__file__).parent
    return tuple(folder for folder in (here / "recipes", here.parent / "recipes") if folder.is_dir())


def installed_recipes() -> dict[str, Path]:
    return {path.stem: path for folder in reversed(recipe_folders()) for path in sorted(folder.glob("*.yaml"))}


def find_recipe(given: str) -> Path:
    """A path, or the name of an installed recipe."""
    path = Path(given).expanduser()
    if path.is_file():
        return path
    recipes = installed_recipes()
    if path.suffix == "" and len(path.parts) == 1 and given in recipes:
        return recipes[given]
    if path.parent == Path("recipes") and path.stem in recipes:  # as the README writes it, from any folder
        return recipes[path.stem]
    raise unknown("recipe", given, recipes)


def load_recipe(given: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe's form; names and options are checked by `experiment.build`."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = find_recipe(given)
    where = str(path)
    try:
        config = OmegaConf.create(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(
            f"broken YAML{place}: {getattr(error, 'problem', None) or error}", where=where, mend="mend the line"
        ) from None
    if not OmegaConf.is_dict(config):
        raise UserError("a recipe is a mapping of keys", where=where, mend=f"use {', '.join(KEYS)}")
    for (
        key,
        value,
    ) in DEFAULTS.items():  # before the overrides: protocol.shots=4 finds the protocol of a recipe without one
        if key not in config:
            config[key] = value
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"{override!r} is not an override", where="command line", mend="write key=value, for instance seed=2"
            )
        _apply(config, override, key, value, merge=True, mend="list items are written tuned.0.tuner.epochs=5")
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0], where=where, mend="mend the ${...}") from None
    assert isinstance(plain, dict)
    return parse(plain, name=path.stem, where=where)  # type: ignore[arg-type]


def set_option(chosen: dict[str, Any], word: str, key: str, value: str) -> None:
    """Apply `word`, that is key=value, to plain options as `run` applies it to a recipe, but for mappings: they replace the old ones."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = OmegaConf.create(chosen)
    _apply(config, word, key, value, merge=False, mend="")
    try:
        applied = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise _not_applied(word, error, "") from None
    chosen.clear()
    chosen.update(applied)  # type: ignore[arg-type]


def _apply(config: Any, word: str, key: str, value: str, *, merge: bool, mend: str) -> None:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        new = OmegaConf.create(f"v: {value}").v
        whole = OmegaConf.is_dict(new) and "name" in new  # another thing by name brings all of its options
        OmegaConf.update(config, key, new, merge=merge and not whole, force_add=True)
    except (OmegaConfBaseException, yaml.YAMLError, IndexError, TypeError, ValueError) as error:
        raise _not_applied(word, error, mend) from None


def _not_applied(word: str, error: Exception, mend: str) -> UserError:
    return UserError(f"{word!r} cannot be applied: {str(error).splitlines()[0]}", where="command line", mend=mend)


def with_datasets(recipe: Recipe, names: Sequence[str], registry: Registry) -> Recipe:
    """The recipe on these datasets: its own by label or by the option that names one, or others of the kind of its first."""
    given = recipe.plain["dataset"]
    own = given if isinstance(given, list) else [given]

    def named_by(plain: Mapping[str, Any]) -> str | None:
        return getattr(registry.find("datasets", plain["name"]).resolve(), "named_by", None)

    chosen = []
    for name in names:
        found = [d for d in own if name in (d.get("label"), d["name"]) or name == str(d.get(named_by(d) or "", ""))]
        key = named_by(own[0])
        if not found and key is None:
            raise unknown("dataset", name, [str(d.get("label", d["name"])) for d in own], where="--datasets")
        chosen += found or [{k: v for k, v in own[0].items() if k != "label"} | {key: name}]
    return parse({**recipe.plain, "dataset": chosen}, name=recipe.name, where=recipe.name)


def dataset_specs(given: Sequence[Mapping[str, Any]], *, where: str) -> tuple[Spec, ...]:
    """Specs of datasets that stand elsewhere than under `dataset`."""
    out = []
    for i, value in enumerate(given):
        if not isinstance(value.get("name"), str):
            raise UserError("a dataset needs a name", where=f"{where}.{i}", mend="write {name: ...}")
        rest = {k: v for k, v in value.items() if k not in ("name", "label")}
        out.append(Spec(value["name"], rest, f"{where}.{i}", str(value.get("label", value["name"]))))
    return tuple(out)


def parse(given: Mapping[str, Any], *, name: str, where: str) -> Recipe:
    """A Recipe from plain data; the door for tests and notebooks."""
    for key in given:
        if key not in KEYS:
            raise unknown("key", key, KEYS, where=where)
    for key in ("dataset", "strategy"):
        if key not in given:
            raise UserError(f"{key!r} is missing", where=where, mend=f"add {key}: {{name: ...}}")
    plain = {**DEFAULTS, **given}

    def spec(value: Any, key: str) -> Spec:
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise UserError(f"{key} needs a name", where=where, mend=f"write {key}: {{name: ...}}")
        place, label = f"{where}: {key} {value['name']}", str(value.get("label", value["name"]))
        own = ("name", "label", *(OF_STRATEGY if key.startswith("strategy") else ()))
        given = {k: v for k, v in value.items() if k not in own}
        if not key.startswith("strategy"):
            return Spec(value["name"], given, place, label)
        grid = value.get("grid")
        if grid is not None and not (
            isinstance(grid, Mapping) and all(isinstance(values, list) and values for values in grid.values())
        ):
            raise UserError("grid is a mapping of lists", where=place, mend="write grid: {alpha: [0.25, 0.5, 0.75]}")
        if (batch_norm := value.get("batch_norm", "images")) not in ("images", "mean"):
            raise UserError(f"batch_norm={batch_norm}", where=place, mend="images or mean")
        of = str(value["of"]) if "of" in value else None
        return Spec(value["name"], given, place, label, of, grid, batch_norm)

    def specs(value: Any, key: str) -> tuple[Spec, ...]:
        values = value if isinstance(value, list) else [value]
        if not values:
            raise UserError(f"{key} is an empty list", where=where, mend="name at least one")
        return tuple(spec(v, f"{key}.{i}" if isinstance(value, list) else key) for i, v in enumerate(values))

    tuned = []
    if not isinstance(plain["tuned"], list) or not plain["tuned"]:
        raise UserError("tuned is a list of anchors", where=where, mend="write tuned: [{tuner: {name: coop}}]")
    for i, item in enumerate(plain["tuned"]):
        keys = set(item) if isinstance(item, Mapping) else set()
        if keys != {"tuner"} and not {"checkpoint"} <= keys <= {"checkpoint", "init", "label"}:
            raise UserError(
                f"tuned.{i} needs either a tuner or a checkpoint",
                where=where,
                mend="write {tuner: {name: coop}} or {checkpoint: file}, which may have init and label",
            )
        tuned.append(
            TunedSpec(None, **{key: str(value) for key, value in item.items()})
            if "checkpoint" in item
            else TunedSpec(spec(item["tuner"], f"tuned.{i}.tuner"))
        )
    seeds = plain["seed"] if isinstance(plain["seed"], list) else [plain["seed"]]
    if not seeds or any(not isinstance(s, int) or isinstance(s, bool) or s < 0 for s in seeds):
        raise UserError(f"seed={plain['seed']!r}", where=where, mend="a whole number from 0, or a list of them")
    if not isinstance(plain["controls"], bool):
        raise UserError(f"controls={plain['controls']!r}", where=where, mend="true or false")
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
        raise UserError("search is a mapping", where=where, mend="write search: {budget: 8}")
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
        plain=plain,
    )
