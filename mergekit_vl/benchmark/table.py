"""The table of a bench as plain data: means, intervals, ranks, costs, what was chosen, and what is left out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_vl.models import choices
from mergekit_vl.reports.intervals import ranks
from mergekit_vl.reports.report import paired, summary
from mergekit_vl.reports.results import CellResult, Row, plain

if TYPE_CHECKING:
    from mergekit_vl.benchmark.grid import Bench
    from mergekit_vl.protocols.base import Metric


def table(bench: Bench, cells: list[dict[str, Any]], shots: int | None) -> dict[str, Any]:
    """Rows that are there in every cell, averaged; rows whose answers are equal to the bit in all of them share one."""
    complete = (
        [] if not cells else [i for i in range(len(bench.entries)) if all(done(cell["rows"][i]) for cell in cells)]
    )
    shown: dict[Any, int] = {}
    equal: dict[int, list[str]] = {}
    for i in complete:
        logits_of = tuple(json.dumps(cell["rows"][i]["digest"], sort_keys=True) for cell in cells)
        own = bench.entries[i].kind in ("zero-shot", "tuned")  # always there, whatever else they are equal to
        first = i if own else shown.setdefault(logits_of, i)
        shown.setdefault(logits_of, i)
        equal.setdefault(first, [])
        if first != i:
            equal[first].append(bench.entries[i].label)
    rows = sorted(equal)
    if not rows:
        return {"shots": shots, "rows": [], "n": 0}
    cells = [{**cell, "rows": [cell["rows"][i] for i in rows], "all": [r for r in cell["rows"] if r]} for cell in cells]
    labels = [bench.entries[i].label for i in rows]
    anchor = next((label for label in labels if label in [e.label for e in bench.entries if e.kind == "tuned"]), None)
    places = np.array([ranks([row["score"] for row in cell["rows"]]) for cell in cells])
    out = []
    results = [CellResult.from_json(cell) for cell in cells]
    for n, (i, entry) in enumerate(zip(rows, map(plain, summary(results)))):
        records = [cell["rows"][n] for cell in cells]
        defaults = [record.get("default", record) for record in records]
        shared: dict[str, Any] = {}
        for label in equal[i]:  # rows that share this one have choices of their own
            others = [next(r for r in cell["all"] if r["row"] == label) for cell in cells]
            found = choices.counted([own_choices(record) for record in others])
            shared |= {f"{label}: {what}": values for what, values in plain(found).items()}
        entry |= {
            "equal": equal[i],
            "chosen": plain(choices.counted([own_choices(record) for record in records])) | shared,
            "strategy": records[0]["strategy"],
            "rank": float(places[:, n].mean()),
            "sd": _sd(cells, [record["score"] for record in records]),
            "minus_base": plain(paired(results, labels[n], labels[0])) if n else None,
            "minus_tuned": plain(paired(results, labels[n], anchor)) if anchor and labels[n] != anchor else None,
            "default": _headline(results[0].metric, defaults)
            if defaults != records and all("score" in d for d in defaults)
            else None,
            "searched": any(record.get("search", {}).get("configurations") for record in records),
            "trains": bool(records[0].get("trains")) or records[0]["kind"] == "tuned",
            **{
                key: _mean(records, key) for key in ("search_seconds", "peak_bytes", "bytes", "towers", "ms_per_sample")
            },
        }
        out.append(entry)
    own = [c for c in cells if c["note"]]
    return {
        "shots": shots,
        "metric": cells[0]["metric"],
        "note": own[0]["note"] if own else "",
        "n": len(cells),
        "counts": cells[0]["counts"],
        "anchor": anchor,
        "rows": out,
    }


def own_choices(record: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """(value, split) by what was chosen for a row in one cell: its options by the bench, the rest by the strategy itself."""
    on = record.get("search", {}).get("on")
    return ({"options": (record["options"], on)} if on else {}) | Row.from_json(record).chosen


def selection_split(cell: dict[str, Any], record: dict[str, Any]) -> str | None:
    """The split that a row of a cell owes something to, be it by its tuned models."""
    own = [split for _, split in own_choices(record).values()]
    own += [record["chosen_on"]] if record.get("learnt") else []
    if record["kind"] in ("merged", "control"):
        tuned = [r for r in cell["rows"] if done(r) and r["kind"] == "tuned"]
        own += [split for r in tuned for _, split in own_choices(r).values()]
    return next((split for split in own if split != "train"), None)


def done(record: dict[str, Any] | None) -> bool:
    return record is not None and record["status"] == "done"


def _mean(records: list[dict[str, Any]], key: str) -> float | None:
    values = [record["cost"].get(key) for record in records]
    return None if None in values else float(np.mean(values))


def _headline(metric: Metric, rows: list[dict[str, Any]]) -> float:
    """The headline of the averages, in percent."""
    means = [
        100 * float(np.mean([metric.column(name, {t: s["acc1"] for t, s in row["tests"].items()}) for row in rows]))
        for name in metric.columns
    ]
    return float(metric.score(means))


def _sd(cells: list[dict[str, Any]], scores: list[float]) -> float | None:
    """The standard deviation over seeds of the headline's mean over tasks, in points."""
    by_seed: dict[int, list[float]] = {}
    for cell, score in zip(cells, scores):
        by_seed.setdefault(cell["seed"], []).append(score)
    means = [100 * float(np.mean(values)) for values in by_seed.values()]
    return float(np.std(means, ddof=1)) if len(means) > 1 else None


def left_out(bench: Bench, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that are not there in every cell, with their reasons and where."""
    out = []
    for i, entry in enumerate(bench.entries):
        records = [(cell["name"], cell["rows"][i]) for cell in cells]
        if all(done(record) for _, record in records):
            continue
        reasons: dict[str, list[str]] = {}
        for name, record in records:
            if not done(record):
                reasons.setdefault(record["reason"] if record else "not made", []).append(name)
        failed = any(record is None or record["status"] == "failed" for _, record in records)
        out.append({
            "row": entry.label,
            "status": "failed" if failed else "inapplicable",
            "reasons": [{"reason": reason, "cells": names} for reason, names in reasons.items()],
            "done": sum(done(record) for _, record in records),
            "of": len(records),
        })  # fmt: skip
    return out


def chosen(bench: Bench, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was chosen for each row: its options by cell with the headline that every configuration had there, and its own choices."""
    out = []
    for i, entry in enumerate(bench.entries):
        records = [(cell["name"], cell["rows"][i]) for cell in cells if done(cell["rows"][i])]
        searched = [(name, r) for name, r in records if r.get("search", {}).get("configurations")]
        own = [(name, r) for name, r in records if r.get("chosen")]
        if searched or own:
            out.append({
                "row": entry.label,
                "how": searched[0][1]["search"]["how"] if searched else "",
                "cells": [
                    {
                        "cell": name,
                        "options": r["options"],
                        "own": r.get("chosen", {}),
                        "configurations": r.get("search", {}).get("configurations"),
                    }
                    for name, r in (searched or own)
                ],
            })  # fmt: skip
    return out
