"""From a recipe to a report: `build` checks every name and option, `run` tunes, merges and evaluates cell by cell.

A cell is one (dataset, seed). Each row of a cell is written as soon as it is done, so the same command continues a killed run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_vl import options
from mergekit_vl.data import Progress
from mergekit_vl.errors import UserError
from mergekit_vl.files import slug, write_json
from mergekit_vl.model import Classes
from mergekit_vl.plugins import Registry
from mergekit_vl.recipe import Recipe, TunedSpec
from mergekit_vl.strategy import MergeInputs

if TYPE_CHECKING:
    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.data import Dataset
    from mergekit_vl.features import FeatureStore
    from mergekit_vl.model import Model, Single
    from mergekit_vl.protocol import Task

PATH_POINTS = 11
SPACES = {"ctx": "contexts", "head": "heads", "tower": "towers"}
"""What is merged along the path, by the space of the tuned model."""


@dataclass(frozen=True)
class Experiment:
    """Live, checked objects; buildable without YAML."""

    recipe: Recipe
    backbone: Any
    datasets: tuple[Any, ...]
    protocol: Any
    tuners: tuple[Any, ...]
    """A tuner, or the spec of a checkpoint."""
    tuned_labels: tuple[str, ...]
    strategies: tuple[tuple[str, Any], ...]
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
        return getattr(self.backbone, "base", "zero-shot")

    @property
    def joint(self) -> bool:
        """Whether all datasets make one cell, a model being tuned on each and those merged."""
        return getattr(self.protocol, "joint", False)

    @property
    def controls(self) -> tuple[tuple[str, Any], ...]:
        """MergeTune's two controls: w2 trained on for the same steps, and its start trained on without its terms."""
        from mergekit_vl.strategies.mergetune import MergeTune

        main = next((s for _, s in self.strategies if isinstance(s, MergeTune)), None)
        if main is None or not self.recipe.controls:
            return ()
        plain = dataclasses.replace(main, lambda_=0.0, beta=0.0)
        return (("continued", dataclasses.replace(plain, tau=1.0)), ("CE only", plain))


def build(recipe: Recipe, registry: Registry) -> Experiment:
    """Resolve every name and check every option; reads no weights and imports no torch."""

    def make(kind: str, spec) -> Any:
        return options.build(registry.find(kind, spec.name, where=spec.where).resolve(), spec.options, where=spec.where)

    tuners, labels = [], []
    for i, item in enumerate(recipe.tuned):
        if item.tuner is not None:
            tuners.append(make("tuners", item.tuner))
            labels.append(item.tuner.label)
        else:
            path = Path(str(item.checkpoint)).expanduser()
            if not path.exists():
                raise UserError("no such checkpoint", where=f"tuned.{i}: {path}", mend="give the file of a tuned model")
            tuners.append(item)
            labels.append(item.label or path.stem)
    experiment = Experiment(
        recipe=recipe,
        backbone=make("backbones", recipe.backbone),
        datasets=tuple(make("datasets", spec) for spec in recipe.datasets),
        protocol=make("protocols", recipe.protocol),
        tuners=tuple(tuners),
        tuned_labels=tuple(labels),
        strategies=tuple((spec.label, make("strategies", spec)) for spec in recipe.strategies),
        registry=registry,
    )
    checkpoints = sum(isinstance(tuner, TunedSpec) for tuner in tuners)
    if experiment.joint and checkpoints and not checkpoints == len(tuners) == len(recipe.datasets):
        raise UserError(
            f"{checkpoints} checkpoints among {len(tuners)} tuned models for {len(recipe.datasets)} data sets",
            where=f"{recipe.name}: tuned",
            mend="give tuners, or one checkpoint per data set, in the order of the data sets",
        )
    files = [slug(row) for row in experiment.rows]
    twice = [row for row, file in zip(experiment.rows, files) if files.count(file) > 1]
    if twice:
        raise UserError(f"two rows are called {twice[0]!r}", where=recipe.name, mend="give one of them a label")
    if taken := [row for row, file in zip(experiment.rows, files) if file in ("key", "shots")]:
        raise UserError(f"no row can be called {taken[0]!r}", where=recipe.name, mend="give it another label")
    for what in (experiment.protocol, *experiment.tuners, *(s for _, s in experiment.strategies)):
        for name in ("shots", "epochs", "batch", "lr", "n_context", "crop"):
            if getattr(what, name, None) is not None and not getattr(what, name) > 0:
                raise UserError(
                    f"{name}={getattr(what, name)}",
                    where=f"{recipe.name}: {type(what).__name__}",
                    mend="it must be positive",
                )
    return experiment


def run(
    experiment: Experiment,
    out: Path,
    *,
    device: str,
    store: FeatureStore,
    progress: Progress,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Run every cell into `out` and return the report as plain data (also written there).

    All data are read, and all shots drawn, before anything is trained: bad input ends a run at its start.
    """
    progress(0, 0, "loading torch and the backbone")
    import torch

    from mergekit_vl import report

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.mha.set_fastpath_enabled(False)  # its bits depend on grad mode
    began = time.time()
    backbone = experiment.backbone.build(device)
    for note in backbone.notes:
        warn(note)
    datasets = _datasets(experiment, progress)
    for dataset in datasets if backbone.text is not None else ():
        for texts in ([*dataset.classes], *Classes(dataset.classes, dataset.templates).texts()):
            backbone.tokenize(texts)  # a name that is nothing to the tokenizer, or too long for it, ends the run here
        _warn_of_unknown_words(backbone, dataset, warn)
    experiment = dataclasses.replace(
        experiment, tuners=tuple(_loaded(tuner, backbone, experiment.registry) for tuner in experiment.tuners)
    )
    tasks = []
    for dataset in [datasets] if experiment.joint else datasets:
        name = " + ".join(d.name for d in dataset) if isinstance(dataset, list) else dataset.name
        tasks += [(name, seed, experiment.protocol.task(dataset, seed)) for seed in experiment.recipe.seeds]
    for _, _, task in tasks:
        known = {name for data in task.data for name in data.classes.names}
        if experiment.joint or not all(known.issuperset(classes.names) for _, classes, _ in task.tests):
            backbone.require_text()
    cells, first = [], None
    for number, (name, seed, task) in enumerate(tasks, 1):
        if len(tasks) > 1:
            progress(number - 1, len(tasks), "all cells")
        where = f"[{number}/{len(tasks)}] {name} seed {seed}"
        told = lambda done, n, what, where=where: progress(done, n, f"{where}: {what}")  # noqa: E731
        store.report = told
        folder = out / "state" / report.cell_name(name, seed)
        inputs = MergeInputs(
            _base(backbone, task, store), (), task.data[:1], store, seed, device, told, folder / "scratch"
        )
        main, cell = _Cell(experiment, task, inputs, folder).run(name, seed, warn)
        first = main if number == 1 else first
        cells.append(cell)
    progress(0, 0, "writing the report")
    return report.write(experiment, cells, first, out, device=device, seconds=time.time() - began)


def _base(backbone: Backbone, task: Task, store: FeatureStore) -> Single:
    """The model before fine-tuning: zero-shot, or the nearest class mean where there is no text tower."""
    import torch

    from mergekit_vl.adapters.linear_head import class_means
    from mergekit_vl.adapters.zero_shot import ZeroShot
    from mergekit_vl.model import ImagePath, Single

    if backbone.text is not None:
        return Single(backbone, ZeroShot())
    data = task.data[0]
    features = store.features(ImagePath(backbone), data.train)
    head = class_means(features, torch.from_numpy(data.train.labels), data.classes, normalise=False)
    return Single(backbone, head.to(backbone.device))


def _datasets(experiment: Experiment, progress: Progress) -> list[Dataset]:
    """The datasets, under their recipe's labels where it gives some."""
    out: list[Dataset] = []
    for spec, made in zip(experiment.recipe.datasets, experiment.datasets):
        progress(0, 0, f"reading {spec.options.get('path') or spec.options.get('task') or spec.name}")
        dataset = made.load(progress)
        if spec.label != spec.name:
            dataset = dataclasses.replace(dataset, name=spec.label)
        if dataset.name in [other.name for other in out]:
            raise UserError(
                f"two datasets are called {dataset.name!r}", where=spec.where, mend="give one of them a label"
            )
        out.append(dataset)
    return out


def _warn_of_unknown_words(backbone: Backbone, dataset: Dataset, warn: Callable[[str], None]) -> None:
    words = backbone.warn(dataset.classes)
    if words:
        shown = ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")
        warn(
            f"{backbone.spec} was never trained on these words of {dataset.name}: {shown}; expect poor zero-shot accuracy"
        )


def _loaded(tuner: Any, backbone: Backbone, registry: Registry) -> Any:
    """A tuner as it is; a checkpoint as the model it holds, read before anything is computed."""
    from mergekit_vl.adapters.tuned import load_tuned
    from mergekit_vl.model import Single

    if not isinstance(tuner, TunedSpec):
        return tuner
    path = Path(str(tuner.checkpoint)).expanduser()
    return Single(backbone, load_tuned(path, backbone, registry.adapter, init=tuner.init))


@dataclass
class _Cell:
    experiment: Experiment
    task: Task
    inputs: MergeInputs
    folder: Path

    def run(self, name: str, seed: int, warn: Callable[[str], None]) -> tuple[Model, dict[str, Any]]:
        """The main strategy's model, and the cell as plain data."""
        self._claim(warn)
        write_json(self.folder / "shots.json", self._shots(name, seed))
        rows = [self._row(self.experiment.base_label, "zero-shot", lambda: self.inputs.base)[1]]
        tuned, data = [], []
        for label, tuner, i in self._to_tune():
            of_task = self.task.data[i]
            inputs = dataclasses.replace(self.inputs, data=(of_task,))
            model, scores = self._row(label, "tuned", lambda tuner=tuner, inputs=inputs: _tune(tuner, inputs))
            tuned.append(model)
            data.append(of_task)
            rows.append(scores)
        inputs = dataclasses.replace(self.inputs, tuned=tuple(tuned), data=tuple(data))
        for label, control in self.experiment.controls:
            rows.append(self._row(label, "control", lambda control=control: control.merge(inputs))[1])
        merged: dict[str, Model] = {}
        for (label, strategy), spec in zip(self.experiment.strategies, self.experiment.recipe.strategies):
            given = inputs
            if spec.of is not None:
                given = dataclasses.replace(inputs, tuned=(merged[spec.of],), data=tuple(data[:1]))
            merged[label], row = self._row(label, "merged", lambda s=strategy, given=given: s.merge(given))
            rows.append(row)
        shutil.rmtree(self.folder / "scratch", ignore_errors=True)
        main = next(iter(merged.values()))
        return main, {
            "dataset": name,
            "seed": seed,
            "note": self.task.note,
            "metric": dataclasses.asdict(self.task.metric),
            "counts": {
                "train": sum(len(data.train) for data in self.task.data),
                "val": sum(len(data.val or ()) for data in self.task.data),
                **{name: len(split) for name, _, split in self.task.tests},
            },
            "rows": rows,
            "path": self._path(inputs, main) if len(self.task.data) == 1 else [],
        }

    def _to_tune(self) -> list[tuple[str, Any, int]]:
        """(label, tuner or checkpoint, number of its task): of several tasks each tuner makes one model, a checkpoint is that of its place."""
        named = list(zip(self.experiment.tuned_labels, self.experiment.tuners))
        if not self.experiment.joint or not all(hasattr(tuner, "tune") for _, tuner in named):
            return [(label, tuner, i if self.experiment.joint else 0) for i, (label, tuner) in enumerate(named)]
        return [
            (f"{label} on {self.task.tests[i][0]}", tuner, i)
            for label, tuner in named
            for i in range(len(self.task.data))
        ]

    def _claim(self, warn: Callable[[str], None]) -> None:
        """Forget stored rows that were made with other images, weights or checkpoints than these."""
        splits = [data.train for data in self.task.data] + [split for _, _, split in self.task.tests]
        key = {
            "backbone": self.inputs.base.backbone.digest,
            "images": [split.key for split in splits],
            "checkpoints": [_digest(t) for t in self.experiment.tuners if not hasattr(t, "tune")],
        }
        file = self.folder / "key.json"
        if file.exists() and json.loads(file.read_text()) != key:
            warn(f"{self.folder}: images, weights or checkpoints have changed since; this cell starts again")
            shutil.rmtree(self.folder)
        write_json(file, key)

    def _shots(self, dataset: str, seed: int) -> dict[str, Any]:
        """The few-shot selection: rows of each split, and the files they are where there are files."""
        tested = {name: classes for _, classes, _ in self.task.tests for name in classes.names}
        first = self.task.tests[0][1]
        out: dict[str, Any] = {"dataset": dataset, "seed": seed, **self.task.parts, "classes": list(tested)}
        out["templates"] = [t for t in first.templates if isinstance(t, str)] or list(Classes.templates)
        for name in ("train", "val"):
            out[name] = []
            for data in self.task.data:
                split = getattr(data, name)
                files = getattr(split.source, "files", None) if split is not None else None
                out[name] += [
                    {"row": row, "class": data.classes.names[label]} | ({"file": files[row]} if files else {})
                    for row, label in zip(split.rows.tolist(), split.labels.tolist())
                ]
        return out

    def _row(self, label: str, kind: str, make: Callable[[], Model]) -> tuple[Model, dict[str, Any]]:
        """A model and its scores: from the run folder if they are there, else made now and written at once."""
        from mergekit_vl import saved
        from mergekit_vl.evaluate import evaluate

        result_file = self.folder / f"{slug(label)}.json"
        began = time.time()
        stored = json.loads(result_file.read_text()) if result_file.exists() else None
        if stored:
            found = saved.load(self.folder, slug(label), self.inputs.base.backbone, self.experiment.registry.adapter)
            return found or make(), stored
        model = make()
        made = time.time() - began
        if saved.can_save(model) and self._keeps(label, kind, model):
            saved.save(model, self.folder, slug(label))
        tests, seconds, right = {}, [], {}
        for test, classes, split in self.task.tests:
            scores, per_sample, hits = evaluate(model, classes, split, self.inputs.features)
            tests[test] = scores.as_dict()
            right[test] = "".join("01"[int(hit)] for hit in hits)
            seconds.append(per_sample)
        row = {
            "row": label,
            "kind": kind,
            "tests": tests,
            "score": self.task.metric.of({test: scores["acc1"] for test, scores in tests.items()}),
            "parameters": model.parameters,
            "forwards": model.forwards,
            "chosen": dict(getattr(getattr(model, "adapter", None), "chosen", {})) if kind == "tuned" else {},
            "right": right,
            "cost": {"seconds": made, "ms_per_sample": 1000 * max(seconds)},
        }
        write_json(result_file, row)
        return model, row

    def _keeps(self, label: str, kind: str, model: Model) -> bool:
        """Whole towers are kept where they were trained and for the main row; a closed form makes the others again."""
        from mergekit_vl.adapters.tower import Tower

        members = getattr(model, "members", (model,))
        towers = any(isinstance(getattr(member, "adapter", None), Tower) for member in members)
        trained = kind in ("tuned", "control") or label == self.experiment.strategies[0][0]
        return not towers or trained or hasattr(dict(self.experiment.strategies)[label], "epochs")

    def _path(self, inputs: MergeInputs, merged: Model) -> list[dict[str, Any]]:
        """Accuracy along straight lines: from the start to the tuned model between their tensors (WiSE-FT's sweep), and, where
        classifiers are made of texts, between those too and by way of the merged model.
        """
        from mergekit_vl.evaluate import evaluate
        from mergekit_vl.model import Mixture, Single
        from mergekit_vl.strategies.wise_ft import WiseFT

        first = dataclasses.replace(inputs, tuned=inputs.tuned[:1])
        tuned = first.tuned[0]
        assert isinstance(tuned, Single)
        texts = inputs.base.makes_texts and tuned.makes_texts
        ends = {"zero-shot": inputs.base, "tuned": tuned}
        legs = [("zero-shot", "tuned")] if texts else []
        if texts and getattr(merged, "makes_texts", False):
            ends["merged"] = merged  # type: ignore[assignment]
            legs += [("zero-shot", "merged"), ("merged", "tuned")]
        points = []

        def add(leg: str, space: str, alpha: float, model: Model) -> None:
            once = (
                tuned.adapter.space == "tower" and 0 < alpha < 1
            )  # a tower of its own; those of the ends are stored already
            store = inputs.features.temporary() if once else inputs.features
            accuracies = {t: evaluate(model, classes, split, store)[0].acc1 for t, classes, split in self.task.tests}
            points.append({"leg": leg, "space": space, "alpha": alpha, "tests": accuracies})

        for i in range(PATH_POINTS):
            alpha = i / (PATH_POINTS - 1)
            inputs.progress(i, PATH_POINTS, "path")
            for start, end in legs:
                mix = Mixture((ends[start], ends[end]), (1 - alpha, alpha))
                add(f"{start} -> {end}", "classifiers", alpha, mix)
            with contextlib.suppress(UserError):  # a prompt that started at random has no zero-shot context
                add("zero-shot -> tuned", SPACES.get(tuned.adapter.space, "own"), alpha, WiseFT(alpha).merge(first))
        return points


def _tune(tuner: Any, inputs: MergeInputs) -> Model:
    """What a tuner makes; or a checkpoint's model, whose head is told the start that its file does not tell."""
    from mergekit_vl.adapters.tuned import with_start

    return tuner.tune(inputs) if hasattr(tuner, "tune") else with_start(tuner, inputs)


def _digest(model: Model) -> str:
    digest = hashlib.sha256()
    for tensor in model.adapter.tensors.values():  # type: ignore[attr-defined]
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]
