"""The plots of a run, as SVG and PNG, and what all plots share."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_vl.printable import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mergekit_vl.models.choices import Tried
    from mergekit_vl.reports.results import MeanPoint, Report, SummaryRow


def plot(report: Report) -> tuple[str, bytes]:
    """What each row gains and keeps, and accuracy on the lines from zero-shot through merged to fine-tuned; as SVG and PNG."""
    panels = [_plane, *[_lines] * bool(report.landscape), *[_tried] * bool(_candidates(report))]
    figure, axes = figure_of(1, len(panels), 6, 4.8)
    for panel, axis in zip(panels, axes[0]):
        panel(axis, report)
    png = io.BytesIO()
    _draw(figure, png, format="png", dpi=110, metadata={"Software": None})
    return svg_of(figure), png.getvalue()


DRAWN = 40
"""Characters of a label in a plot."""


def figure_of(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
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


def svg_of(figure: Figure) -> str:
    """The figure as SVG to stand in a page, the same bytes every time; it is closed."""
    import matplotlib.pyplot as plt

    out = io.StringIO()
    _draw(figure, out, format="svg", metadata={"Date": None})
    plt.close(figure)
    return out.getvalue()[out.getvalue().index("<svg") :]


def _draw(figure: Figure, out: io.StringIO | io.BytesIO, **how: Any) -> None:
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


def _plane(axis: Axes, report: Report) -> None:
    """The first column against the last, with lines of equal headline; one bar a row where there are not two columns."""
    columns = columns_of(report)
    if len(columns) != 2:
        return _bars(axis, report)
    rows = report.summary
    first, last = columns
    bases, novels = ([_at(r, k) for r in rows] for k in columns)
    xs = [min(bases) - 3, max(bases) + 5]
    ys = [min(novels) - 3, max(novels) + 3]
    grid = np.meshgrid(np.linspace(xs[0], xs[1], 80), np.linspace(ys[0], ys[1], 80))
    levels = report.metric.score(grid)
    lines = axis.contour(*grid, levels, levels=8, colors="#d5d5d5", linewidths=0.8)
    axis.clabel(lines, fmt="HM %.0f" if report.metric.harmonic else "mean %.0f", fontsize=7)
    for segment, colour in (
        ("zero-shot -> tuned", "#aaaaaa"),
        ("zero-shot -> merged", "#2f78c4"),
        ("merged -> tuned", "#2f78c4"),
    ):
        points = along(report, segment)
        axis.plot([_at(p, first) for p in points], [_at(p, last) for p in points], "-", color=colour, lw=1.2, zorder=1)
    from matplotlib.patheffects import withStroke

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
            drawn(r.row), (_at(r, first), _at(r, last)), xytext=(x + (-0.02 if x > 0.85 else 0.02), y + 0.01),
            textcoords="axes fraction", ha="right" if x > 0.85 else "left", fontsize=8, zorder=4,
            weight="bold" if big else "normal", path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip
    axis.set(xlim=xs, ylim=ys, xlabel=f"{drawn(first)} accuracy (%)", ylabel=f"{drawn(last)} accuracy (%)")
    axis.set_title("What each method gains (right) and keeps (up)")


def _bars(axis: Axes, report: Report) -> None:
    rows = report.summary[::-1]
    scores = [r.score for r in rows]
    axis.barh(range(len(rows)), scores, color=[STYLES[r.kind][0] for r in rows], height=0.6)
    axis.set_yticks(range(len(rows)), [drawn(r.row) for r in rows])
    if len(columns_of(report)) == 1:
        known = [(i, span) for i, r in enumerate(rows) if (span := next(iter(r.columns.values())).interval) is not None]
        errors = [[abs(span[end] - scores[i]) for i, span in known] for end in (0, 1)]
        places = [i for i, _ in known]
        axis.errorbar([scores[i] for i in places], places, xerr=errors, fmt="none", ecolor="#333333", lw=1)
    for y, score in enumerate(scores):
        axis.text(score + 1, y + 0.32, f"{score:.1f}", va="center", fontsize=8)
    axis.set(xlabel=f"{drawn(report.metric.headline)} (%)", xlim=(0, 105))
    spans = [column.interval for r in rows for column in r.columns.values()]
    axis.set_title("Each row" + (" with its 95% interval" if len(columns_of(report)) == 1 and all(spans) else ""))


COLOURS = ("#d9534f", "#2f78c4", "#2a9d6f", "#8e5bb5", "#e69f00", "#555555")


def _lines(axis: Axes, report: Report) -> None:
    for test, colour in zip(columns_of(report), COLOURS):
        through = [(p.alpha, _at(p, test)) for p in along(report, "zero-shot -> merged")]
        through += [(1 + p.alpha, _at(p, test)) for p in along(report, "merged -> tuned")]
        if through:
            axis.plot(*zip(*through), "-o", ms=3, color=colour, label=f"{drawn(test)}, through {drawn(report.main)}")
        line = along(report, "zero-shot -> tuned")
        if not line:
            continue
        x, y = [2 * p.alpha for p in line], [_at(p, test) for p in line]
        axis.plot(x, y, "--", lw=1, color=colour, alpha=0.7, label=f"{drawn(test)}, straight (WiSE-FT)")
        if not through and all(p.columns[test].interval for p in line):
            low, high = zip(*(p.columns[test].interval for p in line))
            axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    middle = f"{drawn(report.main)} / halfway" if along(report, "merged -> tuned") else "halfway"
    axis.set_xticks([0, 1, 2], [drawn(report.base), middle, drawn(report.tuned_row)])
    axis.set(ylabel="accuracy (%)", title=f"From {drawn(report.base)} to fine-tuned")
    axis.legend(fontsize=8, frameon=False)


def _candidates(report: Report) -> tuple[Tried, ...]:
    """What the main row of the first cell was chosen from."""
    choice = next(row for row in report.cells[0].rows if row.row == report.main).choice
    return choice.tried if choice is not None else ()


def _tried(axis: Axes, report: Report) -> None:
    """Accuracy on validation images along the line of coefficients, with 95% intervals; other candidates beside it."""
    from mergekit_vl.models.evaluate import wilson

    tried, chosen = _candidates(report), next(row for row in report.cells[0].rows if row.row == report.main).choice
    assert chosen is not None
    line = sorted(((p, one) for one in tried if (p := _place(one)) is not None), key=lambda pair: pair[0])
    beside = [one for one in tried if _place(one) is None]
    for side, colour in zip(tried[0].n, COLOURS):
        shares = [one.accuracy[side] for _, one in line]
        spans = [wilson(share * one.n[side], one.n[side]) for share, (_, one) in zip(shares, line)]
        xs = [p for p, _ in line]
        axis.plot(xs, [100 * share for share in shares], "-o", ms=3, color=colour, label=drawn(side))
        low, high = ([100 * span[end] for span in spans] for end in (0, 1))
        axis.fill_between(xs, low, high, color=colour, alpha=0.12, lw=0)
        axis.plot(
            [1.1 + 0.1 * i for i in range(len(beside))],
            [100 * one.accuracy[side] for one in beside],
            "D",
            ms=4,
            color=colour,
        )
    at = [p for p, one in line if one.is_chosen(chosen.values)] + [
        1.1 + 0.1 * i for i, one in enumerate(beside) if one.is_chosen(chosen.values)
    ]
    for x in at:
        axis.axvline(x, color="#333333", lw=1, ls="--", label="chosen")
    ticks = [0, 0.5, 1, *(1.1 + 0.1 * i for i in range(len(beside)))]
    axis.set_xticks(ticks, ["base", "halfway", "tuned", *(drawn(one.label) for one in beside)])
    axis.tick_params(axis="x", labelrotation=60 if len(beside) > 1 else 0, labelsize=8)
    axis.set(ylabel="accuracy on validation images (%)", title="What was tried, on validation images")
    axis.legend(fontsize=8, frameon=False)


def _place(one: Tried) -> float | None:
    """Where a candidate lies on the line from the base (0) to the tuned model (1); None for one beside it."""
    return one.alpha if one.method == "wise_ft" else {"base": 0.0, "tuned": 1.0}.get(one.method)


SPACES = ("classifiers", "heads", "towers", "own", "contexts")
"""What the landscape is drawn in: the first of these that it has."""


def along(report: Report, segment: str, space: str | None = None) -> list[MeanPoint]:
    """The points of a segment, "zero-shot -> merged"; in the first space that the landscape has unless one is given."""
    spaces = {p.space for p in report.landscape}
    space = space or next((s for s in SPACES if s in spaces), "")
    return [p for p in report.landscape if p.segment == segment and p.space == space]
