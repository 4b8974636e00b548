"""Reports: tables from the cells of an experiment, and the files of a finished run."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mergekit_vl import __version__
from mergekit_vl.models import choices
from mergekit_vl.models.evaluate import wilson
from mergekit_vl.protocols.base import Metric
from mergekit_vl.reports.card import card
from mergekit_vl.reports.html import html
from mergekit_vl.reports.intervals import LEAST, NO_INTERVAL, clustered, over_images
from mergekit_vl.reports.plots import plot
from mergekit_vl.reports.results import (
    CellResult,
    Column,
    Difference,
    Forgetting,
    MeanPoint,
    OnDataset,
    Paired,
    Report,
    Row,
    SummaryRow,
    plain,
)
from mergekit_vl.system.atomic_files import cell_name, slug, write_bytes, write_json, write_text

if TYPE_CHECKING:
    from mergekit_vl.models.model import Model
    from mergekit_vl.recipes.recipe import Recipe

    Measured = Mapping[str, tuple[float, int]]
    """Accuracy and number of images by test."""

NAME = "report.json"
FORGETTING = 0.04
"""A tuned model forgets where its novel accuracy lies this much below zero-shot's."""


def write(
    recipe: Recipe,
    cells: Sequence[CellResult],
    first: Model,
    out: Path,
    *,
    base: str,
    code: Mapping[str, str],
    device: str,
    seconds: float,
) -> Report:
    """Write every file of a finished run; `first` is the main model of the first cell, `base` the label of the zero-shot row. report.json comes last and marks it as done."""
    from mergekit_vl.storage.export import export, is_whole

    main = recipe.strategies[0].label
    tuned_row = next(row.row for row in cells[0].rows if row.kind == "tuned")
    report = Report(
        recipe=recipe.name,
        hash=recipe.hash,
        code=code,
        protocol=recipe.protocol.name,
        metric=cells[0].metric,
        note=cells[0].note,
        selection=_selection(cells),
        main=main,
        base=base,
        tuned_row=tuned_row,
        cells=tuple(cells),
        summary=summary(cells),
        differences=differences(cells, main),
        forgetting=forgetting(cells, main, tuned_row),
        landscape=_mean_landscape(cells),
        environment=environment(device),
        seconds=seconds,
    )
    write_text(out / "recipe.yaml", to_yaml(recipe.plain))
    rows = [({"dataset": cell.dataset, "seed": cell.seed, "row": row.row}, row) for cell in cells for row in cell.rows]
    write_json(out / "scores.json", [where | {"score": r.score, "tests": plain(r.tests)} for where, r in rows])
    write_json(out / "cost.json", [where | plain(row.cost) for where, row in rows])
    for cell in cells:
        for row in cell.rows:
            name = f"{cell_name(cell.dataset, cell.seed)}-{slug(row.row)}.json"
            write_json(out / "results" / name, _clip_benchmark(recipe, cell, row))
    stored = out / "state" / cell_name(cells[0].dataset, cells[0].seed) / f"{slug(main)}.safetensors"
    if is_whole(first):
        export(first, out / "merged")
    elif stored.exists():
        write_bytes(out / "merged.safetensors", stored.read_bytes())
    write_text(out / "README.md", card(report, recipe.plain["backbone"], gain(report), first))
    svg, png = plot(report)
    write_bytes(out / "report.png", png)
    write_text(out / "report.html", html(report, svg, gain(report)))
    write_json(out / NAME, report.to_json())
    return report


def environment(device: str) -> dict[str, object]:
    import torch

    return {
        "mergekit_vl": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
    }


def _selection(cells: Sequence[CellResult]) -> str:
    """What was chosen, and on what."""
    by_split: dict[str, list[str]] = {}
    for i, row in enumerate(cells[0].rows):
        for what, values in choices.counted([cell.rows[i].chosen for cell in cells]).items():
            by_split.setdefault(values[0].split, []).append(f"{what} of {row.row}")
    if not by_split:
        return "nothing was chosen on test; hyperparameters are the recipe's"
    told = [f"chosen on {choices.SPLITS[split]}: {', '.join(names)}" for split, names in by_split.items()]
    return f"nothing was chosen on test; {'; '.join(told)}; other hyperparameters are the recipe's"


def selection_split(rows: Sequence[Row], row: Row, of: Mapping[str, str]) -> str | None:
    """The split on which something of this row was chosen or learnt, be it by the models that it is made of; the training split is none.

    `of` tells which rows are made of another one alone; the other merged rows and the controls are made of all tuned ones.
    """
    if row.choice is not None and row.choice.split != "train":
        return row.choice.split
    if row.kind in ("zero-shot", "tuned"):
        return None
    parent = of.get(row.row)
    parents = [r for r in rows if (r.row == parent if parent else r.kind == "tuned")]
    return next((split for p in parents if (split := selection_split(rows, p, of))), None)


def summary(cells: Sequence[CellResult]) -> tuple[SummaryRow, ...]:
    """One entry a row of the table, averaged over cells, in percent; the headline is that of the averages, as the field prints it.

    The interval of an accuracy is a bootstrap over tasks where there are several, else that of one seed's images.
    """
    out = []
    metric = cells[0].metric
    for i, first in enumerate(cells[0].rows):
        rows = [cell.rows[i] for cell in cells]
        columns = {name: _column(cells, rows, name) for name in metric.columns}
        out.append(
            SummaryRow(
                row=first.row,
                kind=first.kind,
                columns=columns,
                score=metric.score([column.acc1 for column in columns.values()]),
                mean_of_scores=100 * float(np.mean([row.score for row in rows])),
                parameters=first.parameters,
                forwards=first.forwards,
                datasets=_by_dataset(cells, rows),
                chosen=choices.counted([row.chosen for row in rows]),
                seconds=float(np.mean([row.cost.seconds for row in rows])),
                ms_per_sample=float(np.median([row.cost.ms_per_sample for row in rows])),
                normalised=_normalised(cells, rows) if metric.normalised else None,
            )
        )
    return tuple(out)


def _column(cells: Sequence[CellResult], rows: Sequence[Row], name: str) -> Column:
    """Of a row in all cells, with the means of its other scores."""

    def mean(key: str) -> float:
        return float(np.mean([cell.metric.column(name, row.accuracies(key)) for cell, row in zip(cells, rows)]))

    images = sum(row.tests[test].n for cell, row in zip(cells, rows) for test in cell.metric.columns[name])
    return replace(
        _averaged(cells, name, [_measured(row) for row in rows]),
        n=images,
        acc5=mean("acc5"),
        mean_per_class_recall=mean("mean_per_class_recall"),
        nll=mean("nll"),
        ece=mean("ece"),
    )


def _normalised(cells: Sequence[CellResult], rows: Sequence[Row]) -> float:
    """The mean of the accuracies divided by those of the models tuned on the columns' own tasks, in percent."""
    own = []
    for cell, row in zip(cells, rows):
        tuned = [each for each in cell.rows if each.kind == "tuned"]
        for best, name in zip(tuned, cell.metric.columns):
            accuracy = cell.metric.column(name, best.accuracies())
            if accuracy:  # nothing can be divided by a model that is never right
                own.append(cell.metric.column(name, row.accuracies()) / accuracy)
    return 100 * float(np.mean(own)) if own else 0.0


def _by_dataset(cells: Sequence[CellResult], rows: Sequence[Row]) -> tuple[OnDataset, ...]:
    """A row's columns and headline on each data set, in percent, with the intervals of one seed's images."""
    out = []
    for name in dict.fromkeys(cell.dataset for cell in cells):
        own = [(cell, row) for cell, row in zip(cells, rows) if cell.dataset == name]
        of, tests = [cell for cell, _ in own], [_measured(row) for _, row in own]
        metric = of[0].metric
        columns = {c: replace(_averaged(of, c, tests), n=_images(metric, c, own[0][1])) for c in metric.columns}
        out.append(OnDataset(name, columns, metric.score([column.acc1 for column in columns.values()])))
    return tuple(out)


def _images(metric: Metric, column: str, row: Row) -> int:
    return sum(row.tests[test].n for test in metric.columns[column])


def _measured(row: Row) -> Measured:
    return {test: (scores.acc1, scores.n) for test, scores in row.tests.items()}


def _averaged(cells: Sequence[CellResult], name: str, tests: Sequence[Measured]) -> Column:
    """acc1 of a column with its interval (None across a few tasks), in percent, from what was measured in each cell."""
    rates = [{test: acc1 for test, (acc1, _) in of_cell.items()} for of_cell in tests]
    values = [cell.metric.column(name, accuracies) for cell, accuracies in zip(cells, rates)]
    mean = float(np.mean(values))
    if len({cell.dataset for cell in cells}) > 1:
        d = clustered(values, [cell.dataset for cell in cells])
        interval = _percent(d.low, d.high)
    else:
        interval = _percent(*_of_one_seed(cells[0].metric.columns[name], tests, mean))
    return Column(100 * mean, interval)


def _percent(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None else (100 * low, 100 * high)


def _of_one_seed(names: Sequence[str], tests: Sequence[Measured], mean: float) -> tuple[float, float]:
    """The interval of a column with the images of one seed: Wilson's, or the normal one of a mean of several tests."""
    ns = [min(of_cell[name][1] for of_cell in tests) for name in names]
    if len(names) == 1:
        return wilson(mean * ns[0], ns[0])
    rates = [float(np.mean([of_cell[name][0] for of_cell in tests])) for name in names]
    half = 1.959964 * math.sqrt(sum(p * (1 - p) / n for p, n in zip(rates, ns))) / len(names)
    return max(0.0, mean - half), min(1.0, mean + half)


def differences(cells: Sequence[CellResult], main: str) -> tuple[Difference, ...]:
    """The main row minus each other one."""
    names = [row.row for row in cells[0].rows]
    return tuple(Difference(name, **plain(paired(cells, main, name))) for name in names if name != main)


def paired(cells: Sequence[CellResult], ours: str, theirs: str) -> Paired:
    """Headline of one row minus another's, in points, with a 95% interval: over tasks, where there are enough, or over the images of a
    single task.
    """
    names = [row.row for row in cells[0].rows]
    i, j = names.index(ours), names.index(theirs)
    tasks = [cell.dataset for cell in cells]
    if len(set(tasks)) > 1:
        d = clustered([cell.rows[i].score - cell.rows[j].score for cell in cells], tasks)
        over = "tasks" if len(set(tasks)) >= LEAST else f"{len(set(tasks))} tasks"
    else:
        hits = [[_hits(cell.rows[k]) for cell in cells] for k in (i, j)]
        d = over_images(hits, lambda rates: cells[0].metric.headline_of(dict(zip(cells[0].rows[0].tests, rates))))
        over = "test images"
    low, high = _percent(d.low, d.high) or (None, None)
    return Paired(100 * d.mean, low, high, d.verdict, over)


def forgetting(cells: Sequence[CellResult], main: str, tuned_row: str) -> Forgetting:
    """The same table over the tasks where the tuned model's novel accuracy is at least 4 points below zero-shot's."""
    if "novel" not in cells[0].metric.columns:
        return Forgetting(())
    novel: dict[str, list[float]] = {}
    for cell in cells:
        by_row = {row.row: row.tests["novel"].acc1 for row in cell.rows}
        novel.setdefault(cell.dataset, []).append(by_row["zero-shot"] - by_row[tuned_row])
    tasks = tuple(task for task, drops in novel.items() if np.mean(drops) >= FORGETTING)
    inside = [cell for cell in cells if cell.dataset in tasks]
    if len(tasks) < 2 or len(novel) < 3:
        return Forgetting(tasks)
    return Forgetting(tasks, summary(inside), differences(inside, main))


def _hits(row: Row) -> list[np.ndarray]:
    return [np.frombuffer(hits.encode(), dtype=np.uint8) - ord("0") for hits in row.right.values()]


def _mean_landscape(cells: Sequence[CellResult]) -> tuple[MeanPoint, ...]:
    """Points of the landscape, their columns averaged over cells, in percent, with intervals as in the summary."""
    out = []
    for i, point in enumerate(cells[0].landscape):
        tests = [
            {test: (scores["acc1"], cell.counts[test]) for test, scores in cell.landscape[i].tests.items()}
            for cell in cells
        ]
        columns = {name: _averaged(cells, name, tests) for name in cells[0].metric.columns}
        out.append(MeanPoint(point.segment, point.space, point.alpha, columns))
    return tuple(out)


def to_yaml(plain: Mapping[str, object]) -> str:
    import yaml

    return yaml.safe_dump(dict(plain), sort_keys=True, allow_unicode=True)


def _clip_benchmark(recipe: Recipe, cell: CellResult, row: Row) -> dict[str, object]:
    """One result as `clip_benchmark build` reads it (accuracies as fractions, over all tests), our fields beside."""
    tests = row.tests.values()
    input_of = {spec.label: spec.input for spec in recipe.strategies if spec.input is not None}
    n = sum(t.n for t in tests)
    mean = {
        "acc1": sum(t.acc1 * t.n for t in tests) / n,
        "acc5": sum(t.acc5 * t.n for t in tests) / n,
        "mean_per_class_recall": sum(t.mean_per_class_recall * t.n for t in tests) / n,
    }
    return {
        "dataset": cell.dataset,
        "model": recipe.backbone.options.get("arch", recipe.backbone.name),
        "pretrained": cell.backbone.pretrained,
        "backbone_digest": cell.backbone.digest,
        "task": "zeroshot_classification",
        "language": "en",
        "metrics": mean,
        "protocol": recipe.protocol.name,
        "strategy": row.row,
        "recipe_hash": recipe.hash,
        "seed": cell.seed,
        "selection_split": selection_split(cell.rows, row, input_of),
        "chosen": {what: value for what, (value, _) in row.chosen.items()},
        **{f"{test}_acc1": scores.acc1 for test, scores in row.tests.items()},
        cell.metric.headline.lower().replace(" ", "_"): row.score,
        "n": n,
        "version": __version__,
    }


def points(report: Report) -> str:
    """The unit of differences: HM, or points of accuracy."""
    return "HM" if report.metric.headline == "HM" else f"points ({report.metric.headline})"


def gain(report: Report) -> str:
    """The last word of a run: the gain over the tuned model with its interval."""
    d = next(d for d in report.differences if d.minus == report.tuned_row)
    told = f"{report.main} against {report.tuned_row}: {d.mean:+.1f} {points(report)}"
    if d.low is None:
        return f"{told} over {d.over} ({NO_INTERVAL})"
    seen = {"above": "", "below": " (below: the interval lies below 0)"}
    rest = seen.get(d.verdict, " (not significant: the interval contains 0)")
    return f"{told}, 95% interval {d.low:+.1f} to {d.high:+.1f} over {d.over}{rest}"


def load(out: Path) -> Report | None:
    """The report of a finished run; None where there is none that this version wrote."""
    file = out / NAME
    try:
        return Report.from_json(json.loads(file.read_text())) if file.exists() else None
    except (ValueError, LookupError, TypeError):
        return None
