"""A cell: one task, one seed, one folder. Its models are made, kept and scored here, a row at a time, each written when it is done."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_vl.datasets.base import HasFiles
from mergekit_vl.models.choices import Choice
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.models.model import Classes, Ensemble, HasMembers, Mixture, Single
from mergekit_vl.registry import sources
from mergekit_vl.system.atomic_files import slug, write_json

if TYPE_CHECKING:
    from mergekit_vl.datasets.base import Split
    from mergekit_vl.models.inputs import TaskData
    from mergekit_vl.models.model import Model
    from mergekit_vl.protocols.base import Task
    from mergekit_vl.registry.plugins import Registry
    from mergekit_vl.reports.results import CellResult, Kind, Row
    from mergekit_vl.tuners.base import Tuner

WITHOUT = (
    *("strategies", "tuners", "recipes", "experiments.landscape", "experiments.changes", "storage.export"),
    *("reports.report", "reports.html", "reports.card", "reports.landscape_page", "reports.plots"),
    *("reports.table", "reports.comparison", "reports.changes", "reports.render", "reports.text_table"),
    *("benchmark.report", "benchmark.table", "benchmark.page", "benchmark.plots", "benchmark.wording"),
    "benchmark.comparison",
)
"""Modules that not all rows depend on: what is in the recipe, and what shows them."""


@dataclass(frozen=True)
class Place:
    """Where a row is kept, before it is made or made again."""

    label: str
    name: str
    """Of its files."""
    makers: tuple[object, ...]
    row: Row | None
    """What is on record."""
    model: Model | None
    """What is kept of it; a record may stand without it."""
    began: float
    """By the cell's clock."""


@dataclass
class Cell:
    task: Task
    inputs: MergeInputs
    """Of the base alone; `endpoints` gives those with the tuned models."""
    folder: Path
    registry: Registry
    """For the adapters that stored models are of."""
    code: tuple[object, ...] = ()
    """What all rows are made by: names of modules, and objects whose classes' modules are meant."""
    told: set[str] = field(default_factory=set)
    """Reasons that were given for making rows again."""
    given: dict[str, object] = field(default_factory=dict)
    tuners: tuple[object, ...] = ()

    def claim(self, tuners: tuple[object, ...]) -> None:
        """Keep what rows are made of beside code. Those that were made of something else are made again, and a warning says why."""
        tasks = {id(data): data for data in (*self.task.data, *self.task.kept, *self.inputs.everywhere)}.values()
        chosen_on = [data.val for data in tasks if data.val is not None]
        splits = [data.train for data in self.task.data] + chosen_on + [split for _, _, split in self.task.tests]
        self.given = {
            "weights": self.inputs.base.backbone.digest,
            "images": [split.key for split in splits],
            "checkpoints": [_digest(t) for t in tuners if isinstance(t, Single)],
        }
        self.tuners = tuners

    def scratch(self, makers: Iterable[object]) -> Path:
        """Where a training keeps what it needs to go on after a kill, on the same images, weights and code alone."""
        made_of = {name: repr(value) for name, value in self.made_of(makers).items()}
        return self.folder / "scratch" / sources.digest(made_of)

    def made_of(self, makers: Iterable[object]) -> dict[str, Any]:
        """What a row depends on: images, weights, checkpoints, and the code of all rows and of these strategies, tuners and checkpoints."""
        own = [maker.adapter if isinstance(maker, Single) else maker for maker in makers]
        code = sources.closure(sources.modules_of(self.code), WITHOUT) | sources.closure(sources.modules_of(own))
        return {**self.given, "code": code}

    def fresh(self, before: Mapping[str, Any] | None, makers: Iterable[object]) -> bool:
        """Whether a row that was made of `before` is what would be made now; what has changed since is told once."""
        now = self.made_of(makers)
        if before == now:
            return True
        if before is None:
            why = "rows of an earlier version"
        else:
            files = sources.changed(before["code"], now["code"])
            what = [name for name in self.given if before.get(name) != now[name]]
            more = f" and {len(files) - 5} more files" if len(files) > 5 and not what else ""
            why = f"{', '.join(what or files[:5])}{more} changed since: rows that depend on it"
        if why not in self.told:
            self.told.add(why)
            self.inputs.reporter.warn(f"{why} are made again")
        return False

    def keep_shots(self, dataset: str, seed: int) -> None:
        """Write the few-shot selection: rows of each split, and the files they are where there are files."""
        tested = {name: classes for _, classes, _ in self.task.tests for name in classes.names}
        first = self.task.tests[0][1]
        out: dict[str, object] = {"dataset": dataset, "seed": seed, **self.task.parts, "classes": list(tested)}
        out["templates"] = [t for t in first.templates if isinstance(t, str)] or list(Classes.templates)
        out["train"] = [shot for data in self.task.data for shot in _shots(data, data.train)]
        out["val"] = [shot for data in (*self.task.data, *self.task.kept) for shot in _shots(data, data.val)]
        write_json(self.folder / "shots.json", out)

    def endpoints(
        self, base: str, tuners: tuple[tuple[str, Any], ...], *, joint: bool
    ) -> tuple[list[Row], MergeInputs]:
        """The rows of the base and of each tuned model, and the inputs that merges get."""
        rows = [self.finished(self.place(base), self.inputs.base, "zero-shot", towers=False)]
        tuned, data = [], []
        for label, tuner, i in self._to_tune(tuners, joint):
            inputs = dataclasses.replace(self.inputs, data=(self.task.data[i],), scratch=self.scratch((tuner,)))
            place = self.place(label, (tuner,))
            model = place.model or _tune(tuner, inputs)
            rows.append(self.finished(place, model, "tuned"))
            self._warn_if_worse(label, model, self.task.data[i])
            tuned.append(model)
            data.append(self.task.data[i])
        labels = tuple(row.row for row in rows[1:])
        return rows, dataclasses.replace(self.inputs, tuned=tuple(tuned), data=tuple(data), labels=labels)

    def _warn_if_worse(self, label: str, model: Model, data: TaskData) -> None:
        """A tuned model that is less accurate than the base on validation images of its own task was not tuned well.

        Only where both read the same features: those are needed anyway, while another tower would encode the images once more.
        """
        from mergekit_vl.models.evaluate import evaluate

        keys = [{path.key for path in each.encoders} for each in (self.inputs.base, model)]
        if data.val is None or not len(data.val) or keys[0] != keys[1]:
            return
        before, after = (
            100 * evaluate(each, data.classes, data.val, self.inputs.features).scores.acc1
            for each in (self.inputs.base, model)
        )
        if after < before:
            self.inputs.reporter.warn(
                f"{label}: {after:.1f} % of {len(data.val)} validation images after tuning, {before:.1f} % before: "
                "try a lower lr, fewer epochs or a larger crop"
            )

    def _to_tune(self, tuners: tuple[tuple[str, Any], ...], joint: bool) -> list[tuple[str, Any, int]]:
        """(label, tuner or checkpoint, number of its task): of several tasks each tuner makes one model, a checkpoint is that of its place."""
        if not joint or any(isinstance(tuner, Single) for _, tuner in tuners):
            return [(label, tuner, i if joint else 0) for i, (label, tuner) in enumerate(tuners)]
        tasks = range(len(self.task.data))
        return [(f"{label} on {self.task.tests[i][0]}", tuner, i) for label, tuner in tuners for i in tasks]

    def place(self, label: str, makers: Iterable[object] = (), *, name: str | None = None) -> Place:
        """Of a row, in files of this name: with what is on record, if that is what `makers`, the strategies and tuners that it depends
        on, would make now."""
        from mergekit_vl.reports.results import Row
        from mergekit_vl.storage import model_files

        name, makers = name or slug(label), tuple(makers)
        kept = read_record(self.folder / f"{name}.json")
        if kept is not None and self.fresh(kept.get("made_of"), makers):
            found = model_files.load(self.folder, name, self.inputs.base.backbone, self.registry.adapter)
            return Place(label, name, makers, Row.from_json(kept), found, self.clock())
        model_files.forget(self.folder, name)
        return Place(label, name, makers, None, None, self.clock())

    def finished(self, place: Place, model: Model, kind: Kind, *, towers: bool = True) -> Row:
        """The row of a model that was made for a place: its scores, written at once unless they are on record.

        The model is kept where it can be; one of whole towers is with `towers` alone, for a closed form makes it again.
        """
        from mergekit_vl.reports.results import plain
        from mergekit_vl.storage import model_files

        if place.row is not None:
            return place.row
        seconds = self.clock() - place.began
        if model_files.can_save(model) and (towers or not _has_towers(model)):
            model_files.save(model, self.folder, place.name)
        row = self.scored(place.label, kind, model, seconds)
        record = {"made_of": self.made_of(place.makers), "answers": plain(row.answers)}
        write_json(self.folder / f"{place.name}.json", row.to_json() | record)
        return row

    def clock(self) -> float:
        """In seconds; it stands while images are encoded for the store: those features serve every row, whoever asks first."""
        return time.perf_counter() - self.inputs.features.seconds

    def scored(self, label: str, kind: Kind, model: Model, seconds: float = 0.0) -> Row:
        """Of a model that took so long to make, on all tests of the task."""
        from mergekit_vl.models.evaluate import evaluate
        from mergekit_vl.reports.results import Cost, Row

        found = {
            test: evaluate(model, classes, split, self.inputs.features) for test, classes, split in self.task.tests
        }
        return Row(
            label,
            kind,
            tests={test: each.scores for test, each in found.items()},
            score=self.task.metric.headline_of({test: each.scores.acc1 for test, each in found.items()}),
            right={test: "".join("01"[int(hit)] for hit in each.right) for test, each in found.items()},
            answers={test: tuple(each.answers.tolist()) for test, each in found.items()},
            digest={test: each.digest for test, each in found.items()},
            parameters=model.parameters,
            forwards=model.forwards,
            cost=Cost(seconds, 1000 * max(each.seconds for each in found.values())),
            choice=choice_of(model, kind),
        )

    def facts(self, name: str, seed: int) -> CellResult:
        """The cell without its rows."""
        from mergekit_vl.reports.results import BackboneFacts, CellResult

        backbone = self.inputs.base.backbone
        counts = {
            "train": sum(len(data.train) for data in self.task.data),
            "val": sum(len(data.val or ()) for data in (*self.task.data, *self.task.kept)),
            **{name: len(split) for name, _, split in self.task.tests},
        }
        told = BackboneFacts(backbone.spec, backbone.pretrained, backbone.digest)
        return CellResult(name, seed, told, self.task.note, self.task.metric, counts)


def _shots(data: TaskData, split: Split | None) -> list[dict[str, object]]:
    """The images of a split, by row, class, and file where they are files."""
    if split is None:
        return []
    files = split.source.files if isinstance(split.source, HasFiles) else ()
    return [
        {"row": row, "class": data.classes.names[label]} | ({"file": files[row]} if files else {})
        for row, label in zip(split.rows.tolist(), split.labels.tolist())
    ]


def choice_of(model: Model, kind: str) -> Choice | None:
    """What was chosen while a row's model was made and on which images, or what was learnt."""
    from mergekit_vl.models.by_distance import ByDistance

    choice = model.choice if isinstance(model, (Single, Mixture, Ensemble, ByDistance)) else None
    if choice is None and kind == "tuned" and isinstance(model, Single):
        choice = Choice(model.adapter.chosen)  # tuners choose on validation images
    return choice if choice is not None and choice.values else None


def read_record(file: Path) -> dict[str, Any] | None:
    """A row as it was written, or None where it was not, or is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _has_towers(model: Model) -> bool:
    """Whether it holds weights for whole image towers."""
    members = model.members if isinstance(model, HasMembers) else (model,)
    return any(isinstance(member, Single) and member.adapter.about.reads == "images" for member in members)


def _tune(tuner: Tuner | Single, inputs: MergeInputs) -> Single:
    """What a tuner makes; or a checkpoint's model, whose head is told the start that its file does not tell."""
    from mergekit_vl.storage.tuned import with_start

    return with_start(tuner, inputs) if isinstance(tuner, Single) else tuner.tune(inputs)


def _digest(model: Single) -> str:
    digest = hashlib.sha256()
    for tensor in model.adapter.tensors.values():
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]
