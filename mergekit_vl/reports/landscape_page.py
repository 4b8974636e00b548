"""Lines, barriers and the plane between models as a section of a page, with its plots inside it."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_vl.printable import in_html
from mergekit_vl.reports.html import COLOURS, drawn, figure_of, svg_of


def section(path: dict[str, Any], base: str, anchor: str) -> str:
    """Lines, barriers and the plane. `path` holds `row` (the merged model's), `cells` (their number), and what `landscape` makes of them."""
    tests = list(path["barriers"][0]["tests"])
    rows = []
    for segment in path["barriers"]:
        name = leg_name(segment["leg"], base, path["row"], anchor)
        own = [f"{segment['tests'][t]['nll']:.3f}" for t in tests] + [
            f"{100 * segment['tests'][t]['acc1']:.1f}" for t in tests
        ]
        rows.append(
            f"<tr><td>{in_html(segment['space'])}: {in_html(name)}</td>{''.join(f'<td>{v}</td>' for v in own)}</tr>"
        )
    heads = ["line", *(f"{t}, nats" for t in tests), *(f"{t}, points" for t in tests)]
    head = "".join(f"<th>{in_html(h)}</th>" for h in heads)
    text = (
        f"<h2>The path</h2><p>Loss and accuracy on the tests along straight lines, mean of {path['cells']} cells: from {in_html(base)} to "
        f"{in_html(anchor)} directly, and by way of {in_html(path['row'])}. Reading a best point off these lines is a choice made on test.</p>"
        f"<figure>{lines(path, base, anchor)}</figure><h3>Barriers</h3><p>How far the loss rises above the straight line between a leg's "
        f"ends (Entezari et al. 2022), and how far accuracy falls below it; before {in_html(path['row'])} it is the direct line, after it the two "
        f"legs.</p><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )
    plane = path["plane"]
    if plane:
        text += (
            f"<h3>The plane through the three</h3><p>{in_html(path['plane_of'])}, between {in_html(plane['space'])}.</p>"
            f"<figure>{plane_plot(plane, base, path['row'], anchor)}</figure>"
        )
    return text


def leg_name(segment: str, base: str, row: str, anchor: str) -> str:
    """ "zero-shot -> merged" with the rows' own labels."""
    own = {"zero-shot": base, "merged": row, "tuned": anchor}
    return " -> ".join(own[end] for end in segment.split(" -> "))


def lines(path: dict[str, Any], base: str, anchor: str) -> str:
    """Loss and accuracy along zero-shot, merged, tuned, and along the straight line; a row of panels a space."""
    spaces = list(dict.fromkeys(p["space"] for p in path["points"]))
    figure, axes = figure_of(len(spaces), 2, 6.2, 3.6)
    for line, space in zip(axes, spaces):
        points = [p for p in path["points"] if p["space"] == space]
        for axis, key, what in zip(line, ("nll", "acc1"), ("loss (nats)", "accuracy (%)")):
            for test, colour in zip(points[0]["tests"], COLOURS):
                factor = 100 if key == "acc1" else 1
                through = _along(points, "zero-shot -> merged", 0, 1) + _along(points, "merged -> tuned", 1, 1)
                if through:
                    ys = [factor * p["tests"][test][key] for _, p in through]
                    axis.plot(
                        [x for x, _ in through],
                        ys,
                        color=colour,
                        lw=1.8,
                        label=f"{drawn(test)}, by way of {drawn(path['row'])}",
                    )
                straight = _along(points, "zero-shot -> tuned", 0, 2)
                ys = [factor * p["tests"][test][key] for _, p in straight]
                axis.plot([x for x, _ in straight], ys, color=colour, ls="--", lw=1, label=f"{drawn(test)}, straight")
            axis.set_xticks([0, 1, 2], [drawn(base), f"{drawn(path['row'])} / halfway", drawn(anchor)])
            axis.set_ylabel(what)
            axis.set_title(f"between {space}", fontsize=10)
        line[0].legend(fontsize=7, frameon=False)
    return svg_of(figure)


def _along(
    points: list[dict[str, Any]], segment: str, start: float, length: float
) -> list[tuple[float, dict[str, Any]]]:
    return [(start + length * p["alpha"], p) for p in points if p["leg"] == segment]


def plane_plot(plane: dict[str, Any], base: str, row: str, anchor: str) -> str:
    """Loss on the plane through the three models, a panel a test; places are true to the distances."""
    tests = list(plane["tests"])
    figure, axes = figure_of(1, len(tests), 5.6, 4.4)
    x, y = np.meshgrid(plane["xs"], plane["ys"], indexing="ij")
    for axis, test in zip(axes[0], tests):
        losses = np.array(plane["tests"][test]["nll"])
        low = float(losses.min())
        levels = low + (np.quantile(losses, 0.9) - low) * np.linspace(0, 1, 14) ** 1.5 + 1e-9 * np.arange(14)
        filled = axis.contourf(x, y, losses, levels=levels, cmap="Blues_r", extend="max")
        figure.colorbar(filled, ax=axis, label="loss (nats)", format="%.2f")
        for name, corner, colour in (
            (base, "zero-shot", "#555555"),
            (row, "merged", "#2f78c4"),
            (anchor, "tuned", "#d9534f"),
        ):
            cx, cy = plane["corners"][corner]
            axis.scatter(cx, cy, color=colour, edgecolors="white", s=55, zorder=3)
            axis.annotate(drawn(name), (cx, cy), xytext=(5, 6), textcoords="offset points", fontsize=8, weight="bold")
        axis.set_title(drawn(test), fontsize=10)
        axis.set_aspect("equal")
        axis.set_xlabel(f"distance, {drawn(base)} to {drawn(anchor)} = 1")
    return svg_of(figure)
