"""The HTML page of a report, with its plots inside it: it needs nothing beside itself."""

from __future__ import annotations

import io
from html import escape
from typing import Any

import numpy as np


def plot(report: dict[str, Any]) -> tuple[str, bytes]:
    """Base against novel accuracy with lines of equal HM, and the path zero-shot, merged, fine-tuned; as SVG and PNG."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "mergekit-vl"
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    _plane(left, report)
    _path(right, report)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return svg.getvalue()[svg.getvalue().index("<svg") :], png.getvalue()


STYLES = {
    "zero-shot": ("#555555", "s"),
    "tuned": ("#d9534f", "o"),
    "control": ("#e69f00", "v"),
    "merged": ("#2f78c4", "D"),
}


def _plane(axis, report: dict[str, Any]) -> None:
    rows = report["summary"]
    bases, novels = ([r[k] for r in rows] for k in ("base", "novel"))
    xs = [min(bases) - 3, max(bases) + 5]
    ys = [min(novels) - 3, max(novels) + 3]
    grid_x, grid_y = np.meshgrid(np.linspace(*xs, 80), np.linspace(*ys, 80))
    lines = axis.contour(
        grid_x, grid_y, 2 * grid_x * grid_y / (grid_x + grid_y), levels=8, colors="#d5d5d5", linewidths=0.8
    )
    axis.clabel(lines, fmt="HM %.0f", fontsize=7)
    for leg, colour in (
        ("zero-shot -> tuned", "#aaaaaa"),
        ("zero-shot -> merged", "#2f78c4"),
        ("merged -> tuned", "#2f78c4"),
    ):
        points = _leg(report, leg)
        axis.plot([p["base"] for p in points], [p["novel"] for p in points], "-", color=colour, lw=1.2, zorder=1)
    placed: list[tuple[float, float]] = []
    for r in sorted(rows, key=lambda r: r["row"] != report["main"]):
        colour, marker = STYLES[r["kind"]]
        big = r["row"] == report["main"]
        axis.scatter(
            r["base"], r["novel"], c=colour, marker=marker, s=90 if big else 40, zorder=3,
            edgecolors="black" if big else "none",
        )  # fmt: skip
        # a label that would cover an earlier one moves down
        x, y = (r["base"] - xs[0]) / (xs[1] - xs[0]), (r["novel"] - ys[0]) / (ys[1] - ys[0])
        while any(abs(x - a) < 0.22 and abs(y - b) < 0.035 for a, b in placed):
            y -= 0.036
        placed.append((x, y))
        axis.annotate(
            r["row"], (r["base"], r["novel"]), xytext=(x + 0.013, y + 0.01), textcoords="axes fraction",
            fontsize=8, weight="bold" if big else "normal",
        )  # fmt: skip
    axis.set(xlim=xs, ylim=ys, xlabel="base accuracy (%)", ylabel="novel accuracy (%)")
    axis.set_title("What each method gains (right) and keeps (up)")


def _path(axis, report: dict[str, Any]) -> None:
    for test, colour in (("base", "#d9534f"), ("novel", "#2f78c4")):
        through = [(p["alpha"], p[test]) for p in _leg(report, "zero-shot -> merged")]
        through += [(1 + p["alpha"], p[test]) for p in _leg(report, "merged -> tuned")]
        if through:
            axis.plot(*zip(*through), "-o", ms=3, color=colour, label=f"{test}, by way of {report['main']}")
        straight = [(2 * p["alpha"], p[test]) for p in _leg(report, "zero-shot -> tuned")]
        axis.plot(*zip(*straight), "--", lw=1, color=colour, alpha=0.7, label=f"{test}, straight (WiSE-FT)")
    axis.set_xticks([0, 1, 2], ["zero-shot", f"{report['main']} / halfway", report["anchor"]])
    axis.set(ylabel="accuracy (%)", title="The path zero-shot → merged → fine-tuned")
    axis.legend(fontsize=8, frameon=False)


def _leg(report: dict[str, Any], leg: str, space: str = "classifiers") -> list[dict[str, Any]]:
    return [p for p in report["path"] if p["leg"] == leg and p["space"] == space]


def html(report: dict[str, Any], svg: str, gain: str) -> str:
    cells = report["cells"]
    tasks = list(dict.fromkeys(c["dataset"] for c in cells))
    seeds = list(dict.fromkeys(c["seed"] for c in cells))
    counts = ", ".join(f"{k} {v}" for k, v in cells[0]["counts"].items())
    where = f"{tasks[0] if len(tasks) == 1 else f'{len(tasks)} tasks'}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    interval = "bootstrap over tasks" if len(tasks) > 1 else "Wilson, with the images of one seed"
    parts = [
        f"<h1>{escape(report['recipe'])}</h1>",
        f"<p class=lead>{escape(gain)}.</p>",
        f"<p>{escape(report['protocol'])} on {escape(where)}; halves: {escape(report['halves'])}; images"
        f"{' of the first cell' if len(cells) > 1 else ''}: {escape(counts)}. {escape(report['selection'])}.</p>",
        f"<figure>{svg}</figure>",
        "<h2>Accuracy</h2>",
        f"<p>Percent, n = {report['summary'][0]['base_n']} base and {report['summary'][0]['novel_n']} novel images. "
        f"HM is the harmonic mean of the averages (the field's). Intervals: 95%, {interval}.</p>",
        _accuracy(report["summary"], report["main"]),
        "<h2>Differences</h2>",
        f"<p>Paired, with a bootstrap over {report['differences'][0]['over']}; “above” and “below” only where the interval "
        "excludes 0.</p>",
        _differences(report["differences"], report["main"]),
        _forgetting(report),
        "<h2>Beyond top-1</h2>",
        _more(report["summary"], report["main"]),
        "<h2>Coefficients</h2>",
        "<p>The straight line from zero-shot (0) to fine-tuned (1), merged as contexts and as classifiers (WiSE-FT). "
        "Reading the best coefficient off this table is a choice made on test.</p>",
        _coefficients(report),
        "<h2>Cost</h2>",
        "<p>What a model adds to its backbone. An ensemble runs a head for each member.</p>",
        _cost(report["summary"], report["main"]),
        _by_task(cells, tasks),
        "<h2>Repeat it</h2>",
        f"<pre>mergekit-vl run recipe.yaml</pre><p>{escape(', '.join(f'{k} {v}' for k, v in report['environment'].items()))};"
        f" {report['seconds']:.0f} s.</p>",
    ]
    head = f'<meta charset="utf-8"><title>{escape(report["recipe"])}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2rem auto;padding:0 1rem;color:#222}
.lead{font-size:1.15rem;background:#eef5fc;padding:.6rem 1rem;border-left:4px solid #2f78c4}
table{border-collapse:collapse;margin:.5rem 0 1rem;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}
th,td{padding:.3rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid #e3e3e3}
th:first-child,td:first-child{text-align:left}
tr.main{background:#eef5fc;font-weight:600} .range{color:#777;font-size:.85em}
svg{max-width:100%;height:auto} figure{margin:1rem 0} pre{background:#f6f6f6;padding:.6rem}
"""


def _table(header: list[str], rows: list[list[str]], strong: str = "") -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = "".join(
        f"<tr{' class=main' if row[0] == escape(strong) else ''}>{''.join(f'<td>{c}</td>' for c in row)}</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _range(low: float, high: float, form: str = ".1f") -> str:
    return f"<span class=range>{low:{form}} to {high:{form}}</span>"


def _accuracy(rows: list[dict[str, Any]], main: str) -> str:
    return _table(
        ["row", "base", "95%", "novel", "95%", "HM", "mean of HMs"],
        [
            [
                escape(r["row"]),
                *(x for t in ("base", "novel") for x in (f"{r[t]:.1f}", _range(*r[f"{t}_interval"]))),
                f"{r['hm']:.1f}",
                f"{r['mean_of_hms']:.1f}",
            ]
            for r in rows
        ],
        main,
    )


def _differences(rows: list[dict[str, Any]], main: str) -> str:
    return _table(
        [f"{main} minus", "HM points", "95%", "verdict"],
        [[escape(d["minus"]), f"{d['mean']:+.2f}", _range(d["low"], d["high"], "+.2f"), d["verdict"]] for d in rows],
    )


def _forgetting(report: dict[str, Any]) -> str:
    part = report["forgetting"]
    if "summary" not in part:
        return ""
    return (
        f"<h2>Where {escape(report['anchor'])} forgets</h2><p>The tasks whose novel accuracy it lowers by 4 points or more: "
        f"{escape(', '.join(part['tasks']))}. They are picked by {escape(report['anchor'])}'s own result on test, which "
        f"flatters every other row against it.</p>"
        + _accuracy(part["summary"], report["main"])
        + _differences(part["differences"], report["main"])
    )


def _more(rows: list[dict[str, Any]], main: str) -> str:
    kinds = [(t, k, w) for k, w in (("acc5", "top-5"), ("mean_per_class_recall", "mean per class"), ("nll", "NLL"), ("ece", "ECE")) for t in ("base", "novel")]  # fmt: skip
    percent = ("acc5", "mean_per_class_recall")
    return _table(
        ["row", *(f"{t} {w}" for t, _, w in kinds)],
        [
            [
                escape(r["row"]),
                *(f"{100 * r[f'{t}_{k}']:.1f}" if k in percent else f"{r[f'{t}_{k}']:.3f}" for t, k, _ in kinds),
            ]
            for r in rows
        ],
        main,
    )


def _coefficients(report: dict[str, Any]) -> str:
    spaces = [s for s in ("contexts", "classifiers") if _leg(report, "zero-shot -> tuned", s)]
    lines = zip(*(_leg(report, "zero-shot -> tuned", s) for s in spaces))
    return _table(
        ["coefficient", *(f"{s}: {t}" for s in spaces for t in ("base", "novel"))],
        [[f"{ps[0]['alpha']:.1f}", *(f"{p[t]:.1f}" for p in ps for t in ("base", "novel"))] for ps in lines],
    )


def _cost(rows: list[dict[str, Any]], main: str) -> str:
    return _table(
        ["row", "parameters", "heads a sample", "seconds to make", "ms a sample, features to logits"],
        [
            [
                escape(r["row"]),
                f"{r['parameters']}",
                f"{r['forwards']}",
                f"{r['seconds']:.1f}",
                f"{r['ms_per_sample']:.4f}",
            ]
            for r in rows
        ],
        main,
    )


def _by_task(cells: list[dict[str, Any]], tasks: list[str]) -> str:
    if len(tasks) == 1:
        return ""
    names = [r["row"] for r in cells[0]["rows"]]
    mean = lambda task, i: 100 * np.mean([c["rows"][i]["hm"] for c in cells if c["dataset"] == task])  # noqa: E731
    rows = [[escape(t), *(f"{mean(t, i):.1f}" for i in range(len(names)))] for t in tasks]
    return "<h2>HM by task</h2>" + _table(["task", *names], rows)
