"""From a recipe to a report: `build` checks every name and option, `run` tunes, merges and evaluates cell by cell.

A cell is one (dataset, seed). Each row of a cell is written as soon as it is done, so the same command continues a killed run.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mergekit_vl import options
from mergekit_vl.adapters import before_tuning
from mergekit_vl.backbones.base import base_label
from mergekit_vl.datasets.base import named_by
from mergekit_vl.errors import Unsuitable, UserError
from mergekit_vl.experiments.cell import WITHOUT, Cell
from mergekit_vl.experiments.changes import changes
from mergekit_vl.experiments.run_folder import alone, claim, tidied
from mergekit_vl.models.inputs import MergeInputs, TaskData
from mergekit_vl.models.model import Classes
from mergekit_vl.printable import counted, first_names
from mergekit_vl.protocols.base import joint, one_task_each
from mergekit_vl.recipes.recipe import Recipe, Spec, TunedSpec
from mergekit_vl.registry import sources
from mergekit_vl.registry.plugins import Registry
from mergekit_vl.reporter import ALL_CELLS, Reporter, Within
from mergekit_vl.strategies.base import controls_of, trains
from mergekit_vl.system.atomic_files import cell_name, slug
from mergekit_vl.system.devices import device_of
from mergekit_vl.system.regular_files import user_path

if TYPE_CHECKING:
    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.backbones.base import BackboneOptions
    from mergekit_vl.datasets.base import Dataset, DatasetOptions
    from mergekit_vl.models.features import FeatureStore
    from mergekit_vl.models.model import Model, Single
    from mergekit_vl.protocols.base import EvaluationProtocol, JointProtocol, Task
    from mergekit_vl.reports.results import CellResult, LinePoint, Report, Row
    from mergekit_vl.strategies.base import Strategy
    from mergekit_vl.tuners.base import Tuner

LINE_POINTS = 11
ROOTS = (__name__, "mergekit_vl.models.evaluate", "mergekit_vl.models.features", "mergekit_vl.backbones.backbone")
"""What every row is made by, beside the classes that the recipe names."""


@dataclass(frozen=True)
class Experiment:
    """Live, checked objects; buildable without YAML."""

    recipe: Recipe
    backbone: BackboneOptions
    datasets: tuple[DatasetOptions, ...]
    protocol: EvaluationProtocol
    tuners: tuple[Tuner | TunedSpec | Single, ...]
    """A tuner, or a checkpoint: its spec, and the model once it is read."""
    tuned_labels: tuple[str, ...]
    strategies: tuple[tuple[str, Strategy], ...]
    """(label, strategy); the first is the recipe's main one."""

    registry: Registry
    """For the adapters that stored models are of."""

    @property
    def rows(self) -> tuple[str, ...]:
        return (
            self.base_label,
            *self.tuned_labels,
            *(label for label, _ in self.controls),
            *(label for label, _ in self.strategies),
        )

    @property
    def base_label(self) -> str:
        return base_label(self.backbone)

    @property
    def joint(self) -> bool:
        """Whether all datasets make one cell, a model being tuned on each and those merged."""
        return joint(self.protocol)

    @property
    def one_task_each(self) -> bool:
        """Whether each dataset is a task of its own, with a tuned model of its own."""
        return one_task_each(self.protocol)

    @property
    def cells(self) -> int:
        return len(self.recipe.seeds) * (1 if self.joint else len(self.datasets))

    @property
    def makers(self) -> tuple[object, ...]:
        """What every row is made by: modules, and objects of the recipe."""
        return (*ROOTS, self.backbone, *self.datasets, self.protocol)

    def code(self) -> dict[str, str]:
        """Of everything that is in the report: module -> hash."""
        tuners = [t for t in self.tuners if not isinstance(t, TunedSpec)]
        adapters = (
            self.registry.adapters() if len(tuners) < len(self.tuners) else ()
        )  # which one is told by the checkpoint
        rows = [*tuners, *adapters, *(s for _, s in (*self.controls, *self.strategies))]
        return sources.closure(sources.modules_of(self.makers), WITHOUT) | sources.closure(
            sources.modules_of(["mergekit_vl.experiments.landscape", "mergekit_vl.storage.tuned", *rows])
        )

    def check_by_task(self, label: str, strategy: Strategy) -> None:
        """Raise UserError for a strategy that makes a model for each task, where the tuned models are not one a task."""
        from mergekit_vl.merging.method import described

        one_each = len(self.tuners) == 1 or any(isinstance(tuner, TunedSpec) for tuner in self.tuners)
        info = described(strategy, len(self.tuners))
        if info is not None and info.by_task and not (self.one_task_each and one_each):
            raise Unsuitable(
                "makes a model for each task, of one tuned model each",
                where=f"{self.recipe.name}: {label}",
                hint="use the protocol multi_task with one tuner, or set its option task",
            )

    @property
    def controls(self) -> tuple[tuple[str, Strategy], ...]:
        """What strategies want beside them, by label; of two that want one of the same label, the first has it."""
        if not self.recipe.controls:
            return ()
        wanted: dict[str, Strategy] = {}
        for _, strategy in self.strategies:
            for label, control in controls_of(strategy):
                wanted.setdefault(label, control)
        return tuple(wanted.items())


def build(recipe: Recipe, registry: Registry, *, of_bench: bool = False) -> Experiment:
    """Resolve every name and check every option; reads no weights and imports no torch. A bench has its strategies elsewhere."""

    def make(kind: str, spec: Spec) -> Any:
        return options.build(registry.find(kind, spec.name, where=spec.where).resolve(), spec.options, where=spec.where)

    if recipe.every and not of_bench:
        raise UserError(
            "strategy: all is for bench", where=recipe.name, hint="name strategies, or use mergekit-vl bench"
        )

    tuners = tuple(make("tuners", item.tuner) if item.tuner is not None else item for item in recipe.tuned)
    labels = tuple(_tuned_label(item, f"tuned.{i}") for i, item in enumerate(recipe.tuned))
    experiment = Experiment(
        recipe=recipe,
        backbone=make("backbones", recipe.backbone),
        datasets=tuple(make("datasets", spec) for spec in recipe.datasets),
        protocol=make("protocols", recipe.protocol),
        tuners=tuners,
        tuned_labels=labels,
        strategies=tuple((spec.label, make("strategies", spec)) for spec in recipe.strategies),
        registry=registry,
    )
    _check_checkpoints(experiment)
    for label, strategy in experiment.strategies:
        experiment.check_by_task(label, strategy)
    _check_rows(experiment)
    for what in (experiment.protocol, *experiment.tuners, *(s for _, s in experiment.strategies)):
        _check_numbers(what, where=f"{recipe.name}: {type(what).__name__}")
    return experiment


def _tuned_label(item: TunedSpec, place: str) -> str:
    """What a tuned model is called; raises UserError for a checkpoint that is not there."""
    if item.tuner is not None:
        return item.tuner.label
    path = user_path(str(item.checkpoint))
    if not path.exists():
        raise UserError("no such checkpoint", where=f"{place}: {path}", hint="give the file of a tuned model")
    return item.label or path.stem


def _check_checkpoints(made: Experiment) -> None:
    """Raise UserError for checkpoints that are not one for each of the data sets that make one cell."""
    checkpoints, data = sum(isinstance(tuner, TunedSpec) for tuner in made.tuners), len(made.recipe.datasets)
    if made.one_task_each and checkpoints and not checkpoints == len(made.tuners) == data:
        raise UserError(
            f"{checkpoints} checkpoints among {len(made.tuners)} tuned models for {data} data sets",
            where=f"{made.recipe.name}: tuned",
            hint="give tuners, or one checkpoint per data set, in the order of the data sets",
        )


def _check_rows(made: Experiment) -> None:
    """Raise UserError for labels that name the same file, or one of a cell's own."""
    name, files = made.recipe.name, [slug(row) for row in made.rows]
    if twice := [row for row, file in zip(made.rows, files) if files.count(file) > 1]:
        raise UserError(f"two rows are called {twice[0]!r}", where=name, hint="give one of them a label")
    if taken := [row for row, file in zip(made.rows, files) if file in ("key", "shots")]:
        raise UserError(f"no row can be called {taken[0]!r}", where=name, hint="give it another label")


def _check_numbers(what: Any, *, where: str) -> None:
    """Raise UserError for an option of training or of data that is out of range."""
    given = options.values(what)
    for name in ("shots", "epochs", "batch", "lr", "n_context", "crop"):
        value, most = given.get(name), 1 if name == "crop" else sys.float_info.max
        if value is not None and not 0 < value <= most:
            hint = "it must be positive" if value <= 0 else "at most 1" if name == "crop" else "a finite number"
            raise UserError(f"{name}={value}", where=where, hint=hint)


@dataclass(frozen=True)
class Ready:
    """An experiment whose backbone, data and checkpoints are loaded and fit."""

    experiment: Experiment
    backbone: Backbone
    datasets: tuple[Dataset, ...]
    device: str
    more: tuple[str, ...] = ()
    """Modules that rows are made by beside the experiment's."""
    told: set[str] = field(default_factory=set)
    """Reasons that were given for making rows again."""

    def tasks(self, protocol: EvaluationProtocol, seeds: tuple[int, ...]) -> list[tuple[str, int, Task]]:
        """(dataset, seed, task) of each cell; raises UserError where a test needs a text tower that is not there."""
        if self.experiment.joint:
            name, together = " + ".join(dataset.name for dataset in self.datasets), cast("JointProtocol", protocol)
            out = [(name, seed, together.task(self.datasets, seed)) for seed in seeds]
        else:
            out = [(each.name, seed, protocol.task(each, seed)) for each in self.datasets for seed in seeds]
        novel = [name for _, _, task in out for name in novel_classes(task)]
        if novel and self.backbone.text is None and out[0][2].kept:
            raise UserError(
                f"has no text tower, and no class for {counted(novel, 'class', 'classes')} of what is kept: {first_names(novel)}",
                where=self.backbone.spec,
                hint="keep images of the classes that are new, or use a CLIP",
            )
        if self.experiment.one_task_each or novel:
            self.backbone.require_text()
        return out

    def everywhere(self, tasks: Sequence[tuple[str, int, Task]], seed: int) -> tuple[TaskData, ...]:
        """What one model is chosen on for all data sets: their tasks of a seed, where checkpoints are tested on each of them."""
        checkpoints = all(tuned.checkpoint is not None for tuned in self.experiment.recipe.tuned)
        if self.experiment.joint or not checkpoints:
            return ()
        return tuple(task.data[0] for _, of, task in tasks if of == seed)

    def cell(
        self,
        task: Task,
        seed: int,
        folder: Path,
        store: FeatureStore,
        reporter: Reporter,
        everywhere: tuple[TaskData, ...] = (),
    ) -> Cell:
        base = before_tuning.of_task(self.backbone, task.data[0], store)
        scratch = folder / "scratch"
        inputs = MergeInputs(
            base, (), task.data[:1], store, seed, self.device, reporter, scratch, everywhere, task.kept
        )
        code = (*self.experiment.makers, *self.more)
        return Cell(task, inputs, folder, self.experiment.registry, code, self.told)

    def endpoints(self, cell: Cell) -> tuple[list[Row], MergeInputs]:
        """The rows of the base and of the tuned models in a cell, and the inputs that merges get."""
        made = self.experiment
        return cell.endpoints(made.base_label, tuple(zip(made.tuned_labels, made.tuners)), joint=made.one_task_each)


def novel_classes(task: Task) -> list[str]:
    """What tests ask for and nothing is tuned on."""
    known = {name for data in task.data for name in data.classes.names}
    return list(dict.fromkeys(name for _, classes, _ in task.tests for name in classes.names if name not in known))


def prepare(experiment: Experiment, *, device: str, reporter: Reporter) -> Ready:
    """Load what an experiment names; a class name that is nothing to the tokenizer, or a damaged file, ends it here."""
    reporter.progress(0, 0, "loading torch and the backbone")
    from mergekit_vl.system.reproducible import make_reproducible

    make_reproducible(device)
    backbone = experiment.backbone.build(device)
    for note in backbone.notes:
        reporter.warn(note)
    datasets = load_datasets(experiment.recipe.datasets, experiment.datasets, reporter)
    for dataset in datasets if backbone.text is not None else ():
        for texts in ([*dataset.classes], *Classes(dataset.classes, dataset.templates).texts()):
            backbone.tokenize(texts)  # a name that is nothing to the tokenizer, or too long for it, ends the run here
        _warn_of_unknown_words(backbone, dataset, reporter)
    tuners = tuple(_loaded(tuner, backbone, experiment.registry) for tuner in experiment.tuners)
    return Ready(dataclasses.replace(experiment, tuners=tuners), backbone, tuple(datasets), device)


def run_in(
    experiment: Experiment, folder: Path, *, device: str, force: bool, reporter: Reporter
) -> tuple[Report, bool]:
    """The report of a run in its own folder, and whether it was there already; with `force` it is made again.

    `device` is auto, cpu or cuda. Raises UserError for a folder of something else, or in which another process is at work.
    """
    from mergekit_vl.reports import report

    def load(folder: Path) -> Report | None:
        found = report.load(folder)
        return found if found is not None and found.code == experiment.code() else None

    with tidied(folder), alone(folder):
        done = claim(folder, experiment.recipe.hash, load, force=force)
        if done is not None:
            return done, True
        from mergekit_vl.models.features import FeatureStore

        return run(experiment, folder, device=device_of(device), store=FeatureStore(), reporter=reporter), False


def run(
    experiment: Experiment,
    out: Path,
    *,
    device: str,
    store: FeatureStore,
    reporter: Reporter,
) -> Report:
    """Run every cell into `out` and return the report (also written there).

    All data are read, and all shots drawn, before anything is trained: bad input ends a run at its start.
    """
    from mergekit_vl.reports import report

    began = time.time()
    ready = prepare(experiment, device=device, reporter=reporter)
    tasks = ready.tasks(experiment.protocol, experiment.recipe.seeds)
    cells: list[CellResult] = []
    first: Model | None = None
    for number, (name, seed, task) in enumerate(tasks, 1):
        if len(tasks) > 1:
            reporter.progress(number - 1, len(tasks), ALL_CELLS)
        part = Within(reporter, f"[{number}/{len(tasks)}] {name} seed {seed}")
        store.reporter = part
        folder = out / "state" / cell_name(name, seed)
        cell = ready.cell(task, seed, folder, store, part, ready.everywhere(tasks, seed))
        main, facts = _run_cell(ready, cell, name, seed)
        first = first or main
        cells.append(facts)
    assert first is not None, "a run has a cell"
    reporter.progress(0, 0, "writing the report")
    return report.write(
        experiment.recipe,
        cells,
        first,
        out,
        base=experiment.base_label,
        code=experiment.code(),
        device=device,
        seconds=time.time() - began,
    )


def load_datasets(specs: tuple[Spec, ...], given: tuple[DatasetOptions, ...], reporter: Reporter) -> list[Dataset]:
    """The datasets, under their recipe's labels where it gives some."""
    out: list[Dataset] = []
    for spec, made in zip(specs, given):
        reporter.progress(0, 0, f"reading {options.values(made).get(named_by(made) or '', spec.name)}")
        dataset = made.load(reporter)
        if spec.label != spec.name:
            dataset = dataclasses.replace(dataset, name=spec.label)
        if dataset.name in [other.name for other in out]:
            raise UserError(
                f"two datasets are called {dataset.name!r}", where=spec.where, hint="give one of them a label"
            )
        out.append(dataset)
    return out


def _warn_of_unknown_words(backbone: Backbone, dataset: Dataset, reporter: Reporter) -> None:
    words = backbone.warn(dataset.classes)
    if words:
        shown = ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")
        reporter.warn(
            f"{backbone.spec} was never trained on these words of {dataset.name}: {shown}; expect poor zero-shot accuracy"
        )


def _loaded(tuner: Tuner | TunedSpec | Single, backbone: Backbone, registry: Registry) -> Tuner | Single:
    """A tuner as it is; a checkpoint as the model it holds, read before anything is computed."""
    from mergekit_vl.models.model import Single
    from mergekit_vl.storage.tuned import load_tuned

    if not isinstance(tuner, TunedSpec):
        return tuner
    path = user_path(str(tuner.checkpoint))
    return Single(backbone, load_tuned(path, backbone, registry, init=tuner.init))


def _run_cell(ready: Ready, cell: Cell, name: str, seed: int) -> tuple[Model, CellResult]:
    """The main strategy's model, and the cell."""
    from mergekit_vl.experiments import landscape

    experiment = ready.experiment
    cell.claim(experiment.tuners)
    cell.keep_shots(name, seed)
    rows, inputs = ready.endpoints(cell)
    inputs = dataclasses.replace(inputs, batch_norm=experiment.recipe.strategies[0].batch_norm)
    for label, control in experiment.controls:
        makers_of = (*cell.tuners, control)
        place = cell.place(label, makers_of)
        model = place.model or control.merge(dataclasses.replace(inputs, scratch=cell.scratch(makers_of)))
        rows.append(cell.finished(place, model, "control"))
    tuned = dict(zip((row.row for row in rows[1:]), zip(inputs.tuned, inputs.data)))
    merged: dict[str, Model] = {}
    makers: dict[str, tuple[object, ...]] = {}
    for (label, strategy), spec in zip(experiment.strategies, experiment.recipe.strategies):
        makers[label] = (*makers.get(spec.input or "", cell.tuners), strategy)
        given = dataclasses.replace(inputs, batch_norm=spec.batch_norm, scratch=cell.scratch(makers[label]))
        if spec.input is not None:
            one, data = tuned.get(spec.input) or (merged[spec.input], inputs.data[0])
            given = dataclasses.replace(given, tuned=(one,), data=(data,), labels=(spec.input,))
        place = cell.place(label, makers[label])
        model = place.model or strategy.merge(given)
        rows.append(cell.finished(place, model, "merged", towers=not merged or trains(strategy)))
        merged[label] = model
    shutil.rmtree(cell.folder / "scratch", ignore_errors=True)
    main = next(iter(merged.values()))
    points: list[LinePoint] = []
    if not experiment.joint:
        cell.inputs.reporter.progress(0, 0, "landscape")
        for between in landscape.landscapes(inputs.base, inputs.tuned[0], main, inputs.features):
            # through the merged model between classifiers alone, where a point costs next to nothing
            segments = landscape.SEGMENTS if between.space == "classifiers" else landscape.SEGMENTS[:1]
            points += landscape.lines(between, cell.task.tests, LINE_POINTS, segments)
    changed = changes(cell.task, rows, experiment.strategies[0][0])
    return main, dataclasses.replace(cell.facts(name, seed), rows=tuple(rows), landscape=tuple(points), changes=changed)
