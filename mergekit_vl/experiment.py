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

if TYPE_CHECKING:
    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.data import Dataset
    from mergekit_vl.features import FeatureStore
    from mergekit_vl.model import Model
    from mergekit_vl.protocols.base_to_novel import Task
    from mergekit_vl.strategy import MergeInputs

PATH_POINTS = 11


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

    @property
    def rows(self) -> tuple[str, ...]:
        return (
            "zero-shot",
            *self.tuned_labels,
            *(label for label, _ in self.controls),
            *(label for label, _ in self.strategies),
        )

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
            if not path.is_file():
                raise UserError(
                    "no such checkpoint", where=f"tuned.{i}: {path}", mend="give the file of a tuned prompt"
                )
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
    )
    files = [slug(row) for row in experiment.rows]
    twice = [row for row, file in zip(experiment.rows, files) if files.count(file) > 1]
    if twice:
        raise UserError(f"two rows are called {twice[0]!r}", where=recipe.name, mend="give one of them a label")
    for what in (experiment.protocol, *experiment.tuners, *(s for _, s in experiment.strategies)):
        for name in ("shots", "epochs", "batch", "lr", "n_context"):
            if hasattr(what, name) and not getattr(what, name) > 0:
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
    from mergekit_vl.adapters.zero_shot import ZeroShot
    from mergekit_vl.model import Single
    from mergekit_vl.strategy import MergeInputs

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.mha.set_fastpath_enabled(False)  # its bits depend on grad mode
    began = time.time()
    backbone = experiment.backbone.build(device)
    for note in backbone.notes:
        warn(note)
    base = Single(backbone, ZeroShot())
    experiment = dataclasses.replace(experiment, tuners=tuple(_loaded(tuner, backbone) for tuner in experiment.tuners))
    tasks = []
    for dataset in _datasets(experiment, progress):
        for texts in ([*dataset.classes], *Classes(dataset.classes, dataset.templates).texts()):
            backbone.tokenize(texts)  # a name that is nothing to the tokenizer, or too long for it, ends the run here
        _warn_of_unknown_words(backbone, dataset, warn)
        tasks += [(dataset, seed, experiment.protocol.task(dataset, seed)) for seed in experiment.recipe.seeds]
    cells = []
    for number, (dataset, seed, task) in enumerate(tasks, 1):
        if len(tasks) > 1:
            progress(number - 1, len(tasks), "all cells")
        where = f"[{number}/{len(tasks)}] {dataset.name} seed {seed}"
        told = lambda done, n, what, where=where: progress(done, n, f"{where}: {what}")  # noqa: E731
        store.report = told
        inputs = MergeInputs(base, (), (task.train,), store, seed, device, told)
        cell = _Cell(experiment, task, inputs, out / "state" / report.cell_name(dataset.name, seed))
        cells.append(cell.run(dataset, seed, warn))
    progress(0, 0, "writing the report")
    return report.write(experiment, cells, out, device=device, seconds=time.time() - began)


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


def _loaded(tuner: Any, backbone: Backbone) -> Any:
    """A tuner as it is; a checkpoint as the model it holds, read before anything is computed."""
    from mergekit_vl.adapters.prompt import Prompt
    from mergekit_vl.model import Single

    if not isinstance(tuner, TunedSpec):
        return tuner
    path = Path(str(tuner.checkpoint)).expanduser()
    prompt = Prompt.load(path, device=backbone.device, init=tuner.init)
    prompt.check(backbone)
    return Single(backbone, prompt)


@dataclass
class _Cell:
    experiment: Experiment
    task: Task
    inputs: MergeInputs
    folder: Path

    def run(self, dataset: Dataset, seed: int, warn: Callable[[str], None]) -> dict[str, Any]:
        self._claim(warn)
        write_json(self.folder / "shots.json", self._shots(dataset, seed))
        rows = [self._row("zero-shot", "zero-shot", lambda: self.inputs.base)[1]]
        tuned = []
        for label, tuner in zip(self.experiment.tuned_labels, self.experiment.tuners):
            model, row = self._row(label, "tuned", lambda tuner=tuner: self._tune(tuner))
            tuned.append(model)
            rows.append(row)
        inputs = dataclasses.replace(self.inputs, tuned=tuple(tuned), data=self.inputs.data * len(tuned))
        for label, control in self.experiment.controls:
            rows.append(self._row(label, "control", lambda control=control: control.merge(inputs))[1])
        merged = []
        for label, strategy in self.experiment.strategies:
            model, row = self._row(label, "merged", lambda strategy=strategy: strategy.merge(inputs))
            merged.append(model)
            rows.append(row)
        return {
            "dataset": dataset.name,
            "seed": seed,
            "halves": "redrawn per seed" if dataset.shuffled_halves else "sorted labels",
            "counts": {
                "train": len(self.task.train.train),
                "val": len(self.task.train.val or ()),
                **{name: len(split) for name, _, split in self.task.tests},
            },
            "rows": rows,
            "path": self._path(inputs, merged[0]),
        }

    def _claim(self, warn: Callable[[str], None]) -> None:
        """Forget stored rows that were made with other images, weights or checkpoints than these."""
        key = {
            "backbone": self.inputs.base.backbone.digest,
            "images": [split.key for split in (self.task.train.train, *(split for _, _, split in self.task.tests))],
            "checkpoints": [_digest(t) for t in self.experiment.tuners if not hasattr(t, "tune")],
        }
        file = self.folder / "key.json"
        if file.exists() and json.loads(file.read_text()) != key:
            warn(f"{self.folder}: images, weights or checkpoints have changed since; this cell starts again")
            shutil.rmtree(self.folder)
        write_json(file, key)

    def _shots(self, dataset: Dataset, seed: int) -> dict[str, Any]:
        """The few-shot selection: rows of each split, and the files they are where there are files."""
        out: dict[str, Any] = {"dataset": dataset.name, "seed": seed}
        for name, part in (("base", self.task.base), ("novel", self.task.novel)):
            out[name] = [dataset.classes[i] for i in part]
        for name, split in (("train", self.task.train.train), ("val", self.task.train.val)):
            files = getattr(split.source, "files", None)
            out[name] = [
                {"row": row, "class": self.task.train.classes.names[label]} | ({"file": files[row]} if files else {})
                for row, label in zip(split.rows.tolist(), split.labels.tolist())
            ]
        return out

    def _tune(self, tuner: Any) -> Model:
        return tuner.tune(self.inputs) if hasattr(tuner, "tune") else tuner

    def _row(self, label: str, kind: str, make: Callable[[], Model]) -> tuple[Model, dict[str, Any]]:
        """A model and its scores: from the run folder if they are there, else made now and written at once."""
        from mergekit_vl.adapters.prompt import Prompt
        from mergekit_vl.evaluate import evaluate, harmonic_mean
        from mergekit_vl.model import Single

        result_file, weights_file = (self.folder / f"{slug(label)}.{kind}" for kind in ("json", "safetensors"))
        backbone = self.inputs.base.backbone
        began = time.time()
        stored = json.loads(result_file.read_text()) if result_file.exists() else None
        if stored and weights_file.exists():
            return Single(backbone, Prompt.load(weights_file, device=self.inputs.device)), stored
        model = make()
        if stored:
            return model, stored
        made = time.time() - began
        if isinstance(model, Single) and isinstance(model.adapter, Prompt):
            model.adapter.save(weights_file, backbone=backbone.spec)
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
            "hm": harmonic_mean(*(tests[test]["acc1"] for test in ("base", "novel"))),
            "parameters": model.parameters,
            "forwards": model.forwards,
            "right": right,
            "cost": {"seconds": made, "ms_per_sample": 1000 * max(seconds)},
        }
        write_json(result_file, row)
        return model, row

    def _path(self, inputs: MergeInputs, merged: Model) -> list[dict[str, Any]]:
        """Accuracy along straight lines: zero-shot to tuned between contexts and between classifiers (WiSE-FT's sweep), and by
        way of the merged model between classifiers.
        """
        from mergekit_vl.evaluate import evaluate
        from mergekit_vl.model import Mixture
        from mergekit_vl.strategies.wise_ft import WiseFT

        first = dataclasses.replace(inputs, tuned=inputs.tuned[:1])
        ends = {"zero-shot": inputs.base, "tuned": first.tuned[0]}
        legs = [("zero-shot", "tuned")]
        if hasattr(merged, "text_features"):
            ends["merged"] = merged
            legs += [("zero-shot", "merged"), ("merged", "tuned")]
        points = []

        def add(leg: str, space: str, alpha: float, model: Model) -> None:
            accs = {
                t: evaluate(model, classes, split, inputs.features)[0].acc1 for t, classes, split in self.task.tests
            }
            points.append({"leg": leg, "space": space, "alpha": alpha, **accs})

        for i in range(PATH_POINTS):
            alpha = i / (PATH_POINTS - 1)
            for start, end in legs:
                mix = Mixture((ends[start], ends[end]), (1 - alpha, alpha))  # type: ignore[arg-type]
                add(f"{start} -> {end}", "classifiers", alpha, mix)
            with contextlib.suppress(UserError):  # a prompt that started at random has no zero-shot context
                add("zero-shot -> tuned", "contexts", alpha, WiseFT(alpha).merge(first))
        return points


def _digest(model: Model) -> str:
    tensors = model.adapter.tensors  # type: ignore[attr-defined]
    return hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in tensors.values())).hexdigest()[:16]
