"""The words of `merge` and `check`, or the recipe among them, as a plan."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_vl import options
from mergekit_vl.errors import UserError, unknown
from mergekit_vl.registry.plugins import registry
from mergekit_vl.system.atomic_files import slug
from mergekit_vl.system.devices import check_device, device_of
from mergekit_vl.system.regular_files import read_text, user_path

if TYPE_CHECKING:
    from mergekit_vl.merge_files.matching import Tensors
    from mergekit_vl.merge_files.plan import MergePlan
    from mergekit_vl.merging.method import ClosedForm, MethodInfo
    from mergekit_vl.recipes.merge_forms import WeightsForm

RECIPES = (".yaml", ".yml")


def is_merge(words: Sequence[str], *, base: str | None, strategy: str | None) -> bool:
    """Whether the words of `check` are models, or a recipe of a merge of weights."""
    first = user_path(words[0])
    if base is not None or strategy is not None or sum("=" not in word for word in words) > 1:
        return True
    if first.suffix not in RECIPES:
        return first.exists()
    try:
        contents = _contents(first)
    except UserError:  # which `load_recipe` tells
        return False
    return any(
        isinstance(content, Mapping) and ("weights" in content or "merge_method" in content) for content in contents
    )


def _contents(file: Path) -> list[Any]:
    from mergekit_vl.recipes import yaml_text

    return yaml_text.parse_documents(read_text(file, most=yaml_text.MOST_BYTES), where=str(file))


@dataclass(frozen=True)
class Step:
    """One of the documents of a recipe: what it says, where its result goes, and whether it reads a result of those before."""

    content: Mapping[str, object] | None
    out: Path
    note: str = ""
    follows: bool = False


def steps_of(words: Sequence[str], out: Path) -> list[Step]:
    """The documents of a recipe of mergekit's, in order; later ones name results of earlier ones. A single step for anything else.

    The last result is `out`; the others lie beside it, by their `name`.
    """
    recipe = next((word for word in words if word.endswith(RECIPES)), None)
    contents = _contents(user_path(recipe)) if recipe is not None else []
    if len(contents) < 2:
        return [Step(None, out)]
    steps: list[Step] = []
    made: dict[str, str] = {}
    for i, content in enumerate(contents, 1):
        if not isinstance(content, Mapping) or "merge_method" not in content:
            raise UserError(f"document {i} is no recipe of mergekit's", where=recipe or "", hint="one recipe a file")
        last = i == len(contents)
        name = str(content.get("name") or i)
        target = out if last else out.with_name(f"{out.name}-{slug(name)}")
        told = _with_results(content, made)
        steps.append(Step(told, target, f"document {i} of {len(contents)}, {name}: {target}", told != content))
        made[name] = str(target)
    return steps


def _with_results(value: Any, made: Mapping[str, str]) -> Any:
    """The content with names of earlier results as their folders, where models are named."""
    if isinstance(value, list):
        return [_with_results(each, made) for each in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: made[each]
        if key in ("model", "base_model", "path") and isinstance(each, str) and each in made
        else _with_results(each, made)
        for key, each in value.items()
    }


@dataclass(frozen=True)
class Section:
    """The `weights:` section of a recipe; without a recipe, the models among the words."""

    models: Sequence[object]
    base: Any = None
    strategy: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    dtype: str | None = None
    keep: Sequence[str] = ()
    rebasin: bool = False
    tensors: Tensors = "same"


@dataclass(frozen=True)
class Asked:
    plan: MergePlan
    notes: list[str] = field(default_factory=list)


def ask(
    words: Sequence[str],
    *,
    base: str | None = None,
    strategy: str | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    keep: Sequence[str] | None = None,
    rebasin: bool = False,
    device: str = "cpu",
    tensors: Tensors | None = None,
    weights: str | None = None,
    resize_pos_embed: bool = False,
    content: Mapping[str, object] | None = None,
) -> Asked:
    """The plan that the words of the command line, or the recipe among them, ask for; reads no model. `content` is the recipe's, where it is read already."""
    from mergekit_vl.merge_files.plan import MergePlan

    settings = [word for word in words if "=" in word and not os.path.exists(word)]
    section, notes, where = _section([word for word in words if word not in settings], content)
    given = section.strategy
    name = strategy if strategy is not None else given.get("name")
    if not isinstance(name, str):
        raise UserError("which strategy?", where=where, hint="give --strategy linear, for instance")
    named = _name_models(section.models, base if base is not None else section.base, where=where)
    cls, info = closed_form(name, where=where)
    chosen, more = _own_options(given, name, where)
    method: ClosedForm = options.build(
        cls, _choose(cls, info, chosen, settings, named, where=where), where=f"strategy {name}"
    )
    plan = MergePlan(
        name,
        method,
        named.paths,
        named.base,
        named.labels,
        "".join(named.base_label),
        seed if seed is not None else section.seed,
        dtype if dtype is not None else section.dtype,
        _kept(keep or section.keep, where),
        rebasin or section.rebasin,
        _device(method, len(named.paths), device),
        tensors or section.tensors,
        resize_pos_embed,
        weights or "plain",
    )
    return Asked(plan, [*notes, *more])


def _section(models: Sequence[str], content: Mapping[str, object] | None) -> tuple[Section, list[str], str]:
    """What models and strategy the words ask for, or the recipe among them; notes, and where errors are."""
    if not any(word.endswith(RECIPES) for word in models):
        return Section(models), [], "command line"
    if len(models) > 1:
        raise UserError("a recipe names its models itself", where="command line", hint="give the recipe alone")
    form, notes = read_recipe(models[0], content)
    return Section(**dict(form)), notes, models[0]


def _kept(keep: Sequence[str], where: str) -> tuple[str, ...]:
    if "" in keep:
        raise UserError("--keep '' is part of every name", where=where, hint="give a part of the names to be kept")
    return tuple(keep)


def _own_options(given: Mapping[str, object], name: str, where: str) -> tuple[dict[str, object], list[str]]:
    """The recipe's options of a strategy; those of another one are left out, with a note."""
    chosen = {key: value for key, value in given.items() if key != "name"}
    if not chosen or given.get("name") == name:
        return chosen, []
    left = f"the options of {given.get('name')} ({', '.join(chosen)}) are not those of {name}: left out"
    return {}, [f"{where}: {left}"]


def _device(method: ClosedForm, n: int, asked: str) -> str:
    """Where SVDs of n models are taken; a method without one stays on the CPU."""
    if not method.describe(n).svds:
        check_device(asked)
        return "cpu"
    device = device_of(asked)
    if device == "cpu":
        return device
    import torch

    torch.zeros(1, device=device)  # what the driver takes is there before --max-ram is counted
    return device


@dataclass(frozen=True)
class _Named:
    """Models with labels of their own; `weights` as far as a recipe tells them."""

    paths: tuple[str, ...]
    labels: tuple[str, ...]
    base: str | None
    base_label: tuple[str, ...]
    weights: dict[str, object]


def _name_models(models: Sequence[Any], base: str | None, *, where: str) -> _Named:
    """From the entries of a recipe (paths, or mappings with path, label and weight) or the words of the command line."""
    from mergekit_vl.checkpoints.reader import distinct, label_of

    if not models:
        raise UserError("no model to merge", where=where, hint="name the models, or a recipe")
    paths: list[str] = []
    labels: list[str] = []
    weights: dict[str, object] = {}
    for model in ([base] if base is not None else []) + list(models):
        entry = _entry(model, where)
        label = distinct([*labels, str(entry.get("label") or label_of(entry["path"]))])[-1]
        paths.append(entry["path"])
        labels.append(label)
        if "weight" in entry:
            weights[label] = entry["weight"]
    first = 0 if base is None else 1
    return _Named(
        tuple(paths[first:]), tuple(labels[first:]), paths[0] if first else None, tuple(labels[:first]), weights
    )


def _entry(model: Any, where: str) -> Mapping[str, Any]:
    """A model of a recipe or of the command line as a mapping with path, and perhaps label and weight."""
    entry = model if isinstance(model, Mapping) else {"path": model}
    for key in entry:
        if key not in ("path", "label", "weight"):
            raise unknown("key", key, ("path", "label", "weight"), where=f"{where}: models")
    if not isinstance(entry.get("path"), str):
        raise UserError(f"{model!r} is no model", where=where, hint="write {path: FILE, weight: 0.5}")
    return entry


def _choose(
    cls: type, info: MethodInfo, chosen: dict[str, object], settings: Sequence[str], named: _Named, *, where: str
) -> dict[str, object]:
    """The strategy's options: the recipe's, then key=value, then the models' weights under the option that takes them."""
    known = tuple(options.key_of(f) for f in dataclasses.fields(cls) if f.init)
    weighed = (*(named.base_label if info.weighs_base else ()), *named.labels)
    weights = {**named.weights, **_set(chosen, settings, known, weighed)}
    if not weights:
        return chosen
    by_word = any(word.partition("=")[0] == info.weights for word in settings)
    if by_word or (info.weights in chosen and named.weights):
        both = f"{info.weights}= and weights by label ({', '.join(weights)})"
        raise UserError(both, where="command line" if by_word else where, hint="give one of them")
    if info.weights not in known:
        raise UserError("takes no weight per model", where=where, hint=f"its options are {', '.join(known) or 'none'}")
    return {**chosen, info.weights: _in_order(weights, weighed, where)}


def _set(
    chosen: dict[str, object], settings: Sequence[str], known: Sequence[str], weighed: Sequence[str]
) -> dict[str, object]:
    """Applies the words key=value to the options `chosen`; weights of models, by label, are given back."""
    weights: dict[str, object] = {}
    if not settings:
        return weights
    from mergekit_vl.recipes.overrides import set_option

    for word in settings:
        key, _, value = word.partition("=")
        if key in weighed and key not in known:
            holder: dict[str, object] = {}
            set_option(holder, word, "v", value)
            weights[key] = holder["v"]
        elif key.partition(".")[0] in known:
            set_option(chosen, word, key, value)
        else:
            raise unknown("option or model", key, (*known, *weighed), where="command line")
    return weights


def _in_order(weights: Mapping[str, object], weighed: Sequence[str], where: str) -> list[object]:
    """The weights in the order of the models `weighed`, one for each."""
    if missing := [label for label in weighed if label not in weights]:
        raise UserError(f"{missing[0]} has no weight", where=where, hint=f"write {missing[0]}=NUMBER too")
    if left := [label for label in weights if label not in weighed]:
        raise UserError(f"the base {left[0]} takes no weight", where=where, hint="leave it out")
    return [weights[label] for label in weighed]


def closed_form(name: str, *, where: str) -> tuple[type, MethodInfo]:
    """The class of a registered strategy that merges weights without data, and what it is."""
    from mergekit_vl.merging.method import info_of

    cls = registry().find("strategies", name, where=where).resolve()
    info = info_of(cls)
    if info is None:
        raise UserError(f"{name} needs data or an evaluation", where=where, hint="use `mergekit-vl run` with it")
    return cls, info


def read_recipe(path: str, content: Any = None) -> tuple[WeightsForm, list[str]]:
    """The `weights:` section of a recipe, or what a mergekit YAML means in its terms, with notes to print."""
    from mergekit_vl.recipes import forms
    from mergekit_vl.recipes.merge_forms import WeightsForm

    if content is None:
        found = _contents(user_path(path))
        content = found[0] if found else None
    if isinstance(content, Mapping) and "merge_method" in content:
        from mergekit_vl.merge_files.mergekit_yaml import translate

        return translate(content, where=path)
    if not isinstance(content, Mapping) or not isinstance(content.get("weights"), Mapping):
        raise UserError("has no `weights:` section", where=path, hint="use `mergekit-vl run` for an experiment")
    if beside := [key for key in content if key != "weights"]:
        raise UserError(f"{beside[0]!r} beside `weights:`", where=path, hint="a merge of weights has one section")
    return forms.read(WeightsForm, content["weights"], where=path), []
