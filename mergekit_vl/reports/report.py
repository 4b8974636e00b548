"""Reports: plain data from the cells of an experiment, and the files of a finished run."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_vl import __version__
from mergekit_vl.models import choices
from mergekit_vl.models.evaluate import wilson
from mergekit_vl.protocols.base import Metric
from mergekit_vl.reports.card import card
from mergekit_vl.reports.html import html, plot
from mergekit_vl.reports.intervals import LEAST, NO_INTERVAL, clustered, over_images
from mergekit_vl.system.atomic_files import cell_name, slug, write_bytes, write_json, write_text

if TYPE_CHECKING:
    from mergekit_vl.models.model import Model
    from mergekit_vl.recipe import Recipe

FORGETTING = 0.04
"""A tuned anchor forgets where its novel accuracy lies this much below zero-shot's."""


def write(
    recipe: Recipe,
    cells: list[dict[str, Any]],
    first: Model,
    out: Path,
    *,
    base: str,
    code: Mapping[str, str],
    device: str,
    seconds: float,
) -> dict[str, Any]:
    """Write every file of a finished run; `first` is the main model of the first cell, `base` the label of the zero-shot row. report.json comes last and marks it as done."""
    from mergekit_vl.storage.export import export, is_whole

    main = recipe.strategies[0].label
    anchor = next(row["row"] for row in cells[0]["rows"] if row["kind"] == "tuned")
    report = {
        "recipe": recipe.name,
        "hash": recipe.hash,
        "code": code,
        "protocol": recipe.protocol.name,
        "metric": cells[0]["metric"],
        "note": cells[0]["note"],
        "selection": _selection(cells),
        "main": main,
        "base": base,
        "anchor": anchor,
        "cells": [{k: v for k, v in cell.items() if k != "path"} for cell in cells],
        "summary": summary(cells),
        "differences": differences(cells, main),
        "forgetting": forgetting(cells, main, anchor),
        "path": _mean_path(cells),
        "environment": environment(device),
        "seconds": seconds,
    }
    write_text(out / "recipe.yaml", to_yaml(recipe.plain))
    scores = [
        {"dataset": c["dataset"], "seed": c["seed"], "row": r["row"], "score": r["score"], "tests": r["tests"]}
        for c in cells
        for r in c["rows"]
    ]
    write_json(out / "scores.json", scores)
    write_json(
        out / "cost.json",
        [{"dataset": c["dataset"], "seed": c["seed"], "row": r["row"], **r["cost"]} for c in cells for r in c["rows"]],
    )
    for cell in cells:
        for row in cell["rows"]:
            write_json(
                out / "results" / f"{cell_name(cell['dataset'], cell['seed'])}-{slug(row['row'])}.json",
                _clip_benchmark(recipe, cell, row),
            )
    stored = out / "state" / cell_name(cells[0]["dataset"], cells[0]["seed"]) / f"{slug(main)}.safetensors"
    if is_whole(first):
        export(first, out / "merged")
    elif stored.exists():
        write_bytes(out / "merged.safetensors", stored.read_bytes())
    write_text(out / "README.md", card(report, recipe.plain["backbone"], gain(report), first))
    svg, png = plot(report)
    write_bytes(out / "path.png", png)
    write_text(out / "report.html", html(report, svg, gain(report)))
    write_json(out / "report.json", report)
    return report


def environment(device: str) -> dict[str, Any]:
    import torch

    return {
        "mergekit_vl": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
    }


def _selection(cells: list[dict[str, Any]]) -> str:
    """What was chosen, and on what."""
    by_split: dict[str, list[str]] = {}
    for i, row in enumerate(cells[0]["rows"]):
        for what, values in choices.counted([choices.of_row(cell["rows"][i]) for cell in cells]).items():
            by_split.setdefault(values[0]["split"], []).append(f"{what} of {row['row']}")
    if not by_split:
        return "nothing was chosen on test; hyperparameters are the recipe's"
    told = [f"chosen on {choices.SPLITS[split]}: {', '.join(names)}" for split, names in by_split.items()]
    return f"nothing was chosen on test; {'; '.join(told)}; other hyperparameters are the recipe's"


def selection_split(rows: Sequence[dict[str, Any]], row: dict[str, Any], of: Mapping[str, str]) -> str | None:
    """The split on which something of this row was chosen or learnt, be it by the models that it is made of; the training split is none.

    `of` tells which rows are made of another one alone; the other merged rows and the controls are made of all tuned ones.
    """
    if row.get("chosen_on") not in (None, "train"):
        return row["chosen_on"]
    if "chosen_on" not in row and row.get("chosen"):  # of a run of an earlier version
        return "val"
    if row["kind"] in ("zero-shot", "tuned"):
        return None
    parent = of.get(row["row"])
    parents = [r for r in rows if (r["row"] == parent if parent else r["kind"] == "tuned")]
    return next((split for p in parents if (split := selection_split(rows, p, of))), None)


def metric_of(cell: dict[str, Any]) -> Metric:
    return Metric(**cell["metric"])


def summary(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a row of the table, averaged over cells, in percent; the headline is that of the averages, as the field prints it.

    The interval of an accuracy is a bootstrap over tasks where there are several, else that of one seed's images.
    """
    out = []
    tuned = [i for i, row in enumerate(cells[0]["rows"]) if row["kind"] == "tuned"]
    for i, first in enumerate(cells[0]["rows"]):
        rows = [cell["rows"][i] for cell in cells]
        columns: dict[str, Any] = {}
        for name in metric_of(cells[0]).columns:
            columns[name] = {
                **_averaged(cells, name, [row["tests"] for row in rows]),
                "n": sum(row["tests"][t]["n"] for cell, row in zip(cells, rows) for t in metric_of(cell).columns[name]),
                **{
                    key: float(np.mean([_column(cell, row, name, key) for cell, row in zip(cells, rows)]))
                    for key in ("acc5", "mean_per_class_recall", "nll", "ece")
                },
            }
        metric = metric_of(cells[0])
        entry = {
            "row": first["row"],
            "kind": first["kind"],
            "columns": columns,
            "score": metric.score([column["acc1"] for column in columns.values()]),
            "mean_of_scores": 100 * float(np.mean([r["score"] for r in rows])),
            "parameters": first["parameters"],
            "forwards": first["forwards"],
            "datasets": _by_dataset(cells, rows),
            "chosen": choices.counted([choices.of_row(row) for row in rows]),
            "seconds": float(np.mean([r["cost"]["seconds"] for r in rows])),
            "ms_per_sample": float(np.median([r["cost"]["ms_per_sample"] for r in rows])),
        }
        if metric.normalised:
            own = [
                _column(cell, row, name, "acc1") / best
                for cell, row in zip(cells, rows)
                for j, name in zip(tuned, metric.columns)
                if (
                    best := _column(cell, cell["rows"][j], name, "acc1")
                )  # nothing can be divided by a model that is never right
            ]
            entry["normalised"] = 100 * float(np.mean(own)) if own else 0.0
        out.append(entry)
    return out


def _by_dataset(cells: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row's columns and headline on each data set, in percent, with the intervals of one seed's images."""
    out = []
    for name in dict.fromkeys(cell["dataset"] for cell in cells):
        own = [(cell, row) for cell, row in zip(cells, rows) if cell["dataset"] == name]
        of, tests = [cell for cell, _ in own], [row["tests"] for _, row in own]
        metric = metric_of(of[0])
        columns = {c: {**_averaged(of, c, tests), "n": _images(metric, c, tests[0])} for c in metric.columns}
        score = metric.score([column["acc1"] for column in columns.values()])
        out.append({"dataset": name, "columns": columns, "score": score})
    return out


def _images(metric: Metric, column: str, tests: dict[str, Any]) -> int:
    return sum(tests[test]["n"] for test in metric.columns[column])


def _column(cell: dict[str, Any], row: dict[str, Any], name: str, key: str) -> float:
    return metric_of(cell).column(name, {test: scores[key] for test, scores in row["tests"].items()})


def _averaged(cells: list[dict[str, Any]], name: str, tests: list[dict[str, Any]]) -> dict[str, Any]:
    """acc1 of a column with its interval (None across a few tasks), in percent; tests[cell][test] holds acc1 and n."""
    rates = [{test: scores["acc1"] for test, scores in of_cell.items()} for of_cell in tests]
    values = [metric_of(cell).column(name, accuracies) for cell, accuracies in zip(cells, rates)]
    mean = float(np.mean(values))
    if len({cell["dataset"] for cell in cells}) > 1:
        d = clustered(values, [cell["dataset"] for cell in cells])
        interval = _percent(d.low, d.high)
    else:
        interval = _percent(*_of_one_seed(metric_of(cells[0]).columns[name], tests, mean))
    return {"acc1": 100 * mean, "interval": interval}


def _percent(low: float | None, high: float | None) -> list[float] | None:
    return None if low is None or high is None else [100 * low, 100 * high]


def _of_one_seed(names: Sequence[str], tests: list[dict[str, Any]], mean: float) -> tuple[float, float]:
    """The interval of a column with the images of one seed: Wilson's, or the normal one of a mean of several tests."""
    ns = [min(of_cell[name]["n"] for of_cell in tests) for name in names]
    if len(names) == 1:
        return wilson(mean * ns[0], ns[0])
    rates = [float(np.mean([of_cell[name]["acc1"] for of_cell in tests])) for name in names]
    half = 1.959964 * math.sqrt(sum(p * (1 - p) / n for p, n in zip(rates, ns))) / len(names)
    return max(0.0, mean - half), min(1.0, mean + half)


def differences(cells: list[dict[str, Any]], main: str) -> list[dict[str, Any]]:
    """The main row minus each other one."""
    names = [row["row"] for row in cells[0]["rows"]]
    return [{"minus": name, **paired(cells, main, name)} for name in names if name != main]


def paired(cells: list[dict[str, Any]], ours: str, theirs: str) -> dict[str, Any]:
    """Headline of one row minus another's, in points, with a 95% interval: over tasks, where there are enough, or over the images of a
    single task.
    """
    names = [row["row"] for row in cells[0]["rows"]]
    i, j = names.index(ours), names.index(theirs)
    tasks = [cell["dataset"] for cell in cells]
    if len(set(tasks)) > 1:
        d = clustered([cell["rows"][i]["score"] - cell["rows"][j]["score"] for cell in cells], tasks)
        over = "tasks" if len(set(tasks)) >= LEAST else f"{len(set(tasks))} tasks"
    else:
        hits = [[_hits(cell["rows"][k]) for cell in cells] for k in (i, j)]
        d = over_images(hits, lambda rates: metric_of(cells[0]).of(dict(zip(cells[0]["rows"][0]["tests"], rates))))
        over = "test images"
    low, high = _percent(d.low, d.high) or (None, None)
    return {"mean": 100 * d.mean, "low": low, "high": high, "verdict": d.verdict, "over": over}


def forgetting(cells: list[dict[str, Any]], main: str, anchor: str) -> dict[str, Any]:
    """The same table over the tasks where the anchor's novel accuracy is at least 4 points below zero-shot's."""
    if "novel" not in metric_of(cells[0]).columns:
        return {"tasks": []}
    novel: dict[str, list[float]] = {}
    for cell in cells:
        by_row = {row["row"]: row["tests"]["novel"]["acc1"] for row in cell["rows"]}
        novel.setdefault(cell["dataset"], []).append(by_row["zero-shot"] - by_row[anchor])
    tasks = [task for task, drops in novel.items() if np.mean(drops) >= FORGETTING]
    inside = [cell for cell in cells if cell["dataset"] in tasks]
    if len(tasks) < 2 or len(novel) < 3:
        return {"tasks": tasks}
    return {"tasks": tasks, "summary": summary(inside), "differences": differences(inside, main)}


def _hits(row: dict[str, Any]) -> list[np.ndarray]:
    return [np.frombuffer(hits.encode(), dtype=np.uint8) - ord("0") for hits in row["right"].values()]


def _mean_path(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points of the path, their columns averaged over cells, in percent, with intervals as in the summary."""
    out = []
    for i, point in enumerate(cells[0]["path"]):
        tests = [
            {t: {"n": cell["counts"][t], "acc1": scores["acc1"]} for t, scores in cell["path"][i]["tests"].items()}
            for cell in cells
        ]
        columns = {name: _averaged(cells, name, tests) for name in metric_of(cells[0]).columns}
        out.append({"leg": point["leg"], "space": point["space"], "alpha": point["alpha"], "columns": columns})
    return out


def to_yaml(plain) -> str:
    import yaml

    return yaml.safe_dump(dict(plain), sort_keys=True, allow_unicode=True)


def _clip_benchmark(recipe: Recipe, cell: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """One result as `clip_benchmark build` reads it (accuracies as fractions, over all tests), our fields beside."""
    tests = row["tests"]
    of = {spec.label: spec.of for spec in recipe.strategies if spec.of is not None}
    n = sum(t["n"] for t in tests.values())
    mean = {k: sum(t[k] * t["n"] for t in tests.values()) / n for k in ("acc1", "acc5", "mean_per_class_recall")}
    return {
        "dataset": cell["dataset"],
        "model": recipe.backbone.options.get("arch", recipe.backbone.name),
        "pretrained": cell["backbone"]["pretrained"],
        "backbone_digest": cell["backbone"]["digest"],
        "task": "zeroshot_classification",
        "language": "en",
        "metrics": mean,
        "protocol": recipe.protocol.name,
        "strategy": row["row"],
        "recipe_hash": recipe.hash,
        "seed": cell["seed"],
        "selection_split": selection_split(cell["rows"], row, of),
        "chosen": row.get("chosen", {}),
        **{f"{test}_acc1": scores["acc1"] for test, scores in tests.items()},
        cell["metric"]["headline"].lower().replace(" ", "_"): row["score"],
        "n": n,
        "version": __version__,
    }


def points(report: dict[str, Any]) -> str:
    """The unit of differences: HM, or points of accuracy."""
    return "HM" if report["metric"]["headline"] == "HM" else f"points ({report['metric']['headline']})"


def gain(report: dict[str, Any]) -> str:
    """The last word of a run: the gain over the tuned anchor with its interval."""
    d = next(d for d in report["differences"] if d["minus"] == report["anchor"])
    told = f"{report['main']} against {report['anchor']}: {d['mean']:+.1f} {points(report)}"
    if d["low"] is None:
        return f"{told} over {d['over']} ({NO_INTERVAL})"
    seen = {"above": "", "below": " (below: the interval lies below 0)"}
    rest = seen.get(d["verdict"], f" ({d['verdict']}: the interval contains 0)")
    return f"{told}, 95% interval {d['low']:+.1f} to {d['high']:+.1f} over {d['over']}{rest}"


def load(out: Path) -> dict[str, Any] | None:
    """The report of a finished run, or None."""
    file = out / "report.json"
    return json.loads(file.read_text()) if file.exists() else None
