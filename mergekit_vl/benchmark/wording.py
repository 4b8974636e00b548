"""What a bench says in sentences: on the page, in its README, on the terminal."""

from __future__ import annotations

from typing import Any

from mergekit_vl.models import choices
from mergekit_vl.models.choices import Chosen
from mergekit_vl.reports.intervals import NO_INTERVAL

MOST = 3
"""Reasons that are told of a row."""


def headline(report: dict[str, Any]) -> str:
    """The best row of the last table, and what is shown about it."""
    shown = next((t for t in report["tables"][::-1] if t["rows"]), None)
    if shown is None:
        return "No row is there in every cell."
    best = max(shown["rows"], key=lambda r: r["score"])
    name = " = ".join([best["row"], *best["equal"]])
    text = f"Highest {shown['metric']['headline']}: {name}, {best['score']:.1f}"
    told = []
    for key, other in (("minus_base", report["base"]), ("minus_tuned", shown["anchor"])):
        if d := best[key]:
            verdict = ", not shown" if d["verdict"] == "not shown" else ""
            rest = "" if d["low"] is None else f" ({d['low']:+.1f} to {d['high']:+.1f}{verdict})"
            told.append(f"{d['mean']:+.1f} against {other}{rest}")
    return f"{text}; {', '.join(told)}." if told else f"{text}."


def lead(report: dict[str, Any]) -> str:
    """What was compared, on what, and how options were chosen, in one paragraph."""
    grid, search = report["grid"], report["search"]
    shots = [s for s in grid["shots"] if s is not None]
    cells = sum(shown["n"] for shown in report["tables"])
    note = next((shown["note"] for shown in report["tables"] if shown.get("note")), "")
    how = {
        "none": "No options were chosen: all rows are at their defaults.",
        "validation": "on validation images",
        "held_out": "on classes held out of those that are tuned on",
        "development": "on development datasets",
        "auto": "on classes held out of those that are tuned on"
        if report["protocol"] == "base_to_novel"
        else "on validation images",
    }[search["by"]]
    if search["by"] != "none":
        how = (
            f"Options were chosen cell by cell {how}, never on test, among at most {search['budget']} configurations a strategy"
            f" ({search['training_budget']} where it trains); “default” is the row without that choice."
        )
    first = next((d for shown in report["tables"] for e in shown["rows"] if (d := e["minus_base"])), None)
    paired = "Differences are paired, with 95% intervals from a bootstrap over " + (first["over"] if first else "tasks")
    if first and first["low"] is None:
        paired = f"Differences are paired, means over {first['over']}: {NO_INTERVAL}"
    return (
        f"{len(grid['datasets'])} datasets, seeds {', '.join(map(str, grid['seeds']))}"
        + (f", {', '.join(map(str, shots))} shots" if shots else "")
        + f": {cells} cells{f' ({note})' if note else ''}. {how} {paired}."
        " ± is the standard deviation over seeds; rank is the mean place over cells, rows that are equal to the bit counting once."
    )


def chosen(entry: dict[str, Any], *, most: int | None = None) -> str:
    """What was chosen for a row of the table."""
    return choices.told({what: [Chosen(**v) for v in values] for what, values in entry["chosen"].items()}, most=most)


def span(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    if difference["low"] is None:
        return f"{difference['mean']:+.1f}"
    return f"{difference['mean']:+.1f} ({difference['low']:+.1f} to {difference['high']:+.1f})"


def failed(report: dict[str, Any]) -> bool:
    return bool(report["lost_cells"]) or any(each["status"] == "failed" for each in report["left_out"])


def reasons(report: dict[str, Any]) -> list[str]:
    """One line a reason, with the rows that share it."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for each in report["left_out"]:
        more = len(each["reasons"]) - MOST
        for reason in each["reasons"][:MOST]:
            names = reason["cells"]
            where = "" if len(names) == each["of"] else f" in {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
            text = (
                reason["reason"]
                .removeprefix(f"strategy {each['row']}: ")
                .removeprefix(f"{report['recipe']}: {each['row']}: ")
            )
            word = "failed" if each["status"] == "failed" else "not for these models"
            rows.setdefault((word, where, text), []).append(each["row"])
        if more > 0:
            rows.setdefault(
                (word, f" in {sum(len(r['cells']) for r in each['reasons'][MOST:])} more cells", "see results.csv"), []
            ).append(each["row"])
    lost = [f"- all of {cell['cell']} failed: {cell['reason']}" for cell in report["lost_cells"]]
    return lost + [f"- {', '.join(names)}: {word}{where}: {text}" for (word, where, text), names in rows.items()]
