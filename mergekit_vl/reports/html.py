"""The HTML page of a report, with its plots inside it: it needs nothing beside itself."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_vl.models import choices
from mergekit_vl.printable import in_html, shown
from mergekit_vl.reports.intervals import LEAST, NO_INTERVAL

if TYPE_CHECKING:
    from mergekit_vl.reports.results import CellResult, Difference, MeanPoint, Report, SummaryRow


def plot(report: Report) -> tuple[str, bytes]:
    """What each row gains and keeps, and the path zero-shot, merged, fine-tuned; as SVG and PNG."""
    panels = [_plane, _path] if report.path else [_plane]
    figure, axes = figure_of(1, len(panels), 6, 4.8)
    for panel, axis in zip(panels, axes[0]):
        panel(axis, report)
    png = io.BytesIO()
    _draw(figure, png, format="png", dpi=110, metadata={"Software": None})
    return svg_of(figure), png.getvalue()


DRAWN = 40
"""Characters of a label in a plot."""


def figure_of(rows: int, columns: int, width: float, height: float):
    """A figure with its axes; width and height are those of a panel, in inches."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "mergekit-vl"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg_of(figure) -> str:
    """The figure as SVG to stand in a page, the same bytes every time; it is closed."""
    import matplotlib.pyplot as plt

    out = io.StringIO()
    _draw(figure, out, format="svg", metadata={"Date": None})
    plt.close(figure)
    return out.getvalue()[out.getvalue().index("<svg") :]


def _draw(figure, out: io.StringIO | io.BytesIO, **how: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the tables have the whole label
        figure.savefig(out, **how)


def drawn(text: str) -> str:
    """A label in a plot: no formula, and no longer than there is room for."""
    text = shown(text, DRAWN).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # which a legend would leave out


STYLES = {
    "zero-shot": ("#555555", "s"),
    "tuned": ("#d9534f", "o"),
    "control": ("#e69f00", "v"),
    "merged": ("#2f78c4", "D"),
}


def columns_of(report: Report) -> list[str]:
    return list(report.metric.columns)


def _at(entry: SummaryRow | MeanPoint, column: str) -> float:
    return entry.columns[column].acc1


def _plane(axis, report: Report) -> None:
    """The first column against the last, with lines of equal headline; one bar a row where there are not two columns."""
    columns = columns_of(report)
    if len(columns) != 2:
        return _bars(axis, report)
    rows = report.summary
    first, last = columns
    bases, novels = ([_at(r, k) for r in rows] for k in columns)
    xs = [min(bases) - 3, max(bases) + 5]
    ys = [min(novels) - 3, max(novels) + 3]
    grid = np.meshgrid(np.linspace(*xs, 80), np.linspace(*ys, 80))
    levels = report.metric.score(grid)
    lines = axis.contour(*grid, levels, levels=8, colors="#d5d5d5", linewidths=0.8)
    axis.clabel(lines, fmt="HM %.0f" if report.metric.harmonic else "mean %.0f", fontsize=7)
    for segment, colour in (
        ("zero-shot -> tuned", "#aaaaaa"),
        ("zero-shot -> merged", "#2f78c4"),
        ("merged -> tuned", "#2f78c4"),
    ):
        points = _leg(report, segment)
        axis.plot([_at(p, first) for p in points], [_at(p, last) for p in points], "-", color=colour, lw=1.2, zorder=1)
    placed: list[tuple[float, float]] = []
    for r in sorted(rows, key=lambda r: r.row != report.main):
        colour, marker = STYLES[r.kind]
        big = r.row == report.main
        axis.scatter(
            _at(r, first), _at(r, last), c=colour, marker=marker, s=90 if big else 40, zorder=3,
            edgecolors="black" if big else "none",
        )  # fmt: skip
        # a label that would cover an earlier one moves down
        x, y = (_at(r, first) - xs[0]) / (xs[1] - xs[0]), (_at(r, last) - ys[0]) / (ys[1] - ys[0])
        while any(abs(x - a) < 0.22 and abs(y - b) < 0.035 for a, b in placed):
            y -= 0.036
        placed.append((x, y))
        axis.annotate(
            drawn(r.row), (_at(r, first), _at(r, last)), xytext=(x + 0.013, y + 0.01), textcoords="axes fraction",
            fontsize=8, weight="bold" if big else "normal",
        )  # fmt: skip
    axis.set(xlim=xs, ylim=ys, xlabel=f"{drawn(first)} accuracy (%)", ylabel=f"{drawn(last)} accuracy (%)")
    axis.set_title("What each method gains (right) and keeps (up)")


def _bars(axis, report: Report) -> None:
    rows = report.summary[::-1]
    scores = [r.score for r in rows]
    axis.barh(range(len(rows)), scores, color=[STYLES[r.kind][0] for r in rows], height=0.6)
    axis.set_yticks(range(len(rows)), [drawn(r.row) for r in rows])
    if len(columns_of(report)) == 1:
        spans = [next(iter(r.columns.values())).interval for r in rows]
        known = [i for i, span in enumerate(spans) if span is not None]
        errors = [[abs(spans[i][end] - scores[i]) for i in known] for end in (0, 1)]
        axis.errorbar([scores[i] for i in known], known, xerr=errors, fmt="none", ecolor="#333333", lw=1)
    for y, score in enumerate(scores):
        axis.text(score + 1, y + 0.32, f"{score:.1f}", va="center", fontsize=8)
    axis.set(xlabel=f"{drawn(report.metric.headline)} (%)", xlim=(0, 105))
    spans = [column.interval for r in rows for column in r.columns.values()]
    axis.set_title("Each row" + (" with its 95% interval" if len(columns_of(report)) == 1 and all(spans) else ""))


COLOURS = ("#d9534f", "#2f78c4", "#2a9d6f", "#8e5bb5", "#e69f00", "#555555")


def _path(axis, report: Report) -> None:
    for test, colour in zip(columns_of(report), COLOURS):
        through = [(p.alpha, _at(p, test)) for p in _leg(report, "zero-shot -> merged")]
        through += [(1 + p.alpha, _at(p, test)) for p in _leg(report, "merged -> tuned")]
        if through:
            axis.plot(*zip(*through), "-o", ms=3, color=colour, label=f"{drawn(test)}, by way of {drawn(report.main)}")
        line = _leg(report, "zero-shot -> tuned")
        if not line:
            continue
        x, y = [2 * p.alpha for p in line], [_at(p, test) for p in line]
        axis.plot(x, y, "--", lw=1, color=colour, alpha=0.7, label=f"{drawn(test)}, straight (WiSE-FT)")
        if not through and all(p.columns[test].interval for p in line):
            low, high = zip(*(p.columns[test].interval for p in line))
            axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    middle = f"{drawn(report.main)} / halfway" if _leg(report, "merged -> tuned") else "halfway"
    axis.set_xticks([0, 1, 2], [drawn(report.base), middle, drawn(report.anchor)])
    axis.set(ylabel="accuracy (%)", title=f"The path {drawn(report.base)} → fine-tuned")
    axis.legend(fontsize=8, frameon=False)


SPACES = ("classifiers", "heads", "towers", "own", "contexts")
"""What the path is drawn in: the first of these that it has."""


def _leg(report: Report, segment: str, space: str | None = None) -> list[MeanPoint]:
    spaces = {p.space for p in report.path}
    space = space or next((s for s in SPACES if s in spaces), "")
    return [p for p in report.path if p.leg == segment and p.space == space]


def html(report: Report, svg: str, gain: str) -> str:
    cells = report.cells
    tasks = list(dict.fromkeys(c.dataset for c in cells))
    seeds = list(dict.fromkeys(c.seed for c in cells))
    counts = ", ".join(f"{k} {v}" for k, v in cells[0].counts.items())
    where = f"{tasks[0] if len(tasks) == 1 else f'{len(tasks)} tasks'}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    if len(tasks) == 1:
        interval = "Intervals: 95%, with the images of one seed (Wilson's; of a mean of tests the normal one)."
    else:
        interval = "Intervals: 95%, bootstrap over tasks." if len(tasks) >= LEAST else f"{NO_INTERVAL.capitalize()}."
    parts = [
        f"<h1>{in_html(report.recipe)}</h1>",
        f"<p class=lead>{in_html(gain)}.</p>",
        f"<p>{in_html(report.protocol)} on {in_html(where)}; {in_html(report.note + '; ' if report.note else '')}images"
        f"{' of the first cell' if len(cells) > 1 else ''}: {in_html(counts)}. {in_html(report.selection)}.</p>",
        f"<figure>{svg}</figure>",
        "<h2>Accuracy</h2>",
        f"<p>Percent, n = {sizes(report)} images. {_headline(report)} {interval}</p>",
        _accuracy(report.summary, report),
        _chosen(report),
        "<h2>Differences</h2>",
        f"<p>{_paired(report.differences)}</p>",
        _differences(report.differences, report),
        _forgetting(report),
        "<h2>Beyond top-1</h2>",
        _more(report.summary, report.main),
        _coefficients(report),
        "<h2>Cost</h2>",
        "<p>What a model adds to its backbone. An ensemble runs a head for each member.</p>",
        _cost(report.summary, report.main),
        _by_task(cells, tasks, report),
        _by_test(cells, report),
        "<h2>Repeat it</h2>",
        f"<pre>mergekit-vl run recipe.yaml</pre><p>{in_html(', '.join(f'{k} {v}' for k, v in report.environment.items()))};"
        f" {report.seconds:.0f} s.</p>",
    ]
    return document(report.recipe, "".join(parts))


def document(title: str, body: str, style: str = "", script: str = "") -> str:
    """A page that needs nothing beside itself; `body` is HTML."""
    head = f'<meta charset="utf-8"><title>{in_html(title)}</title><style>{STYLE}{style}</style>'
    script = f"<script>{script}</script>" if script else ""
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}{script}</body></html>\n'


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
    head = "".join(f"<th>{in_html(h)}</th>" for h in header)
    body = "".join(
        f"<tr{' class=main' if row[0] == in_html(strong) else ''}>{''.join(f'<td>{c}</td>' for c in row)}</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _range(interval: Sequence[float | None] | None, form: str = ".1f") -> str:
    if interval is None or None in interval:
        return ""
    low, high = interval
    return f"<span class=range>{low:{form}} to {high:{form}}</span>"


def sizes(report: Report) -> str:
    """Test images by column."""
    return ", ".join(f"{c.n} {name}" for name, c in report.summary[0].columns.items())


def _headline(report: Report) -> str:
    metric = report.metric
    if metric.harmonic:
        return "HM is the harmonic mean of the averages (the field's)."
    parts = [f"{c} is the mean of {', '.join(tests)}." for c, tests in metric.columns.items() if len(tests) > 1]
    if metric.normalised:
        parts.append("Normalised: each accuracy divided by that of the task's own tuned model, averaged.")
    return in_html(" ".join(parts))


def _accuracy(rows: Sequence[SummaryRow], report: Report) -> str:
    metric = report.metric
    several = len(metric.columns) > 1
    heads = ["row", *(x for name in metric.columns for x in (name, "95%"))]
    heads += [metric.headline] * several + ["mean of HMs"] * metric.harmonic + ["normalised"] * metric.normalised
    chosen = any(r.chosen for r in rows)
    heads += ["chosen"] * chosen
    body = []
    for r in rows:
        cells = [in_html(r.row)]
        for column in r.columns.values():
            cells += [f"{column.acc1:.1f}", _range(column.interval)]
        cells += [f"{r.score:.1f}"] * several + [f"{r.mean_of_scores:.1f}"] * metric.harmonic
        cells += [f"{r.normalised or 0:.1f}"] * metric.normalised
        body.append(cells + [in_html(choices.told(r.chosen, most=choices.SHOWN))] * chosen)
    return _table(heads, body, report.main)


def _chosen(report: Report) -> str:
    """Every choice with its values in the cells; the table has the most frequent ones."""
    rows = [
        [
            in_html(r.row),
            in_html(what),
            in_html(choices.SPLITS[values[0].split]),
            in_html(choices.told({"": values})),
        ]
        for r in report.summary
        for what, values in r.chosen.items()
    ]
    return f"<h2>What was chosen</h2>{_table(['row', 'what', 'on', 'value'], rows, report.main)}" if rows else ""


def _differences(rows: Sequence[Difference], report: Report) -> str:
    return _table(
        [f"{report.main} minus", f"{report.metric.headline}, points", "95%", "verdict"],
        [[in_html(d.minus), f"{d.mean:+.2f}", _range([d.low, d.high], "+.2f"), d.verdict] for d in rows],
    )


def _paired(rows: Sequence[Difference]) -> str:
    if rows[0].low is None:
        return f"Paired, mean over {rows[0].over}; {NO_INTERVAL}."
    return f"Paired, with a bootstrap over {rows[0].over}; “above” and “below” only where the interval excludes 0."


def _forgetting(report: Report) -> str:
    part = report.forgetting
    if part.summary is None or part.differences is None:
        return ""
    return (
        f"<h2>Where {in_html(report.anchor)} forgets</h2><p>The tasks whose novel accuracy it lowers by 4 points or more: "
        f"{in_html(', '.join(part.tasks))}. They are picked by {in_html(report.anchor)}'s own result on test, which "
        f"flatters every other row against it. {_paired(part.differences)}</p>"
        + _accuracy(part.summary, report)
        + _differences(part.differences, report)
    )


def _more(rows: Sequence[SummaryRow], main: str) -> str:
    columns = list(rows[0].columns)
    kinds = [(t, k, w) for k, w in (("acc5", "top-5"), ("mean_per_class_recall", "mean per class"), ("nll", "NLL"), ("ece", "ECE")) for t in columns]  # fmt: skip
    percent = ("acc5", "mean_per_class_recall")
    body = []
    for r in rows:
        values = [(vars(r.columns[t])[k], k in percent) for t, k, _ in kinds]
        body.append([in_html(r.row), *(f"{100 * v:.1f}" if percent else f"{v:.3f}" for v, percent in values)])
    return _table(["row", *(f"{t} {w}" for t, _, w in kinds)], body, main)


def _coefficients(report: Report) -> str:
    spaces = [s for s in SPACES if _leg(report, "zero-shot -> tuned", s)]
    if not spaces:
        return ""
    lines = zip(*(_leg(report, "zero-shot -> tuned", s) for s in spaces))
    columns = columns_of(report)
    table = _table(
        ["coefficient", *(x for s in spaces for t in columns for x in (f"{s}: {t}", "95%"))],
        [
            [
                f"{ps[0].alpha:.1f}",
                *(x for p in ps for t in columns for x in (f"{_at(p, t):.1f}", _range(p.columns[t].interval))),
            ]
            for ps in lines
        ],
    )
    return (
        f"<h2>Coefficients</h2><p>The straight line from {in_html(report.base)} (0) to {in_html(report.anchor)} (1), "
        f"merged as {in_html(' and as '.join(spaces))} (WiSE-FT). Reading the best coefficient off this table is a choice made "
        "on test.</p>" + table
    )


def _cost(rows: Sequence[SummaryRow], main: str) -> str:
    return _table(
        ["row", "parameters", "heads a sample", "seconds to make", "ms a sample, features to logits"],
        [
            [
                in_html(r.row),
                f"{r.parameters}",
                f"{r.forwards}",
                f"{r.seconds:.1f}",
                f"{r.ms_per_sample:.4f}",
            ]
            for r in rows
        ],
        main,
    )


def _by_task(cells: Sequence[CellResult], tasks: list[str], report: Report) -> str:
    if len(tasks) == 1:
        return ""
    names = [r.row for r in cells[0].rows]
    mean = lambda task, i: 100 * np.mean([c.rows[i].score for c in cells if c.dataset == task])  # noqa: E731
    rows = [[in_html(t), *(f"{mean(t, i):.1f}" for i in range(len(names)))] for t in tasks]
    return f"<h2>{in_html(report.metric.headline)} by task</h2>" + _table(["task", *names], rows)


def _by_test(cells: Sequence[CellResult], report: Report) -> str:
    """Every test of its own, where a column is the mean of several."""
    if all(len(tests) == 1 for tests in report.metric.columns.values()):
        return ""
    tests = list(cells[0].rows[0].tests)
    inside = [c for c in cells if list(c.rows[0].tests) == tests]
    rows = []
    for i, row in enumerate(cells[0].rows):
        means = [100 * np.mean([c.rows[i].tests[test].acc1 for c in inside]) for test in tests]
        rows.append([in_html(row.row), *(f"{m:.1f}" for m in means)])
    return "<h2>Every test</h2>" + _table(["row", *tests], rows, report.main)
