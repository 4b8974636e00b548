"""Lines, barriers and the plane between models as a section of a page, with its plots inside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mergekit_vl.reports.plots import COLOURS, drawn, figure_of, svg_of
from mergekit_vl.reports.render import html, markup, page
from mergekit_vl.reports.table import Cell, Column, Table, TableRow

if TYPE_CHECKING:
    from markupsafe import Markup

    from mergekit_vl.reports.landscape_results import MeanLandscape, Plane
    from mergekit_vl.reports.results import LinePoint


def section(found: MeanLandscape, base: str, tuned_row: str) -> Markup:
    """Lines, barriers and the plane, for a page."""
    plane = found.plane
    return page(
        "landscape.html",
        landscape=found,
        base=base,
        tuned_row=tuned_row,
        lines=markup(lines(found, base, tuned_row)),
        barriers=html(barriers(found, base, tuned_row)),
        plane=markup(plane_plot(plane, base, found.row, tuned_row)) if plane is not None else "",
    )


def document(title: str, found: MeanLandscape, base: str, tuned_row: str) -> str:
    """A page of its own."""
    return page("landscape_document.html", title=title, section=section(found, base, tuned_row))


def barriers(found: MeanLandscape, base: str, tuned_row: str) -> Table:
    """How high loss rises and how deep accuracy falls on each segment, a segment a row."""
    tests = list(found.barriers[0].tests)
    columns = [Column(f"{test}, nats", ".3f") for test in tests] + [Column(f"{test}, points", ".1f") for test in tests]
    rows = []
    for barrier in found.barriers:
        heights = [barrier.tests[test]["nll"] for test in tests]
        heights += [100 * barrier.tests[test]["acc1"] for test in tests]
        label = f"{barrier.space}: {segment_name(barrier.segment, base, found.row, tuned_row)}"
        rows.append(TableRow(label, tuple(map(Cell, heights))))
    title = "barriers: loss in nats, and points of accuracy"
    return Table(tuple(columns), tuple(rows), title=title, corner="line")


def segment_name(segment: str, base: str, row: str, tuned_row: str) -> str:
    """ "zero-shot -> merged" with the rows' own labels."""
    own = {"zero-shot": base, "merged": row, "tuned": tuned_row}
    return " -> ".join(own[end] for end in segment.split(" -> "))


def lines(found: MeanLandscape, base: str, tuned_row: str) -> str:
    """Loss and accuracy along zero-shot, merged, tuned, and along the straight line; a row of panels a space."""
    spaces = list(dict.fromkeys(p.space for p in found.points))
    figure, axes = figure_of(len(spaces), 2, 6.2, 3.6)
    for line, space in zip(axes, spaces):
        points = [p for p in found.points if p.space == space]
        for axis, key, what in zip(line, ("nll", "acc1"), ("loss (nats)", "accuracy (%)")):
            for test, colour in zip(points[0].tests, COLOURS):
                factor = 100 if key == "acc1" else 1
                through = _along(points, "zero-shot -> merged", 0, 1) + _along(points, "merged -> tuned", 1, 1)
                if through:
                    ys = [factor * p.tests[test][key] for _, p in through]
                    axis.plot(
                        [x for x, _ in through],
                        ys,
                        color=colour,
                        lw=1.8,
                        label=f"{drawn(test)}, through {drawn(found.row)}",
                    )
                straight = _along(points, "zero-shot -> tuned", 0, 2)
                ys = [factor * p.tests[test][key] for _, p in straight]
                axis.plot([x for x, _ in straight], ys, color=colour, ls="--", lw=1, label=f"{drawn(test)}, straight")
            axis.set_xticks([0, 1, 2], [drawn(base), f"{drawn(found.row)} / halfway", drawn(tuned_row)])
            axis.set_ylabel(what)
            axis.set_title(f"between {space}", fontsize=10)
        line[0].legend(fontsize=7, frameon=False)
    return svg_of(figure)


def _along(points: Sequence[LinePoint], segment: str, start: float, length: float) -> list[tuple[float, LinePoint]]:
    return [(start + length * p.alpha, p) for p in points if p.segment == segment]


def plane_plot(plane: Plane, base: str, row: str, tuned_row: str) -> str:
    """Loss on the plane through the three models, a panel a test; places are true to the distances."""
    tests = list(plane.tests)
    figure, axes = figure_of(1, len(tests), 5.6, 4.4)
    x, y = np.meshgrid(plane.xs, plane.ys, indexing="ij")
    for axis, test in zip(axes[0], tests):
        losses = np.array(plane.tests[test]["nll"])
        low = float(losses.min())
        levels = low + (np.quantile(losses, 0.9) - low) * np.linspace(0, 1, 14) ** 1.5 + 1e-9 * np.arange(14)
        filled = axis.contourf(x, y, losses, levels=levels, cmap="Blues_r", extend="max")
        figure.colorbar(filled, ax=axis, label="loss (nats)", format="%.2f")
        for name, corner, colour in (
            (base, "zero-shot", "#555555"),
            (row, "merged", "#2f78c4"),
            (tuned_row, "tuned", "#d9534f"),
        ):
            cx, cy = plane.corners[corner]
            axis.scatter(cx, cy, color=colour, edgecolors="white", s=55, zorder=3)
            axis.annotate(drawn(name), (cx, cy), xytext=(5, 6), textcoords="offset points", fontsize=8, weight="bold")
        axis.set_title(drawn(test), fontsize=10)
        axis.set_aspect("equal")
        axis.set_xlabel(f"distance, {drawn(base)} to {drawn(tuned_row)} = 1")
    return svg_of(figure)
