"""The HTML page of a run, with its plots inside it: it needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_vl.reports import changes
from mergekit_vl.reports import comparison as tables
from mergekit_vl.reports.comparison import comparison
from mergekit_vl.reports.intervals import LEAST
from mergekit_vl.reports.plots import SPACES, along
from mergekit_vl.reports.render import html as rendered
from mergekit_vl.reports.render import markup, page

if TYPE_CHECKING:
    from markupsafe import Markup

    from mergekit_vl.protocols.base import Metric
    from mergekit_vl.reports.results import Difference, Report

NORMALISED = "Normalised: each accuracy divided by that of the task's own tuned model, averaged."


def html(report: Report, svg: str, gain: str) -> str:
    cells, part = report.cells, report.forgetting
    tasks = list(dict.fromkeys(cell.dataset for cell in cells))
    seeds = list(dict.fromkeys(cell.seed for cell in cells))
    where = f"{tasks[0] if len(tasks) == 1 else f'{len(tasks)} tasks'}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    if len(tasks) == 1:
        interval = "Intervals: 95%, with the images of one seed (Wilson's; of a mean of tests the normal one)."
    else:
        interval = "Intervals: 95%, bootstrap over tasks." if len(tasks) >= LEAST else ""
    lines = {space: points for space in SPACES if (points := along(report, "zero-shot -> tuned", space))}
    return page(
        "run.html",
        title=report.recipe,
        report=report,
        gain=gain,
        where=where,
        counts=", ".join(f"{name} {n}" for name, n in cells[0].counts.items()),
        plot=markup(svg),
        headline=metric_told(report.metric),
        interval=interval,
        paired=paired(report.main, report.differences),
        forgetting=_forgetting(report),
        forgetting_paired=paired(report.main, part.differences) if part.differences else "",
        coefficients=rendered(tables.coefficients(lines, list(report.metric.columns))) if lines else "",
        spaces=list(lines),
        environment=", ".join(f"{name} {value}" for name, value in report.environment.items()),
        tables=tables,
        changes=changes,
        changed=changes.changed(report),
        sortable=True,
        comparison=comparison,
        html=rendered,
    )


def _forgetting(report: Report) -> Markup | str:
    """The comparison over the tasks where the tuned model forgets; nothing where there are too few."""
    part = report.forgetting
    if part.summary is None or part.differences is None:
        return ""
    return rendered(comparison(report, part.summary, part.differences))


def metric_told(metric: Metric) -> str:
    """What the columns and the headline of a protocol are, in sentences."""
    parts = ["HM is the harmonic mean of the averages, as is customary."] if metric.harmonic else []
    parts += [f"{name} is the mean of {', '.join(tests)}." for name, tests in metric.columns.items() if len(tests) > 1]
    return " ".join([*parts, *[NORMALISED] * metric.normalised])


def paired(main: str, rows: Sequence[Difference]) -> str:
    """How the differences of the table are taken."""
    if rows[0].low is None:
        return f"Differences are {main} minus the row, paired, in points: the mean over {rows[0].over}."
    return f"Differences are {main} minus the row, paired, in points, with a bootstrap over {rows[0].over}."
