"""What a bench is asked for, checked, and its rows before they are made; reads no weights and imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergekit_vl import __version__, options
from mergekit_vl.benchmark.search import Search, configurations
from mergekit_vl.errors import Unsuitable, UserError
from mergekit_vl.experiments.cell import WITHOUT
from mergekit_vl.experiments.experiment import Experiment
from mergekit_vl.experiments.experiment import build as build_experiment
from mergekit_vl.experiments.forecast import most_epochs
from mergekit_vl.protocols.base import HasShots, shots_of
from mergekit_vl.recipes.recipe import ALL, Recipe, Spec, TunedSpec, dataset_specs
from mergekit_vl.registry import sources
from mergekit_vl.registry.plugins import Registry
from mergekit_vl.strategies.base import TrainsOn, trains, trains_on
from mergekit_vl.strategies.linear import Linear
from mergekit_vl.strategies.uniform_soup import UniformSoup
from mergekit_vl.system.atomic_files import slug

BEST = "best single model"


ROOTS = ("mergekit_vl.benchmark.cell_rows", "mergekit_vl.benchmark.grid")
"""What every row is made by, beside what makes those of a run."""


@dataclass(frozen=True)
class Plan:
    """A bench, checked."""

    experiment: Experiment
    """Without strategies."""
    strategies: tuple[tuple[Spec, object], ...]
    """(spec, class, or the UserError of one that cannot be built) in the order of the rows."""
    search: Search
    development: tuple[tuple[Spec, object], ...]
    shots: tuple[int | None, ...]
    recipe: Recipe
    """With every strategy named."""
    trainer: tuple[str, type[TrainsOn]] | None
    """The strategy, by its registered name, that trains tuned models on for the rows "continued"."""

    @property
    def place(self) -> str:
        """Hash of what all cells share: a bench with other strategies, datasets, seeds or shots goes on in the same folder."""
        shared = {key: self.recipe.values[key] for key in ("backbone", "tuned")}
        shared["protocol"] = {k: v for k, v in self.recipe.values["protocol"].items() if k != "shots"}
        if self.experiment.joint:
            shared["dataset"] = self.recipe.values["dataset"]
        return _hash([shared, __version__])[:8]

    @property
    def hash(self) -> str:
        """Of the whole request."""
        return _hash([self.recipe.values, self.shots, self._code(), __version__])

    def _code(self) -> dict[str, str]:
        """Of everything that is in the report: module -> hash."""
        made = sources.modules_of([*ROOTS, *self.experiment.makers])
        rows = [
            *(self.trainer[1:] if self.trainer else ()),
            Linear,
            UniformSoup,
            *(cls for _, cls in self.strategies if isinstance(cls, type)),
        ]
        return self.experiment.code() | sources.closure(made, WITHOUT) | sources.closure(sources.modules_of(rows))

    def cells(self) -> int:
        return len(self.shots) * self.experiment.cells

    def trainings(self) -> int:
        """Trainings of a cell, at most: tuned models, those of the selection, the row "continued", and those of strategies."""
        tuned = len(self.experiment.tuners) * (len(self.recipe.datasets) if self.experiment.joint else 1)
        total = tuned * (2 if self.trainer else 1) + (tuned if self.retunes() else 0)
        for spec, cls in self.strategies:
            if isinstance(cls, type) and trains(cls):
                n = len(configurations(cls, spec, tuned, self.search))
                total += n + 2 if n > 1 else 1
        return total

    def split(self) -> str:
        """Where options are chosen, one of `choices.SPLITS`."""
        own = {"held_out": "held_out", "validation": "val", "development": "development"}
        return own.get(self.search.by, "held_out" if self.retunes() else "val")

    def how(self) -> str:
        """Where options are chosen, in words."""
        words = {"held_out": "held-out classes", "val": "validation images", "development": "development datasets"}
        return words[self.split()]

    def time(self) -> str:
        """As measured for prompts of the micro CLIP on 2 cores; of anything else the first cell tells."""
        if self.recipe.backbone.name != "micro" or self.recipe.protocol.name != "base_to_novel":
            return "unknown before the first cell is done, which tells"
        epochs = most_epochs(self.experiment.tuners)
        seconds = self.cells() * (8 + self.trainings() * 0.07 * epochs + 0.5 * len(self.strategies))
        return f"about {max(1, round(seconds / 60))} min on 2 cores"

    def retunes(self) -> bool:
        """Whether models are tuned once more to choose on."""
        novel = self.recipe.protocol.name == "base_to_novel"
        return self.search.by in ("held_out", "development") or (self.search.by == "auto" and novel)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def build(recipe: Recipe, registry: Registry, *, strategies: Sequence[str] = (), shots: Sequence[int] = ()) -> Plan:
    """Check a bench. `strategies` are names or labels, or `all`; with + in front of each they come to the recipe's own."""
    chosen = _chosen(recipe, registry, strategies)
    strategy = [_plain(spec) for spec, _ in chosen]
    recipe = dataclasses.replace(
        recipe,
        strategies=tuple(spec for spec, _ in chosen),
        every=False,
        plain={**recipe.plain, "strategy": strategy},
        values={**recipe.values, "strategy": strategy},
    )
    experiment = build_experiment(dataclasses.replace(recipe, strategies=()), registry, of_bench=True)
    taken = [slug(label) for label in experiment.rows]
    for spec, _ in chosen:
        if slug(spec.label) in taken:
            raise UserError(f"two rows are called {spec.label!r}", where=recipe.name, hint="give one of them a label")
        taken.append(slug(spec.label))
    how = options.build(Search, recipe.search, where=f"{recipe.name}: search")
    built = tuple((spec, _class(spec, registry, how, lenient=lenient)) for spec, lenient in chosen)
    trainer = _trainer(built, registry) if recipe.controls else None
    development = _development(how, recipe, registry)
    return Plan(experiment, built, how, development, _shots(experiment, shots), recipe, trainer)


def _shots(experiment: Experiment, asked: Sequence[int]) -> tuple[int | None, ...]:
    """The numbers of images per class that are asked for, or the protocol's own; raises UserError where it takes none."""
    if asked and not isinstance(experiment.protocol, HasShots):
        name = experiment.recipe.protocol.name
        raise UserError(f"protocol {name} takes no shots", where="--shots", hint="leave it out")
    if bad := [n for n in asked if n < 1]:
        raise UserError(f"shots={bad[0]}", where="--shots", hint="1 or more")
    return tuple(dict.fromkeys(asked)) or (shots_of(experiment.protocol),)


def _development(how: Search, recipe: Recipe, registry: Registry) -> tuple[tuple[Spec, object], ...]:
    """The data sets that options are chosen on, with their options checked."""
    found = []
    for spec in dataset_specs(how.development, where=f"{recipe.name}: search.development"):
        cls = registry.find("datasets", spec.name, where=spec.where).resolve()
        found.append((spec, options.build(cls, spec.options, where=spec.where)))
    return tuple(found)


def _trainer(strategies: Sequence[tuple[Spec, object]], registry: Registry) -> tuple[str, type[TrainsOn]] | None:
    """The first strategy that can train a tuned model on: one of these, else any that is registered."""
    for spec, cls in strategies:
        if trains_on(cls):
            return spec.name, cls
    for name, entry in registry.entries["strategies"].items():
        if trains_on(cls := entry.resolve()):
            return name, cls
    return None


def _chosen(recipe: Recipe, registry: Registry, names: Sequence[str]) -> list[tuple[Spec, bool]]:
    """Each strategy, and whether it may turn out not to be usable: those that `all` brought."""
    every = [(Spec(name, {}, f"strategy {name} (of `all`)", name), True) for name in registry.entries["strategies"]]
    own = [(spec, False) for spec in recipe.strategies]
    rest = [each for each in every if each[0].name not in [spec.name for spec, _ in own]]
    own += rest if recipe.every else []
    if not names:
        return own
    found = [] if not names[0].startswith("+") else own
    for name in (name.removeprefix("+") for name in names):
        more = [each for each in own if name in (each[0].label, each[0].name)]
        if name == ALL:
            more = own + rest
        if not more:
            registry.find("strategies", name, where="--strategies")
            more = [(Spec(name, {}, f"strategy {name}", name), False)]
        found = found + [each for each in more if each not in found]
    labels = [spec.label for spec, _ in found]
    for spec, _ in found:
        if spec.input is not None and spec.input in [s.label for s, _ in own] and spec.input not in labels:
            raise UserError(
                f"{spec.label} is made of {spec.input}", where="--strategies", hint=f"name {spec.input} too"
            )
    return found


def _plain(spec: Spec) -> dict[str, object]:
    more: dict[str, object] = {"label": spec.label} if spec.label != spec.name else {}
    more |= {"input": spec.input} if spec.input is not None else {}
    more |= {"grid": spec.grid} if spec.grid is not None else {}
    more |= {"batch_norm": spec.batch_norm} if spec.batch_norm != "images" else {}
    return {"name": spec.name, **more, **spec.options}


def _class(spec: Spec, registry: Registry, how: Search, *, lenient: bool) -> Any:
    """The strategy's class, or why it cannot be used."""
    try:
        cls = registry.find("strategies", spec.name, where=spec.where).resolve()
    except UserError as error:
        if not lenient:
            raise
        return error
    try:
        configurations(cls, spec, 1, how)
    except UserError as error:  # an option that it cannot do without
        if not lenient:
            raise
        return Unsuitable(error.what, where=error.where, hint=error.hint)
    return cls


@dataclass(frozen=True)
class Entry:
    """A row of the table, before it is made."""

    label: str
    kind: Literal["zero-shot", "tuned", "control", "merged"]
    definition: tuple[object, ...] = ()
    """What its record depends on beside the cell; part of the record's name."""
    spec: Spec | None = None
    """Of a strategy, the always-there ones included."""
    cls: Any = None
    """Its class, or the UserError of one that cannot be used."""
    made_of: tuple[object, ...] = ()
    """The classes of the strategies that it is made of."""

    @property
    def makers(self) -> tuple[object, ...]:
        return tuple(cls for cls in (*self.made_of, self.cls) if isinstance(cls, type))

    @property
    def file(self) -> str:
        return f"{slug(self.label)}-{_hash(self.definition)[:8]}.json"


def lineup(plan: Plan, dataset_names: Sequence[str]) -> list[Entry]:
    """The rows of a cell in the order of the table; `dataset_names` are those of its tasks."""
    made, how = plan.experiment, dataclasses.asdict(plan.search)
    tuned = list(made.tuned_labels)
    if made.joint and not any(isinstance(tuner, TunedSpec) for tuner in made.tuners):
        tuned = [f"{label} on {name}" for label in tuned for name in dataset_names]
    fixed = [Entry(made.base_label, "zero-shot"), *(Entry(label, "tuned") for label in tuned)]
    taken = {spec.label for spec, _ in plan.strategies}
    controls = [entry for entry in _controls(plan, tuned, how) if entry.label not in taken]
    return [*fixed, *controls, *_merged(plan, len(tuned), how)]


def _controls(plan: Plan, tuned: Sequence[str], how: Mapping[str, object]) -> list[Entry]:
    """The rows that every bench has: tuned models trained on, the best of them, and their average."""
    made, entries = plan.experiment, []
    if plan.trainer is not None:
        strategy, cls = plan.trainer
        own = next((spec.options for spec, of in plan.strategies if of is cls), None)
        for i, label in enumerate(tuned):
            tuner = made.tuners[i // (len(tuned) // len(made.tuners))]
            name = "continued" if len(tuned) == 1 else f"{label}, continued"
            given = cls.continued(options.values(tuner) if own is None else own)
            spec = Spec(strategy, given, "the row continued", name, input=label, grid={})
            entries.append(Entry(name, "control", (strategy, spec.options, label), spec, cls))
    entries.append(Entry(BEST, "control", (how,)))
    average, of = ("linear", Linear) if len(tuned) == 1 else ("uniform_soup", UniformSoup)
    spec = Spec(average, {}, "the row average", "average", grid={})
    entries.append(Entry("average", "control", (average,), spec, of))
    return entries


def _merged(plan: Plan, n_tuned: int, how: Mapping[str, object]) -> list[Entry]:
    """The rows of the strategies, each with the chain of those that it is made of."""
    by_label = {spec.label: spec for spec, _ in plan.strategies}
    classes = {spec.label: cls for spec, cls in plan.strategies}
    entries = []
    for spec, kind in plan.strategies:
        chain, parent, parents = [], spec, []
        while True:
            chain.append(_plain(parent))
            if parent.input not in by_label:
                break
            parent = by_label[parent.input]
            parents.append(classes[parent.label])
        grid = configurations(kind, spec, n_tuned, plan.search) if isinstance(kind, type) else []
        tried = [given for given, _ in grid]
        definition = (chain, tried, how, plan.retunes())
        entries.append(Entry(spec.label, "merged", definition, spec, kind, tuple(parents)))
    return entries
