"""A cell: one task, one seed, one folder. Its models are made, kept and scored here, a row at a time, each written when it is done."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_vl.choices import Choice
from mergekit_vl.files import slug, write_json
from mergekit_vl.model import Classes, Ensemble, Mixture, Single
from mergekit_vl.strategy import MergeInputs, trains

if TYPE_CHECKING:
    from mergekit_vl.model import Model
    from mergekit_vl.plugins import Registry
    from mergekit_vl.protocol import Task


@dataclass
class Cell:
    task: Task
    inputs: MergeInputs
    """Of the base alone; `anchors` gives those with the tuned models."""
    folder: Path
    registry: Registry
    """For the adapters that stored models are of."""

    def claim(self, tuners: tuple[Any, ...], warn: Callable[[str], None]) -> None:
        """Forget stored rows that were made with other images, weights or checkpoints than these."""
        tasks = {id(data): data for data in (*self.task.data, *self.inputs.everywhere)}.values()
        chosen_on = [data.val for data in tasks if data.val is not None]
        splits = [data.train for data in self.task.data] + chosen_on + [split for _, _, split in self.task.tests]
        key = {
            "backbone": self.inputs.base.backbone.digest,
            "images": [split.key for split in splits],
            "checkpoints": [_digest(t) for t in tuners if not hasattr(t, "tune")],
        }
        file = self.folder / "key.json"
        if file.exists() and json.loads(file.read_text()) != key:
            warn(f"{self.folder}: images, weights or checkpoints have changed since; this cell starts again")
            shutil.rmtree(self.folder)
        write_json(file, key)

    def keep_shots(self, dataset: str, seed: int) -> None:
        """Write the few-shot selection: rows of each split, and the files they are where there are files."""
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
                    for row, label in (zip(split.rows.tolist(), split.labels.tolist()) if split is not None else ())
                ]
        write_json(self.folder / "shots.json", out)

    def anchors(
        self, base: str, tuners: tuple[tuple[str, Any], ...], *, joint: bool
    ) -> tuple[list[dict[str, Any]], MergeInputs]:
        """The rows of the base and of each tuned model, and the inputs that merges get."""
        rows = [self.row(base, "zero-shot", lambda: self.inputs.base)[1]]
        tuned, data = [], []
        for label, tuner, i in self._to_tune(tuners, joint):
            inputs = dataclasses.replace(self.inputs, data=(self.task.data[i],))
            model, row = self.row(label, "tuned", lambda tuner=tuner, inputs=inputs: _tune(tuner, inputs))
            tuned.append(model)
            data.append(self.task.data[i])
            rows.append(row)
        labels = tuple(row["row"] for row in rows[1:])
        return rows, dataclasses.replace(self.inputs, tuned=tuple(tuned), data=tuple(data), labels=labels)

    def _to_tune(self, tuners: tuple[tuple[str, Any], ...], joint: bool) -> list[tuple[str, Any, int]]:
        """(label, tuner or checkpoint, number of its task): of several tasks each tuner makes one model, a checkpoint is that of its place."""
        if not joint or not all(hasattr(tuner, "tune") for _, tuner in tuners):
            return [(label, tuner, i if joint else 0) for i, (label, tuner) in enumerate(tuners)]
        tasks = range(len(self.task.data))
        return [(f"{label} on {self.task.tests[i][0]}", tuner, i) for label, tuner in tuners for i in tasks]

    def row(
        self,
        label: str,
        kind: str,
        make: Callable[[], Model],
        *,
        strategy: Any = None,
        main: bool = False,
        name: str | None = None,
    ) -> tuple[Model, dict[str, Any]]:
        """A model and its scores: from the folder's files of this name if they are there, else made now and written at once."""
        from mergekit_vl import saved

        name = name or slug(label)
        file = self.folder / f"{name}.json"
        if file.exists():
            found = saved.load(self.folder, name, self.inputs.base.backbone, self.registry.adapter)
            return found or make(), json.loads(file.read_text())
        model, seconds = self.timed(make)
        if saved.can_save(model) and _keeps(kind, model, strategy, main):
            saved.save(model, self.folder, name)
        row = {"row": label, "kind": kind, **self.scores(model)}
        row["cost"]["seconds"] = seconds
        row |= choice_of(model, kind)
        write_json(file, row)
        return model, row

    def timed(self, make: Callable[[], Model]) -> tuple[Model, float]:
        """A model, and the seconds it took without encoding images for the store: those features serve every row, whoever asks first."""
        encoding, began = self.inputs.features.seconds, time.perf_counter()
        model = make()
        return model, time.perf_counter() - began - (self.inputs.features.seconds - encoding)

    def scores(self, model: Model) -> dict[str, Any]:
        """Of a model on all tests of the task, as plain data."""
        from mergekit_vl.evaluate import evaluate

        found = {
            test: evaluate(model, classes, split, self.inputs.features) for test, classes, split in self.task.tests
        }
        tests = {test: each.scores.as_dict() for test, each in found.items()}
        return {
            "tests": tests,
            "score": self.task.metric.of({test: scores["acc1"] for test, scores in tests.items()}),
            "right": {test: "".join("01"[int(hit)] for hit in each.right) for test, each in found.items()},
            "digest": {test: each.digest for test, each in found.items()},
            "parameters": model.parameters,
            "forwards": model.forwards,
            "cost": {"ms_per_sample": 1000 * max(each.seconds for each in found.values())},
        }

    def facts(self, name: str, seed: int) -> dict[str, Any]:
        """What a report tells of the cell beside its rows."""
        backbone = self.inputs.base.backbone
        return {
            "dataset": name,
            "seed": seed,
            "backbone": {"spec": backbone.spec, "pretrained": backbone.pretrained, "digest": backbone.digest},
            "note": self.task.note,
            "metric": dataclasses.asdict(self.task.metric),
            "counts": {
                "train": sum(len(data.train) for data in self.task.data),
                "val": sum(len(data.val or ()) for data in self.task.data),
                **{name: len(split) for name, _, split in self.task.tests},
            },
        }


def choice_of(model: Model, kind: str) -> dict[str, Any]:
    """What was chosen while a row's model was made and on which images, and what was learnt: as its record tells it."""
    from mergekit_vl.adapters.linear_head import LinearHead
    from mergekit_vl.adapters.tower import Tower
    from mergekit_vl.per_sample import ByDistance

    choice = model.choice if isinstance(model, (Single, Mixture, Ensemble, ByDistance)) else None
    if choice is None and kind == "tuned" and isinstance(model, Single):
        adapter = model.adapter
        if isinstance(adapter, (LinearHead, Tower)) and adapter.chosen:  # tuners choose on validation images
            choice = Choice(adapter.chosen)
    if choice is None or not choice.values:
        return {"chosen": {}, "learnt": {}, "chosen_on": None}
    values = dict(choice.values)
    return {
        "chosen": {} if choice.learnt else values,
        "learnt": values if choice.learnt else {},
        "chosen_on": choice.split,
    }


def _keeps(kind: str, model: Model, strategy: Any, main: bool) -> bool:
    """Whole towers are kept where they were trained and for the main row; a closed form makes the others again."""
    from mergekit_vl.adapters.tower import Tower

    members = getattr(model, "members", (model,))
    towers = any(isinstance(getattr(member, "adapter", None), Tower) for member in members)
    return not towers or kind in ("tuned", "control") or main or trains(strategy)


def _tune(tuner: Any, inputs: MergeInputs) -> Model:
    """What a tuner makes; or a checkpoint's model, whose head is told the start that its file does not tell."""
    from mergekit_vl.adapters.tuned import with_start

    return tuner.tune(inputs) if hasattr(tuner, "tune") else with_start(tuner, inputs)


def _digest(model: Model) -> str:
    digest = hashlib.sha256()
    for tensor in model.adapter.tensors.values():  # type: ignore[attr-defined]
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]
