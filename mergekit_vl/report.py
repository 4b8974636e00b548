"""Reports: plain data from the cells of an experiment, as JSON, Markdown, HTML and CLIP_benchmark's result files."""

from __future__ import annotations

import io
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_vl import __version__
from mergekit_vl.evaluate import harmonic_mean
from mergekit_vl.files import write_bytes, write_json, write_text
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
                out / "results" / f"{cell['dataset']}-seed{cell['seed']}-{row['row'].replace(' ', '_')}.json",
                _clip_benchmark(experiment, cell, row),
            )
    first = out / "state" / f"{cells[0]['dataset']}-seed{cells[0]['seed']}" / f"{main.replace(' ', '_')}.safetensors"
    if first.exists():
        write_bytes(out / "merged.safetensors", first.read_bytes())
    write_text(out / "README.md", _card(experiment, report, merged=first.exists()))
    svg = plot(report)
    write_bytes(out / "path.png", svg["png"])
    write_text(out / "report.html", html(report, svg["svg"]))
    write_json(out / "report.json", report)
    return report


def summary(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a row of the table, averaged over cells, in percent; HM is that of the averages, as the field prints it."""
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
            if len(cells) == 1:
                entry[f"{test}_interval"] = [100 * first["tests"][test][k] for k in ("low", "high")]
                entry[f"{test}_n"] = first["tests"][test]["n"]
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
            a, b = ([_hits(cell["rows"][j], test) for test in ("base", "novel") for cell in cells] for j in (ours, i))
            d, over = over_images(a, b), "test images"
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


def _hits(row: dict[str, Any], test: str) -> np.ndarray:
    return np.frombuffer(row["right"][test].encode(), dtype=np.uint8) - ord("0")


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


def _card(experiment: Experiment, report: dict[str, Any], *, merged: bool) -> str:
    lines = [
        f"# {report['recipe']}: {report['main']}",
        "",
        f"Made by mergekit-vl {__version__}; repeat it with `mergekit-vl run recipe.yaml`.",
        "",
    ]
    lines += ["| row | base | novel | HM | forwards a sample |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['row']} | {r['base']:.1f} | {r['novel']:.1f} | {r['hm']:.1f} | {r['forwards']} |"
        for r in report["summary"]
    ]
    lines += ["", gain(report) + ".", ""]
    if merged:
        lines += [
            "`merged.safetensors` holds the context vectors of the first cell's merged prompt. To classify with it:",
            "",
            "```python",
            "from pathlib import Path",
            "from mergekit_vl.adapters.prompt import Prompt",
            "from mergekit_vl.model import Classes, Single",
            *_backbone_lines(experiment),
            'model = Single(backbone, Prompt.load(Path("merged.safetensors")))',
            'text = model.text_features(Classes(("dog", "cat")))  # [K, D]; compare with open_clip\'s encode_image as usual',
            "```",
        ]
    return "\n".join(lines) + "\n"


def _backbone_lines(experiment: Experiment) -> list[str]:
    kind = type(experiment.backbone)
    arguments = ", ".join(f"{k}={v!r}" for k, v in experiment.recipe.backbone.options.items())
    return [
        f"from {kind.__module__} import {kind.__name__}",
        f'backbone = {kind.__name__}({arguments}).build("cpu")  # backbone.model is an open_clip CLIP',
    ]


def plot(report: dict[str, Any]) -> dict[str, Any]:
    """Base against novel accuracy with lines of equal HM, every row a point, and the straight paths between the classifiers."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "mergekit-vl"
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    rows = report["summary"]
    bases, novels = ([r[k] for r in rows] for k in ("base", "novel"))
    xs = [min(bases) - 4, max(bases) + 8]
    ys = [min(novels) - 4, max(novels) + 4]
    grid_x, grid_y = np.meshgrid(np.linspace(*xs, 80), np.linspace(*ys, 80))
    lines = left.contour(
        grid_x, grid_y, 2 * grid_x * grid_y / (grid_x + grid_y), levels=8, colors="#cccccc", linewidths=0.8
    )
    left.clabel(lines, fmt="HM %.0f", fontsize=7)
    styles = {
        "zero-shot": ("#555555", "s"),
        "tuned": ("#d9534f", "o"),
        "control": ("#f0ad4e", "v"),
        "merged": ("#4a90d9", "D"),
    }
    for path, colour in (
        ("zero-shot -> tuned", "#bbbbbb"),
        ("zero-shot -> merged", "#4a90d9"),
        ("merged -> tuned", "#4a90d9"),
    ):
        leg = [p for p in report["path"] if p["leg"] == path]
        left.plot([p["base"] for p in leg], [p["novel"] for p in leg], "-", color=colour, lw=1.2, zorder=1)
    for r in rows:
        colour, marker = styles[r["kind"]]
        big = r["row"] == report["main"]
        left.scatter(
            r["base"],
            r["novel"],
            c=colour,
            marker=marker,
            s=90 if big else 40,
            zorder=3,
            edgecolors="black" if big else "none",
        )
        left.annotate(
            r["row"],
            (r["base"], r["novel"]),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=8,
            weight="bold" if big else "normal",
        )
    left.set(
        xlim=xs,
        ylim=ys,
        xlabel="base accuracy (%)",
        ylabel="novel accuracy (%)",
        title="What each method keeps and gains",
    )
    offset = {"zero-shot -> merged": 0.0, "merged -> tuned": 1.0}
    through = [p for p in report["path"] if p["leg"] in offset]
    for test, colour in (("base", "#d9534f"), ("novel", "#4a90d9")):
        if through:
            right.plot(
                [offset[p["leg"]] + p["alpha"] for p in through],
                [p[test] for p in through],
                "-o",
                ms=3,
                color=colour,
                label=f"{test}, through {report['main']}",
            )
        straight = [p for p in report["path"] if p["leg"] == "zero-shot -> tuned"]
        right.plot(
            [2 * p["alpha"] for p in straight],
            [p[test] for p in straight],
            "--",
            lw=1,
            color=colour,
            alpha=0.7,
            label=f"{test}, straight (WiSE-FT)",
        )
    right.set_xticks([0, 1, 2], ["zero-shot", f"{report['main']} / middle", report["anchor"]])
    right.set(ylabel="accuracy (%)", title="The path zero-shot → merged → fine-tuned")
    right.legend(fontsize=8, frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return {"svg": svg.getvalue()[svg.getvalue().index("<svg") :], "png": png.getvalue()}


def html(report: dict[str, Any], svg: str) -> str:
    """A page that needs nothing beside itself."""
    from html import escape

    def table(header: list[str], rows: list[list[str]], strong: str = "") -> str:
        head = "".join(f"<th>{escape(h)}</th>" for h in header)
        body = "".join(
            f"<tr{' class=main' if row[0] == strong else ''}>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>"
            for row in rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def number(r: dict[str, Any], test: str) -> str:
        text = f"{r[test]:.1f}"
        return text + (
            f" [{r[f'{test}_interval'][0]:.1f}, {r[f'{test}_interval'][1]:.1f}]" if f"{test}_interval" in r else ""
        )

    def quality(rows):
        return table(
            ["row", "base", "novel", "HM", "mean of HMs", "novel top-5", "novel NLL", "novel ECE", "added parameters", "heads a sample", "seconds to make", "ms a sample"],
            [
                [r["row"], number(r, "base"), number(r, "novel"), f"{r['hm']:.1f}", f"{r['mean_of_hms']:.1f}", f"{100 * r['novel_acc5']:.1f}", f"{r['novel_nll']:.2f}",
                 f"{r['novel_ece']:.3f}", f"{r['parameters']}", f"{r['forwards']}", f"{r['seconds']:.1f}", f"{r['ms_per_sample']:.4f}"]
                for r in rows
            ],
            report["main"],
        )  # fmt: skip

    def minus(rows):
        return table(
            [f"{report['main']} minus", "HM points", "95% interval", "verdict"],
            [[d["minus"], f"{d['mean']:+.2f}", f"{d['low']:+.2f} to {d['high']:+.2f}", d["verdict"]] for d in rows],
        )

    cells = report["cells"]
    counts = cells[0]["counts"]
    where = (
        f"{cells[0]['dataset']}, seed {cells[0]['seed']}"
        if len(cells) == 1
        else f"{len({c['dataset'] for c in cells})} tasks, {len({c['seed'] for c in cells})} seeds"
    )
    parts = [
        f"<h1>{escape(report['recipe'])}</h1>",
        f"<p class=lead>{escape(gain(report))}.</p>",
        f"<p>{escape(report['protocol'])} on {escape(where)}; halves: {escape(report['halves'])}; images: {escape(', '.join(f'{k} {v}' for k, v in counts.items()))}"
        f"{' in the first cell' if len(cells) > 1 else ''}. {escape(report['selection'].capitalize())}.</p>",
        f"<figure>{svg}</figure>",
        "<h2>Scores</h2>",
        "<p>Percent; HM is the harmonic mean of the averages (the field's), the mean of HMs stands beside it. "
        "Intervals of accuracies: 95%, Wilson.</p>",
        quality(report["summary"]),
        "<h2>Differences</h2>",
        f"<p>Paired, over {report['differences'][0]['over']}; “above” and “below” only where the interval excludes 0.</p>",
        minus(report["differences"]),
    ]
    if "summary" in report["forgetting"]:
        names = ", ".join(report["forgetting"]["tasks"])
        parts += [
            f"<h2>Where {escape(report['anchor'])} forgets</h2>",
            f"<p>Tasks whose novel accuracy it lowers by 4 points or more: {escape(names)}.</p>",
            quality(report["forgetting"]["summary"]),
            minus(report["forgetting"]["differences"]),
        ]
    if len(cells) > 1:
        names = [r["row"] for r in cells[0]["rows"]]
        tasks = list(dict.fromkeys(c["dataset"] for c in cells))
        rows = [
            [
                t,
                *(
                    f"{100 * np.mean([c['rows'][i]['hm'] for c in cells if c['dataset'] == t]):.1f}"
                    for i in range(len(names))
                ),
            ]
            for t in tasks
        ]
        parts += ["<h2>HM by task</h2>", table(["task", *names], rows)]
    environment = ", ".join(f"{k} {v}" for k, v in report["environment"].items())
    parts += [
        "<h2>Repeat it</h2>",
        f"<pre>mergekit-vl run recipe.yaml</pre><p>{escape(environment)}; {report['seconds']:.0f} s.</p>",
    ]
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2rem auto;padding:0 1rem;color:#222}"
        ".lead{font-size:1.15rem;background:#eef5fc;padding:.6rem 1rem;border-left:4px solid #4a90d9}"
        "table{border-collapse:collapse;margin:.5rem 0 1rem;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}"
        "th,td{padding:.3rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid #e3e3e3}th:first-child,td:first-child{text-align:left}"
        "tr.main{background:#eef5fc;font-weight:600}svg{max-width:100%;height:auto}figure{margin:1rem 0}pre{background:#f6f6f6;padding:.6rem}"
    )
    body = "\n".join(parts)
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(report["recipe"])}</title><style>{style}</style><body>{body}</body></html>\n'


def load(out: Path) -> dict[str, Any] | None:
    """The report of a finished run, or None."""
    file = out / "report.json"
    return json.loads(file.read_text()) if file.exists() else None
