"""Loss and accuracy between zero-shot, the merged and the tuned model of an experiment, over all of its cells."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mergekit_vl.errors import UserError
from mergekit_vl.experiments import landscape
from mergekit_vl.experiments.experiment import Experiment, prepare
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.reporter import ALL_CELLS, Reporter
from mergekit_vl.reports.landscape_results import CellLandscape, MeanLandscape
from mergekit_vl.system.atomic_files import cell_name


def measured(
    experiment: Experiment,
    folder: Path,
    *,
    device: str,
    points: int,
    plane: int,
    reporter: Reporter,
) -> MeanLandscape:
    """The means of the lines over all cells, `points` points each, and the plane of the first cell, `plane` points a side (0: none).

    The models of a run in `folder` are used where they are there, and made where not.
    """
    ready = prepare(experiment, device=device, reporter=reporter)
    store, cells, first_plane = FeatureStore(reporter=reporter), [], None
    label, strategy = experiment.strategies[0]
    tasks = ready.tasks(experiment.protocol, experiment.recipe.seeds)
    for number, (name, seed, task) in enumerate(tasks):
        reporter.progress(number, len(tasks), ALL_CELLS)
        state = folder / "state" / cell_name(name, seed)
        cell = ready.cell(task, seed, state, store, reporter, ready.everywhere(tasks, seed))
        cell.claim(ready.experiment.tuners)
        cell.keep_shots(name, seed)
        _, inputs = ready.endpoints(cell)
        makers = (*cell.tuners, strategy)
        place = cell.place(label, makers)
        merged = place.model or strategy.merge(dataclasses.replace(inputs, scratch=cell.scratch(makers)))
        cell.finished(place, merged, "merged")
        found = landscape.landscapes(inputs.base, inputs.tuned[0], merged, store)
        if not found:
            where = f"{experiment.recipe.name}: {label}"
            raise UserError("nothing lies between these models", where=where, hint="tune a prompt, head or tower")
        reporter.progress(0, 0, f"landscape of {name}")
        line = [p for each in found for p in landscape.lines(each, task.tests, points, landscape.SEGMENTS)]
        cells.append(CellLandscape(label, tuple(line), tuple(landscape.barriers(line))))
        if number == 0 and plane > 1:
            reporter.progress(0, 0, f"plane of {name}")
            first_plane = landscape.plane(found[0], task.tests, plane)
    return landscape.averaged(label, cells, first_plane, f"{tasks[0][0]}, seed {tasks[0][1]}")
