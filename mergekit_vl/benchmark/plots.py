"""The plots of a bench, each as SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_vl.reports.plots import STYLES, drawn, figure_of, svg_of

if TYPE_CHECKING:
    from mergekit_vl.benchmark.records import BenchTable


def pareto(shown: BenchTable) -> str:
    """The headline against what a row costs to make, and against what a sample costs at inference; the frontier is drawn."""
    figure, axes = figure_of(1, 2, 6.2, 4.6)
    rows = shown.rows
    costs = (
        ("seconds", "seconds to make, images being encoded (one cell)", True),
        ("ms_per_sample", "ms a sample at inference (towers and heads)", False),
    )
    for axis, (key, what, logarithmic) in zip(axes[0], costs):
        costs_of = [vars(r.summary)[key] for r in rows]
        xs = [max(cost, 1e-3) if logarithmic else cost for cost in costs_of]
        ys = [r.score for r in rows]
        for r, x, y in zip(rows, xs, ys):
            colour, marker = STYLES[r.summary.kind]
            axis.scatter(x, y, color=colour, marker=marker, s=34, zorder=3)
        best = _frontier([float(f"{x:.2g}") for x in xs], ys)  # what differs by noise costs the same
        axis.plot([xs[i] for i in best], [ys[i] for i in best], color="#2f78c4", lw=1, ls="--", zorder=1)
        for i in dict.fromkeys([*best, 0, *(i for i, r in enumerate(rows) if r.summary.kind == "tuned")][:12]):
            axis.annotate(drawn(rows[i].label), (xs[i], ys[i]), xytext=(4, 5), textcoords="offset points", fontsize=8)
        if logarithmic:
            axis.set_xscale("log")
        elif max(xs) < 1.5 * min(xs):  # one tower for all: do not blow up noise
            axis.set_xlim(0, 1.6 * max(xs))
        axis.margins(x=0.12, y=0.08)
        axis.set(xlabel=what, ylabel=f"{drawn(shown.measured.headline)} (%)")
    axes[0][0].set_title("What a row costs to make")
    axes[0][1].set_title("What it costs to use")
    return svg_of(figure)


def _frontier(xs: Sequence[float], ys: Sequence[float]) -> list[int]:
    """Rows that no cheaper row equals."""
    out, best = [], -math.inf
    for i in sorted(range(len(xs)), key=lambda i: (xs[i], -ys[i])):
        if ys[i] > best:
            out.append(i)
            best = ys[i]
    return out


def by_dataset(shown: BenchTable, means: dict[str, list[float]]) -> str:
    """One panel a dataset: the headline of every row, mean over seeds; zero-shot and the tuned model as lines."""
    rows = sorted(range(len(shown.rows)), key=lambda i: shown.rows[i].score)
    names = list(means)
    columns = min(4, len(names))
    height = 0.6 + 0.17 * len(rows)
    figure, axes = figure_of(math.ceil(len(names) / columns), columns, 3.1, height)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for number, (axis, name) in enumerate(zip(axes.flat, names)):
        values = [means[name][i] for i in rows]
        colours = [STYLES[shown.rows[i].summary.kind][0] for i in rows]
        axis.scatter(values, range(len(rows)), c=colours, s=18, zorder=3)
        for i, row in enumerate(shown.rows):
            if row.summary.kind in ("zero-shot", "tuned"):
                axis.axvline(means[name][i], color=STYLES[row.summary.kind][0], lw=0.8, ls=":", zorder=1)
        middle, half = (min(values) + max(values)) / 2, (max(values) - min(values)) / 2
        axis.set_xlim(
            middle - 1.1 * max(half, 3), middle + 1.1 * max(half, 3)
        )  # no panel blows up a point of difference
        labels = [drawn(shown.rows[i].label) for i in rows] if number % columns == 0 else [""] * len(rows)
        axis.set_yticks(range(len(rows)), labels, fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(axis="y", color="#eeeeee", lw=0.6)
        axis.set_title(drawn(name), fontsize=9)
    return svg_of(figure)


def over_shots(tables: Sequence[BenchTable]) -> str:
    """The headline by number of shots, a line a row."""
    figure, axes = figure_of(1, 1, 9, 4.8)
    axis = axes[0][0]
    last = {row.label: row for row in tables[-1].rows}
    best = sorted(last, key=lambda name: -last[name].score)[:4]
    for name in last:
        found = [(t.shots, r.score) for t in tables for r in t.rows if name in (r.label, *r.equal)]
        bold = name in best or last[name].summary.kind in ("zero-shot", "tuned")
        colour = STYLES[last[name].summary.kind][0] if bold else "#cccccc"
        axis.plot(*zip(*found), "-o", ms=3, lw=1.6 if bold else 0.8, color=colour, zorder=3 if bold else 1)
        if bold:
            axis.annotate(drawn(name), found[-1], xytext=(6, 0), textcoords="offset points", fontsize=8, va="center")
    axis.set_xscale("log", base=2)
    axis.set_xticks([t.shots for t in tables], [str(t.shots) for t in tables])
    axis.margins(x=0.15)
    axis.set(xlabel="shots a class", ylabel=f"{drawn(tables[0].measured.headline)} (%)")
    return svg_of(figure)
