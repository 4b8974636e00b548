"""The grid of a bench: its cells (dataset, seed, shots), where they keep their records, and the tasks that options are chosen on."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mergekit_vl.benchmark import search
from mergekit_vl.benchmark.plan import Entry, Plan, lineup
from mergekit_vl.benchmark.records import Record
from mergekit_vl.experiments.cell import read_record
from mergekit_vl.experiments.experiment import Ready, load_datasets, novel_classes
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.protocols.base import shots_of
from mergekit_vl.reporter import Reporter
from mergekit_vl.reports.landscape_results import CellLandscape
from mergekit_vl.system.atomic_files import slug, write_json

if TYPE_CHECKING:
    from mergekit_vl.experiments.cell import Cell
    from mergekit_vl.models.features import FeatureStore
    from mergekit_vl.protocols.base import EvaluationProtocol, Task

T = TypeVar("T")


@dataclass(frozen=True)
class Key:
    """Of a cell."""

    dataset: str
    seed: int
    shots: int | None

    @property
    def name(self) -> str:
        shots = "" if self.shots is None else f"-{self.shots}shots"
        return f"{slug(self.dataset)}-seed{self.seed}{shots}"


@dataclass
class Bench:
    """A plan whose backbone and data are loaded, at work in a folder."""

    plan: Plan
    ready: Ready
    out: Path
    store: FeatureStore
    reporter: Reporter

    def keys(self) -> list[Key]:
        return list(self.tasks)

    @cached_property
    def tasks(self) -> dict[Key, Task]:
        return {
            Key(name, seed, shots): task
            for shots in self.plan.shots
            for name, seed, task in self.ready.tasks(self._protocol(shots), self.plan.recipe.seeds)
        }

    @cached_property
    def entries(self) -> list[Entry]:
        return lineup(self.plan, [dataset.name for dataset in self.ready.datasets])

    def _protocol(self, shots: int | None) -> EvaluationProtocol:
        protocol = self.plan.experiment.protocol
        return protocol if shots == shots_of(protocol) else dataclasses.replace(protocol, shots=shots)

    def folder(self, key: Key) -> Path:
        return self.out / "cells" / key.name

    def cell(self, task: Task, seed: int, folder: Path) -> Cell:
        return self.ready.cell(task, seed, folder, self.store, self.reporter)

    def select(self, key: Key, cell: Cell, inputs: MergeInputs) -> list[tuple[Cell, MergeInputs]]:
        """The selection tasks of a cell, with their tuned models; raises UserError where nothing can be chosen."""
        how = self.plan.search
        if how.by == "validation" or (how.by == "auto" and not novel_classes(cell.task)):
            made = dataclasses.replace(cell, task=search.by_validation(cell.task), folder=cell.folder / "select")
            return [(made, inputs)]
        if how.by == "development":
            tasks = {
                self.out / "development" / dataclasses.replace(key, dataset=dataset.name).name: self._protocol(
                    key.shots
                ).task(dataset, key.seed)
                for dataset in self._development
            }
        else:
            tasks = {cell.folder / "select": search.by_held_out(cell.task, key.seed)}
        found = []
        for folder, task in tasks.items():
            made = self.cell(task, key.seed, folder)
            made.claim(self.ready.experiment.tuners)
            found.append((made, self.ready.endpoints(made)[1]))
        return found

    @cached_property
    def _development(self) -> list[Any]:
        specs, made = zip(*self.plan.development)
        return load_datasets(specs, made, self.reporter)

    @cached_property
    def image_ms(self) -> float:
        """Milliseconds that the backbone takes for an image, in batches of 16: measured once and kept."""
        file = self.out / "speed.json"
        if not file.exists():
            write_json(file, {"image_ms": self._measured(), "device": self.ready.device})
        return float(json.loads(file.read_text())["image_ms"])

    def _measured(self) -> float:
        import torch

        from mergekit_vl.models.model import ImageEncoder
        from mergekit_vl.models.views import eval_view

        encoder, source = ImageEncoder(self.ready.backbone), self.ready.datasets[0].test.source
        images = torch.stack([eval_view(source.load(i % len(source)), encoder) for i in range(16)])
        seconds = []
        for _ in range(4):  # the first one warms up
            began = time.perf_counter()
            encoder.encode(images, 16).cpu()
            seconds.append(time.perf_counter() - began)
        return 1000 * sorted(seconds[1:])[1] / len(images)

    def records(self, key: Key) -> list[Record | None]:
        """What is on record of the cell's rows, in the order of `entries`."""
        return [self.recorded(key, entry) for entry in self.entries]

    def recorded(self, key: Key, entry: Entry) -> Record | None:
        """A row as it was written; None where it was not, or is damaged."""
        return _read(Record.from_json, self.record(key, entry))

    def landscape(self, key: Key, entry: Entry) -> CellLandscape | None:
        """The landscape with the model of a row, as it was written."""
        return _read(CellLandscape.from_json, self.landscape_record(key, entry))

    def record(self, key: Key, entry: Entry) -> Path:
        """The file of a row."""
        return self.folder(key) / "records" / entry.file

    def landscape_record(self, key: Key, entry: Entry) -> Path:
        """The file of the landscape with the model of a row."""
        return self.folder(key) / "records" / f"landscape-{entry.file}"

    def makers(self, entry: Entry) -> tuple[object, ...]:
        """The tuners and strategies that a row depends on."""
        return (*self.ready.experiment.tuners, *entry.makers)

    def missing(self, key: Key, cell: Cell) -> list[Entry]:
        """The rows of a cell that are not on record, failed, or would come out otherwise now."""
        found = zip(self.entries, self.records(key))
        return [e for e, r in found if not r or r.status == "failed" or not cell.fresh(r.made_of, self.makers(e))]


def _read(reader: Callable[[Mapping[str, Any]], T], file: Path) -> T | None:
    found = read_record(file)
    try:
        return None if found is None else reader(found)
    except (ValueError, LookupError, TypeError):
        return None
