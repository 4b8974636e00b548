"""Reports: plain data from the cells of an experiment, and the files of a finished run."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_vl import __version__
from mergekit_vl.card import card
from mergekit_vl.evaluate import harmonic_mean, wilson
from mergekit_vl.files import slug, write_bytes, write_json, write_text
from mergekit_vl.page import html, plot
from mergekit_vl.statistics import clustered, over_images

if TYPE_CHECKING:
    from mergekit_vl.experiment import Experiment

FORGETTING = 0.04
"""A tuned anchor forgets where its novel accuracy lies this much below zero-shot's."""


def write(
    experiment: Experiment, cells: list[dict[str, Any]], out: Path, *, device: str, seconds: float
) -> dict[str, Any]:
    """Write every file of a finished run; report.json comes last and marks it as done."""
    import torch

    recipe = experiment.recipe
    main = experiment.strategies[0][0]
    report = {
        "recipe": recipe.name,
        "hash": recipe.hash,
        "protocol": recipe.protocol.name,
        "halves": cells[0]["halves"],
        "selection": "nothing was chosen on test; hyperparameters are the recipe's",
        "main": main,
        "anchor": experiment.tuned_labels[0],
        "cells": [{k: v for k, v in cell.items() if k != "path"} for cell in cells],
        "summary": summary(cells),
        "differences": differences(cells, main),
        "forgetting": forgetting(cells, main, experiment.tuned_labels[0]),
        "path": _mean_path(cells),
        "environment": {
            "mergekit_vl": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": device,
            "threads": torch.get_num_threads(),
        },
        "seconds": seconds,
    }
    write_text(out / "recipe.yaml", _yaml(recipe.plain))
    scores = [
        {"dataset": c["dataset"], "seed": c["seed"], "row": r["row"], "hm": r["hm"], "tests": r["tests"]}
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
                _clip_benchmark(experiment, cell, row),
            )
    first = out / "state" / cell_name(cells[0]["dataset"], cells[0]["seed"]) / f"{slug(main)}.safetensors"
    if first.exists():
        write_bytes(out / "merged.safetensors", first.read_bytes())
    write_text(out / "README.md", card(report, recipe.plain["backbone"], gain(report), prompt=first.exists()))
    svg, png = plot(report)
    write_bytes(out / "path.png", png)
    write_text(out / "report.html", html(report, svg, gain(report)))
    write_json(out / "report.json", report)
    return report


def cell_name(dataset: str, seed: int) -> str:
    return f"{slug(dataset)}-seed{seed}"


def summary(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a row of the table, averaged over cells, in percent; HM is that of the averages, as the field prints it.

    The interval of an accuracy is a bootstrap over tasks where there are several, else Wilson's with one seed's images.
    """
    out = []
    for i, first in enumerate(cells[0]["rows"]):
        rows = [cell["rows"][i] for cell in cells]
        acc = {test: 100 * float(np.mean([r["tests"][test]["acc1"] for r in rows])) for test in ("base", "novel")}
        entry = {
            "row": first["row"],
            "kind": first["kind"],
            **acc,
            "hm": harmonic_mean(acc["base"], acc["novel"]),
            "mean_of_hms": 100 * float(np.mean([r["hm"] for r in rows])),
            "parameters": first["parameters"],
            "forwards": first["forwards"],
            "seconds": float(np.mean([r["cost"]["seconds"] for r in rows])),
            "ms_per_sample": float(np.median([r["cost"]["ms_per_sample"] for r in rows])),
        }
        for test in ("base", "novel"):
            for key in ("acc5", "mean_per_class_recall", "nll", "ece"):
                entry[f"{test}_{key}"] = float(np.mean([r["tests"][test][key] for r in rows]))
            ns = [r["tests"][test]["n"] for r in rows]
            entry[f"{test}_n"] = sum(ns)
            if len({cell["dataset"] for cell in cells}) > 1:
                d = clustered([r["tests"][test]["acc1"] for r in rows], [cell["dataset"] for cell in cells])
                low, high = d.low, d.high
            else:
                low, high = wilson(acc[test] / 100 * min(ns), min(ns))
            entry[f"{test}_interval"] = [100 * low, 100 * high]
        out.append(entry)
    return out


def differences(cells: list[dict[str, Any]], main: str) -> list[dict[str, Any]]:
    """HM of the main row minus each other row's, in points, with a 95% interval: over tasks, or over the images of a single cell."""
    out = []
    names = [row["row"] for row in cells[0]["rows"]]
    ours = names.index(main)
    tasks = [cell["dataset"] for cell in cells]
    for i, name in enumerate(names):
        if i == ours:
            continue
        if len(set(tasks)) > 1:
            d = clustered([cell["rows"][ours]["hm"] - cell["rows"][i]["hm"] for cell in cells], tasks)
            over = "tasks"
        else:
            d = over_images([[_hits(cell["rows"][j]) for cell in cells] for j in (ours, i)])
            over = "test images"
        out.append(
            {
                "minus": name,
                "mean": 100 * d.mean,
                "low": 100 * d.low,
                "high": 100 * d.high,
                "verdict": d.verdict,
                "over": over,
            }
        )
    return out


def forgetting(cells: list[dict[str, Any]], main: str, anchor: str) -> dict[str, Any]:
    """The same table over the tasks where the anchor's novel accuracy is at least 4 points below zero-shot's."""
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
    return [np.frombuffer(row["right"][test].encode(), dtype=np.uint8) - ord("0") for test in ("base", "novel")]


def _mean_path(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            **point,
            **{test: 100 * float(np.mean([cell["path"][i][test] for cell in cells])) for test in ("base", "novel")},
        }
        for i, point in enumerate(cells[0]["path"])
    ]


def _yaml(plain) -> str:
    import yaml

    return yaml.safe_dump(dict(plain), sort_keys=True, allow_unicode=True)


def _clip_benchmark(experiment: Experiment, cell: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """One result as `clip_benchmark build` reads it (accuracies as fractions, over both halves), our fields beside."""
    tests = row["tests"]
    n = sum(t["n"] for t in tests.values())
    mean = {k: sum(t[k] * t["n"] for t in tests.values()) / n for k in ("acc1", "acc5", "mean_per_class_recall")}
    return {
        "dataset": cell["dataset"],
        "model": experiment.recipe.backbone.options.get("arch", experiment.recipe.backbone.name),
        "pretrained": str(experiment.recipe.backbone.options.get("pretrained", "embedded")),
        "task": "zeroshot_classification",
        "language": "en",
        "metrics": mean,
        "protocol": experiment.recipe.protocol.name,
        "strategy": row["row"],
        "recipe_hash": experiment.recipe.hash,
        "seed": cell["seed"],
        "selection_split": None,
        "base_acc1": tests["base"]["acc1"],
        "novel_acc1": tests["novel"]["acc1"],
        "hm": row["hm"],
        "n": n,
        "version": __version__,
    }


def gain(report: dict[str, Any]) -> str:
    """The last word of a run: the gain over the tuned anchor with its interval."""
    d = next(d for d in report["differences"] if d["minus"] == report["anchor"])
    seen = (
        ""
        if d["verdict"] == "above"
        else f" ({d['verdict']}: the interval {'lies below' if d['verdict'] == 'below' else 'contains'} 0)"
    )
    return f"{report['main']} against {report['anchor']}: {d['mean']:+.1f} HM, 95% interval {d['low']:+.1f} to {d['high']:+.1f} over {d['over']}{seen}"


def load(out: Path) -> dict[str, Any] | None:
    """The report of a finished run, or None."""
    file = out / "report.json"
    return json.loads(file.read_text()) if file.exists() else None
