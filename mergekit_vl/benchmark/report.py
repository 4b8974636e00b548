"""The files of a bench: JSON, CSV, Markdown, the page."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_vl.benchmark import wording
from mergekit_vl.benchmark.table import chosen, done, left_out, selection_split, table
from mergekit_vl.benchmark.wording import lead, reasons, span
from mergekit_vl.experiments import landscape
from mergekit_vl.experiments.cell import read_record, without_makers
from mergekit_vl.models import choices
from mergekit_vl.printable import in_markdown
from mergekit_vl.system.atomic_files import write_json, write_text

if TYPE_CHECKING:
    from mergekit_vl.benchmark.grid import Bench, Key
    from mergekit_vl.benchmark.plan import Entry

NAME = "bench.json"
"""Written last: it marks a bench as done."""


def write(bench: Bench, keys: Sequence[Key], *, seconds: float) -> dict[str, Any]:
    """Write every file of a finished bench and return its report."""
    from mergekit_vl.benchmark import page
    from mergekit_vl.reports.report import environment, to_yaml

    plan = bench.plan
    everything = [_cell(bench, key) for key in keys]
    cells = [
        cell for cell in everything if done(cell["rows"][0])
    ]  # without its base and tuned models a cell has no rows
    report = {
        "recipe": plan.recipe.name,
        "hash": plan.hash,
        "protocol": plan.recipe.protocol.name,
        "base": plan.experiment.base_label,
        "tuned": [entry.label for entry in bench.entries if entry.kind == "tuned"],
        "grid": {
            "datasets": list(dict.fromkeys(cell["dataset"] for cell in everything)),
            "seeds": list(plan.recipe.seeds),
            "shots": list(plan.shots),
        },
        "search": {"budget": plan.search.budget, "training_budget": plan.search.training_budget, "by": plan.search.by},
        "tables": [table(bench, [cell for cell in cells if cell["shots"] == shots], shots) for shots in plan.shots],
        "left_out": left_out(bench, cells),
        "lost_cells": [{"cell": c["name"], "reason": c["rows"][0]["reason"]} for c in everything if c not in cells],
        "chosen": chosen(bench, cells),
        "repeat": {entry.label: command for entry in bench.entries if (command := repeat(bench, entry, cells))},
        "path": path(bench, keys),
        "environment": environment(bench.ready.device),
        "image_ms": bench.image_ms,
        "seconds": seconds,
    }
    write_text(bench.out / "recipe.yaml", to_yaml(plan.recipe.plain))
    write_text(bench.out / "results.csv", results_csv(everything))
    for shown in report["tables"]:
        if not shown["rows"]:
            continue
        name = "table" if len(plan.shots) == 1 else f"table-{shown['shots']}shots"
        write_text(bench.out / f"{name}.csv", table_csv(shown))
    write_text(bench.out / "README.md", markdown(report))
    write_text(bench.out / "report.html", page.html(report, cells))
    write_json(bench.out / NAME, report)
    return report


def load(out: Path) -> dict[str, Any] | None:
    """The report of a finished bench, or None."""
    file = out / NAME
    return json.loads(file.read_text()) if file.exists() else None


def _cell(bench: Bench, key: Key) -> dict[str, Any]:
    facts = json.loads((bench.folder(key) / "facts.json").read_text())
    rows = [row and without_makers(row) for row in bench.records(key)]
    return {**facts, "shots": key.shots, "name": key.name, "rows": rows}


def repeat(bench: Bench, entry: Entry, cells: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The command that makes a row again with `run`: one for all cells where the same options were chosen in them."""
    by_label = {e.label: (i, e) for i, e in enumerate(bench.entries)}
    recipe, several = str(bench.out / "recipe.yaml"), len(bench.plan.shots) > 1
    by_strategy: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        chain, label = [], entry.label
        while (
            label in by_label
            and (one := by_label[label][1]).spec is not None
            and done(cell["rows"][by_label[label][0]])
        ):
            options = cell["rows"][by_label[label][0]]["options"]
            more = {"of": one.spec.of} if one.spec.of is not None else {}
            more |= {"batch_norm": one.spec.batch_norm} if one.spec.batch_norm != "images" else {}
            chain.insert(0, {"name": one.spec.name, "label": label, **more, **options})
            label = one.spec.of
        if chain:
            by_strategy.setdefault(json.dumps(chain), []).append(cell)
    out = []
    for strategy, of in by_strategy.items():
        words = ["mergekit-vl", "run", recipe, *bench.plan.recipe.allowing, f"strategy={strategy}", "controls=false"]
        if len(by_strategy) == 1 and len(of) == len(cells) and not several:
            return [{"cells": "all", "command": shlex.join(words)}]
        for cell in of:
            own = [f"seed={cell['seed']}", *([f"protocol.shots={cell['shots']}"] if several else [])]
            if not bench.plan.experiment.joint:
                own.append(f"dataset={json.dumps(_dataset(bench, cell['dataset']))}")
            out.append({"cells": cell["name"], "command": shlex.join(words + own)})
    return out


def _dataset(bench: Bench, name: str) -> Any:
    """What the recipe says of a dataset, by its name once it is loaded."""
    given = bench.plan.recipe.plain["dataset"]
    given = given if isinstance(given, list) else [given]
    return next(plain for plain, made in zip(given, bench.ready.datasets) if made.name == name)


def path(bench: Bench, keys: Sequence[Key]) -> dict[str, Any] | None:
    """Points and barriers of the path, averaged over the cells that have one; the plane of the first of them."""
    found: dict[str, list[tuple[Key, dict[str, Any]]]] = {}
    for key in keys:
        for entry in bench.entries:
            told = read_record(bench.path_record(key, entry))
            if told and told["points"]:
                found.setdefault(entry.label, []).append((key, told))
    if not found:
        return None
    row, cells = max(found.items(), key=lambda item: len(item[1]))
    first = cells[0][1]
    cells = [(key, each) for key, each in cells if len(each["points"]) == len(first["points"])]
    mean = landscape.averaged([each for _, each in cells])
    return {"row": row, "cells": len(cells), **mean, "plane": first["plane"], "plane_of": cells[0][0].name}


COLUMNS = ("dataset", "seed", "shots", "row", "strategy", "status", "score")


def results_csv(cells: list[dict[str, Any]]) -> str:
    """One line a row and cell: accuracies as fractions, the options that were chosen, costs, and the reason where there is no model."""
    tests = list(dict.fromkeys(test for cell in cells for row in cell["rows"] if done(row) for test in row["tests"]))
    costs = ("seconds", "search_seconds", "ms_per_sample", "peak_bytes", "bytes", "towers")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            *COLUMNS,
            *(f"{t}_acc1" for t in tests),
            "default_score",
            "options",
            "chosen",
            "selection_split",
            "forwards",
            *costs,
            "reason",
        ]
    )
    for cell in cells:
        for row in cell["rows"]:
            if row is None:
                continue
            own = [cell["dataset"], cell["seed"], cell["shots"], row["row"], row["strategy"], row["status"]]
            if not done(row):
                writer.writerow([*own, *[""] * (len(tests) + len(costs) + 6), row["reason"]])
                continue
            accuracies = [row["tests"].get(t, {}).get("acc1", "") for t in tests]
            default = row.get("default", row).get("score", "")
            cost = [row["cost"].get(key, "") for key in costs]
            told = [json.dumps(row["options"]), json.dumps(row.get("chosen", {})), selection_split(cell, row) or ""]
            writer.writerow([*own, row["score"], *accuracies, default, *told, row["forwards"], *cost, ""])
    return out.getvalue()


def headers(shown: dict[str, Any]) -> list[str]:
    """Of the table's plain cells, as `cells_of` gives them."""
    metric, several = shown["metric"], len(shown["metric"]["columns"]) > 1
    return [
        "row", *metric["columns"], *([metric["headline"]] * several),
        *(["mean of HMs"] * metric["harmonic"]), *(["normalised"] * metric["normalised"]),
        "sd over seeds", "rank", "minus base", "low", "high", "minus tuned", "low", "high", "default",
        "seconds", "towers", "heads", "ms a sample", "peak MB", "MB",
    ]  # fmt: skip


def cells_of(entry: dict[str, Any], shown: dict[str, Any]) -> list[Any]:
    """A row of the table as numbers; None where there is none."""
    metric, several = shown["metric"], len(shown["metric"]["columns"]) > 1
    spans = [entry[key] or {"mean": None, "low": None, "high": None} for key in ("minus_base", "minus_tuned")]
    mb = [None if entry[key] is None else entry[key] / 1e6 for key in ("peak_bytes", "bytes")]
    return [
        entry["row"], *(column["acc1"] for column in entry["columns"].values()), *([entry["score"]] * several),
        *([entry["mean_of_scores"]] * metric["harmonic"]), *([entry.get("normalised")] * metric["normalised"]),
        entry["sd"], entry["rank"], *(span[key] for span in spans for key in ("mean", "low", "high")), entry["default"],
        entry["seconds"], entry["towers"], entry["forwards"], entry["ms_per_sample"], *mb,
    ]  # fmt: skip


def table_csv(shown: dict[str, Any]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*headers(shown), "chosen", "equal to the bit"])
    for entry in shown["rows"]:
        values = ["" if v is None else v for v in cells_of(entry, shown)]
        writer.writerow([*values, wording.chosen(entry), "; ".join(entry["equal"])])
    return out.getvalue()


def markdown(report: dict[str, Any]) -> str:
    """The folder's README: the tables, what is left out, and how to go on."""
    title = in_markdown(f"{report['recipe']}, a bench of {report['protocol']}")
    parts = [f"# {title}", in_markdown(lead(report))]
    for shown in report["tables"]:
        if len(report["tables"]) > 1:
            parts.append(f"## {shown['shots']} shots")
        if not shown["rows"]:
            parts.append("No row is there in every cell.")
            continue
        metric, several = shown["metric"], len(shown["metric"]["columns"]) > 1
        heads = ["row", *metric["columns"], *([metric["headline"]] * several), "rank", "minus " + report["base"],
                 f"minus {shown['anchor']}", "default", "chosen", "towers, heads a sample"]  # fmt: skip
        lines = ["| " + " | ".join(map(in_markdown, heads)) + " |", "|" + " --- |" * len(heads)]
        for entry in sorted(shown["rows"], key=lambda e: -e["score"]):
            spans = [span(entry[key]) for key in ("minus_base", "minus_tuned")]
            values = [f"{column['acc1']:.1f}" for column in entry["columns"].values()]
            values += [f"{entry['score']:.1f}" + (f" ± {entry['sd']:.1f}" if entry["sd"] is not None else "")] * several
            default = "" if entry["default"] is None else f"{entry['default']:.1f}"
            cells = [
                in_markdown(" = ".join([entry["row"], *entry["equal"]])),
                *values,
                f"{entry['rank']:.1f}",
                *spans,
                default,
                in_markdown(wording.chosen(entry, most=choices.SHOWN)),
            ]
            lines.append("| " + " | ".join([*cells, f"{entry['towers']:.0f}, {entry['forwards']}"]) + " |")
        parts.append("\n".join(lines))
    if reasons(report):
        lines = [f"- {in_markdown(line.removeprefix('- '))}" for line in reasons(report)]
        parts.append("## Not in the table\n\n" + "\n".join(lines))
    parts.append("Repeat it with `mergekit-vl bench recipe.yaml`; `report.html` has the plots, costs and commands.")
    return "\n\n".join(parts) + "\n"
