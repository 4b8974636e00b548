"""One cell of a bench: models are tuned once, then each strategy's options chosen on the selection tasks and its model made and scored.

A strategy that cannot be used on these models, and one that fails, is a record with its reason; the others go on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from mergekit_vl.benchmark import search
from mergekit_vl.benchmark.plan import BEST, Entry
from mergekit_vl.benchmark.records import Default, Record, RowCost, Searched, Tried
from mergekit_vl.errors import Failed, Unsuitable, UserError
from mergekit_vl.experiments import landscape
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.models.model import Single, image_encoders, size_in_bytes
from mergekit_vl.recipes.references import hide
from mergekit_vl.registry.calls import told
from mergekit_vl.reports.landscape_results import CellLandscape
from mergekit_vl.strategies.base import HasControls, trains
from mergekit_vl.system.atomic_files import slug, write_json
from mergekit_vl.system.memory import Peak

if TYPE_CHECKING:
    from mergekit_vl.benchmark.grid import Bench, Key
    from mergekit_vl.experiments.cell import Cell
    from mergekit_vl.models.model import Model
    from mergekit_vl.protocols.base import Task
    from mergekit_vl.recipes.recipe import Spec
    from mergekit_vl.reports.results import Row
    from mergekit_vl.strategies.base import Strategy

LINE_POINTS, PLANE_POINTS = 21, 13


@dataclass
class CellRun:
    bench: Bench
    key: Key
    cell: Cell
    chosen: dict[str, Strategy] = field(default_factory=dict)
    """The strategy with the options that were chosen, by label."""
    unselected: str | None = None
    """Why making the selection tasks failed."""

    def make(self, entries: list[Entry]) -> None:
        """Make and record these rows, in the order of the table."""
        try:
            self.endpoints  # noqa: B018  # tuned now, or read
        except Exception as error:  # a tuner may be a plugin
            if isinstance(error, UserError) and not isinstance(error, Failed):
                raise  # the recipe does not fit: no cell will go better
            for entry in entries:
                self._record(entry, _fault(entry, "failed", f"its tuned models failed: {told(error)}"))
            return
        for number, entry in enumerate(entries):
            self.bench.reporter.progress(number, len(entries), f"{self.key.name}: rows")
            self._record(entry, self._made(entry))

    @cached_property
    def endpoints(self) -> tuple[list[Row], MergeInputs]:
        return self.bench.ready.endpoints(self.cell)

    @cached_property
    def selection(self) -> list[tuple[Cell, MergeInputs]] | str:
        """The selection tasks; or why there are none. Raises Failed, each time, where making them failed."""
        if self.bench.plan.search.by == "none":
            return "the search is off"
        if self.unselected is None:
            try:
                return self.bench.select(self.key, self.cell, self.endpoints[1])
            except Unsuitable as error:
                return str(error)
            except (Exception, SystemExit) as error:
                self.unselected = told(error)
        raise Failed(f"nothing to choose on: {self.unselected}")

    def _record(self, entry: Entry, record: Record) -> None:
        record = dataclasses.replace(record, made_of=self.cell.made_of(self.bench.makers(entry)))
        write_json(self.bench.record(self.key, entry), hide(record.to_json(), self.bench.plan.recipe.environment))

    def _made(self, entry: Entry) -> Record:
        try:
            if entry.kind in ("zero-shot", "tuned"):
                return self._anchor(entry)
            if entry.label == BEST:
                return self._best(entry)
            if isinstance(entry.cls, UserError):
                raise entry.cls
            return self._strategy(entry)
        except Unsuitable as error:
            return _fault(entry, "inapplicable", str(error))
        except (Exception, SystemExit) as error:  # a plugin's code may raise anything; the others go on
            return _fault(entry, "failed", told(error))

    def _anchor(self, entry: Entry) -> Record:
        rows, inputs = self.endpoints
        models = dict(zip((row.row for row in rows), (inputs.base, *inputs.tuned)))
        row = next(row for row in rows if row.row == entry.label)
        return self._done(entry, models[entry.label], row, {what: value for what, (value, _) in row.chosen.items()})

    def _best(self, entry: Entry) -> Record:
        """The base or the tuned model that does best on the selection tasks."""
        rows, inputs = self.endpoints
        if isinstance(self.selection, str):
            raise Unsuitable(f"no model can be chosen: {self.selection}", where=BEST)
        found = []
        for i, row in enumerate(rows):
            scored = [cell.scored(row.row, row.kind, (given.base, *given.tuned)[i]) for cell, given in self.selection]
            found.append((search.quality(scored), row.row, (inputs.base, *inputs.tuned)[i], row))
        _, name, model, row = max(found, key=lambda each: each[0])
        tried = tuple(Tried({"model": other}, score, -nll) for (score, nll), other, _, _ in found)
        search_of = Searched(self._images(self.selection[0][0].task), self.bench.plan.split(), tried)
        return self._done(entry, model, row, {"model": name}, search=search_of)

    def _strategy(self, entry: Entry) -> Record:
        assert entry.spec is not None
        tries = self._configurations(entry.spec, entry.cls)
        self.bench.plan.experiment.check_by_task(entry.label, tries[0][1])
        if len(tries) > 1:
            self.selection  # noqa: B018  # tuning is no strategy's cost
        began = self.cell.clock()
        strategy, searched = self._choose(entry.spec, tries)
        search_seconds = self.cell.clock() - began
        options = next(given for given, made in tries if made == strategy)
        self.chosen[entry.label] = strategy
        with Peak(self.bench.ready.device) as peak:
            model, row = self._scored(self.cell, entry.spec, strategy, self.endpoints[1])
        default = None if strategy == tries[0][1] else self._default(entry.spec, *tries[0])
        done = self._done(entry, model, row, options, search=searched, peak=peak.bytes, search_seconds=search_seconds)
        return dataclasses.replace(done, trains=trains(strategy), default=default)

    def _default(self, spec: Spec, given: dict[str, object], strategy: Strategy) -> Default:
        """What the row would be without the choice; its options may not be usable where the chosen ones are."""
        try:
            row = self._scored(self.cell, spec, strategy, self.endpoints[1])[1]
        except UserError as error:
            return Default(given, reason=str(error))
        return Default(given, row.tests, row.score)

    def _configurations(self, spec: Spec, cls: type[Strategy]) -> list[tuple[dict[str, object], Strategy]]:
        return search.configurations(cls, spec, len(self.endpoints[1].tuned), self.bench.plan.search)

    def _choose(self, spec: Spec, tries: list[tuple[dict[str, object], Strategy]]) -> tuple[Strategy, Searched]:
        """The best strategy of `tries`, and how it was chosen on the selection tasks."""
        default = tries[0][1]
        if len(tries) == 1:
            return default, Searched("nothing to choose")
        if isinstance(self.selection, str):
            return default, Searched(f"defaults: {self.selection}")
        table, best = [], None
        for number, (given, strategy) in enumerate(tries):
            self.bench.reporter.progress(number, len(tries), f"{self.key.name}: options of {spec.label}")
            try:
                rows = [self._scored(cell, spec, strategy, inputs)[1] for cell, inputs in self.selection]
            except UserError as error:  # this configuration does not fit these models, or came to nothing
                table.append(Tried(given, reason=str(error)))
                continue
            quality = search.quality(rows)
            table.append(Tried(given, quality[0], -quality[1]))
            if best is None or quality > best[0]:
                best = quality, strategy
        if best is None:
            how = "defaults: none of the configurations could be used on the selection task"
            return default, Searched(how, None, tuple(table))
        return best[1], Searched(self._images(self.selection[0][0].task), self.bench.plan.split(), tuple(table))

    def _images(self, task: Task) -> str:
        """Of the first selection task."""
        images = ", ".join(f"{len(split)} {name}" for name, _, split in task.tests)
        return ("development tasks: " if self.bench.plan.search.by == "development" else "") + images

    def _scored(self, cell: Cell, spec: Spec, strategy: Strategy, inputs: MergeInputs) -> tuple[Model, Row]:
        """A strategy's model in a cell with its scores. What was trained is kept, since a kill would cost it."""
        name = f"{slug(spec.label)}-{_digest(strategy)}"
        given = self._given(cell, spec, inputs)
        makers = (*cell.tuners, *self._parents(spec), strategy)
        given = dataclasses.replace(given, scratch=cell.scratch(makers) / name, batch_norm=spec.batch_norm)
        if trains(strategy):
            place = cell.place(spec.label, makers, name=f"models/{name}")
            model = place.model or strategy.merge(given)
            row = cell.finished(place, model, "merged")
        else:
            began = cell.clock()
            model = strategy.merge(given)
            row = cell.scored(spec.label, "merged", model, cell.clock() - began)
        for test, scores in row.tests.items():
            if math.isnan(scores.nll):
                raise Failed(f"its logits on {test} are not finite", where=spec.label)
        return model, row

    def _parents(self, spec: Spec) -> tuple[object, ...]:
        """The classes of the strategies that a row is made of."""
        return next((entry.made_of for entry in self.bench.entries if entry.spec is spec), ())

    def _given(self, cell: Cell, spec: Spec, inputs: MergeInputs) -> MergeInputs:
        """The inputs of a strategy: all tuned models, or the one that is its `input`."""
        if spec.input is None:
            return inputs
        labels = [entry.label for entry in self.bench.entries if entry.kind == "tuned"]
        if spec.input in labels:
            i = labels.index(spec.input)
            return dataclasses.replace(inputs, tuned=inputs.tuned[i : i + 1], data=inputs.data[i : i + 1])
        parent = next(entry for entry in self.bench.entries if entry.label == spec.input)
        assert parent.spec is not None, "what a row is made of is a strategy"
        model, _ = self._scored(cell, parent.spec, self._choice(parent), inputs)
        return dataclasses.replace(inputs, tuned=(model,), data=inputs.data[:1])

    def _choice(self, entry: Entry) -> Strategy:
        """The strategy of another row with the options that were chosen for it."""
        if entry.label not in self.chosen:
            record = self.bench.recorded(self.key, entry) or _fault(entry, "failed", "not made")
            if not record.done:
                raise Failed(f"{entry.label}, which it is made of, was not: {record.reason}")
            assert entry.spec is not None
            tries = self._configurations(entry.spec, entry.cls)
            self.chosen[entry.label] = next(made for given, made in tries if given == record.options)
        return self.chosen[entry.label]

    def _done(
        self,
        entry: Entry,
        model: Model,
        row: Row,
        options: Mapping[str, object],
        *,
        search: Searched | None = None,
        peak: int | None = None,
        search_seconds: float = 0.0,
    ) -> Record:
        towers = max(len(image_encoders(model, classes)) for _, classes, _ in self.cell.task.tests)
        cost = RowCost(
            row.cost.seconds,
            towers * self.bench.image_ms + row.cost.ms_per_sample,
            search_seconds,
            peak,
            size_in_bytes(model),
            towers,
        )
        return Record(
            entry.label, entry.kind, _strategy(entry), "done", made=row, options=dict(options), cost=cost, search=search
        )

    def landscape(self) -> None:
        """Measure the landscape of the cell, and write it down, unless it is on record.

        It is loss and accuracy between zero-shot, the first row that asks for controls (else one that trains, else the first) and the
        tuned model; of towers in the first cell alone.
        """
        records = zip(self.bench.entries, self.bench.records(self.key))
        merged = [e for e, r in records if e.kind == "merged" and r and r.done]
        entry = min(merged, key=lambda e: (not isinstance(e.cls, HasControls), not trains(e.cls)), default=None)
        if entry is None or entry.spec is None:
            return
        spec = entry.spec
        makers = ("mergekit_vl.experiments.landscape", *self.bench.makers(entry))
        found = self.bench.landscape(self.key, entry)
        if found is None or not self.cell.fresh(found.made_of, makers):
            self.bench.reporter.progress(0, 0, f"{self.key.name}: landscape")
            made = dataclasses.replace(self._landscape(entry, spec), made_of=self.cell.made_of(makers))
            write_json(self.bench.landscape_record(self.key, entry), made.to_json())

    def _landscape(self, entry: Entry, spec: Spec) -> CellLandscape:
        """Lines and plane with the model of a row; without points where there is none."""
        nothing = CellLandscape(entry.label)
        inputs = self.endpoints[1]
        first = inputs.tuned[0]
        towers = isinstance(first, Single) and first.adapter.about.reads == "images"
        if len(inputs.tuned) != 1 or (towers and self.key != self.bench.keys()[0]):
            return nothing
        tests, size = self.cell.task.tests, 11 if towers else LINE_POINTS
        try:
            model, _ = self._scored(self.cell, spec, self._choice(entry), inputs)
            found = landscape.landscapes(inputs.base, inputs.tuned[0], model, inputs.features)
            points = [p for between in found for p in landscape.lines(between, tests, size, landscape.SEGMENTS)]
            plane = landscape.plane(found[0], tests, PLANE_POINTS) if found and not towers else None
        except UserError:
            return nothing
        return CellLandscape(entry.label, tuple(points), tuple(landscape.barriers(points)), plane)


def _fault(entry: Entry, status: Literal["inapplicable", "failed"], reason: str) -> Record:
    return Record(entry.label, entry.kind, _strategy(entry), status, reason)


def _strategy(entry: Entry) -> str | None:
    return entry.spec.name if entry.spec is not None else None


def _digest(strategy: object) -> str:
    return hashlib.sha256(repr(strategy).encode()).hexdigest()[:8]
