"""`mergekit-vl path`: loss and accuracy between zero-shot, the merged and the tuned model of a recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergekit_vl.commands.terminal import AllowEnv, Column, TerminalProgress, say, say_table, warn
from mergekit_vl.errors import UserError
from mergekit_vl.experiments.run_folder import alone, claim, tidied
from mergekit_vl.recipe import Recipe, load_recipe
from mergekit_vl.registry.plugins import registry
from mergekit_vl.system.devices import device_of
from mergekit_vl.system.interrupts import noted

if TYPE_CHECKING:
    from mergekit_vl.datasets.base import Progress
    from mergekit_vl.experiments.experiment import Experiment


def path(
    recipe: Annotated[str, typer.Argument(help="a file, or the name of an installed recipe")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for run")] = None,
    points: Annotated[int, typer.Option(min=3, help="of a line, ends included")] = 21,
    plane: Annotated[
        int, typer.Option(min=0, help="a side of the plane; 0: none. Each point of towers reads all images")
    ] = 15,
    allow_env: AllowEnv = None,
    out: Annotated[Path | None, typer.Option(help="run folder; default that of `run`")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Loss, accuracy and barriers along zero-shot -> merged -> tuned, and on the plane through the three; of the recipe's first strategy.

    Uses the models of `run` with the same recipe where they are there, and makes them where not. Writes path.json and path.html.
    """
    from mergekit_vl.experiments import experiment as experiments
    from mergekit_vl.reports.html import document
    from mergekit_vl.reports.landscape_page import section
    from mergekit_vl.system.atomic_files import write_json, write_text

    build = lambda plan: experiments.build(plan, registry())  # noqa: E731
    plan = load_recipe(recipe, overrides or [], allow_env=allow_env or (), check=build)
    made = build(plan)
    if made.joint:
        raise UserError(
            "has several tuned models", where=f"protocol {plan.protocol.name}", hint="path is between three models"
        )
    folder = out or Path("runs") / f"{plan.name}-{plan.hash[:8]}"
    with noted("the same command continues"), tidied(folder), alone(folder):
        claim(folder, plan.hash, lambda folder: None, force=False)
        with TerminalProgress(True) as progress:
            told = _measured(made, plan, folder, device_of(device), points, plane, progress)
        base, anchor = made.base_label, made.tuned_labels[0]
        write_text(folder / "path.html", document(f"The path of {plan.name}", section(told, base, anchor)))
        write_json(folder / "path.json", told)
    _print(told, base, anchor)
    say(f"report: {folder / 'path.html'}")


def _measured(
    made: Experiment, plan: Recipe, folder: Path, device: str, points: int, plane: int, progress: Progress
) -> dict[str, Any]:
    """Over all cells: the means of the lines, and the plane of the first one."""
    from mergekit_vl.experiments import experiment as experiments
    from mergekit_vl.experiments import landscape
    from mergekit_vl.models.features import FeatureStore
    from mergekit_vl.system.atomic_files import cell_name

    ready = experiments.prepare(made, device=device, progress=progress, warn=warn)
    store, cells, first_plane = FeatureStore(report=progress), [], None
    label, strategy = made.strategies[0]
    tasks = ready.tasks(made.protocol, plan.seeds)
    for number, (name, seed, task) in enumerate(tasks):
        progress(number, len(tasks), "all cells")
        state = folder / "state" / cell_name(name, seed)
        cell = ready.cell(task, seed, state, store, progress, ready.everywhere(tasks, seed))
        cell.claim(ready.experiment.tuners, warn)
        cell.keep_shots(name, seed)
        _, inputs = ready.anchors(cell)
        makers = (*cell.tuners, strategy)
        place = cell.place(label, makers)
        merged = place.model or strategy.merge(dataclasses.replace(inputs, scratch=cell.scratch(makers)))
        cell.finished(place, merged, "merged")
        found = landscape.landscapes(inputs.base, inputs.tuned[0], merged, store)
        if not found:
            raise UserError(
                "nothing lies between these models", where=f"{plan.name}: {label}", hint="tune a prompt, head or tower"
            )
        progress(0, 0, f"path of {name}")
        line = [p for each in found for p in landscape.lines(each, task.tests, points, landscape.SEGMENTS)]
        cells.append({"points": line, "barriers": landscape.barriers(line)})
        if number == 0 and plane > 1:
            progress(0, 0, f"plane of {name}")
            first_plane = landscape.plane(found[0], task.tests, plane)
    mean = landscape.averaged(cells)
    return {
        "row": label,
        "cells": len(cells),
        **mean,
        "plane": first_plane,
        "plane_of": f"{tasks[0][0]}, seed {tasks[0][1]}",
    }


def _print(told: dict[str, Any], base: str, anchor: str) -> None:
    from mergekit_vl.reports.landscape_page import leg_name

    tests = list(told["barriers"][0]["tests"])
    rows = []
    for segment in told["barriers"]:
        heights = [f"{segment['tests'][t]['nll']:.3f}  {100 * segment['tests'][t]['acc1']:.1f}" for t in tests]
        rows.append([segment["space"], leg_name(segment["leg"], base, told["row"], anchor), *heights])
    columns = [Column("between", left=True, folds=True), Column("line", left=True, folds=True), *map(Column, tests)]
    say_table("barriers: loss in nats, and points of accuracy", columns, rows)
