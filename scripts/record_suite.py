"""Record a finished run of recipes/mergetune_suite.yaml: assets/suite.json, and the tables and picture of docs/suite.md.

python scripts/record_suite.py runs/mergetune_suite-HASH
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from mergekit_vl.reports.report import load

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"


def main() -> None:
    run = Path(sys.argv[1])
    finished = load(run)
    assert finished is not None, f"{run} is not finished"
    report = finished.to_json()
    tasks = list(dict.fromkeys(cell["dataset"] for cell in report["cells"]))
    seeds = {cell["seed"] for cell in report["cells"]}
    suite = {
        "tasks": len(tasks),
        "seeds": len(seeds),
        "recipe_hash": report["hash"],
        "environment": report["environment"],
        "summary": [
            {"row": r["row"], "score": round(r["score"], 2)}
            | {name: round(column["acc1"], 2) for name, column in r["columns"].items()}
            for r in report["summary"]
        ],
    }
    (ROOT / "mergekit_vl" / "assets" / "suite.json").write_text(json.dumps(suite, indent=1, sort_keys=True) + "\n")
    page = ROOT / "docs" / "suite.md"
    text = re.sub(f"{BEGIN}.*{END}", lambda _: BEGIN + tables(report, tasks) + END, page.read_text(), flags=re.DOTALL)
    page.write_text(text)
    shutil.copyfile(run / "report.png", ROOT / "docs" / "suite.png")
    print(f"recorded {len(tasks)} tasks, {len(seeds)} seeds")


def tables(report: dict[str, Any], tasks: list[str]) -> str:
    environment = ", ".join(f"{k} {v}" for k, v in report["environment"].items())
    parts = [f"{len(tasks)} tasks, {len(report['cells'])} cells ({environment}).\n"]
    parts += _both(report["summary"], report["differences"], report["main"])
    part = report["forgetting"]
    names = ", ".join(part["tasks"]) or "none"
    parts.append(
        f"Where CoOp's novel accuracy is 4 points or more below zero-shot's ({len(part['tasks'])}: {names}):\n"
    )
    if "summary" in part:
        parts += _both(part["summary"], part["differences"], report["main"])
    rows = [r["row"] for r in report["cells"][0]["rows"]]
    by_task = []
    for task in tasks:
        cells = [c for c in report["cells"] if c["dataset"] == task]
        means = (100 * sum(c["rows"][i]["score"] for c in cells) / len(cells) for i in range(len(rows)))
        by_task.append([task, *(f"{m:.1f}" for m in means)])
    parts += ["HM by task, mean over seeds:\n", _table(["task", *rows], by_task)]
    return "\n".join(parts)


def _both(summary: list[dict[str, Any]], differences: list[dict[str, Any]], main: str) -> list[str]:
    scores = [
        [r["row"], *(_with_interval(c) for c in r["columns"].values()), f"{r['score']:.1f}", f"{r['mean_of_scores']:.1f}"]
        for r in summary
    ]  # fmt: skip
    minus = [
        [
            d["minus"],
            f"{d['mean']:+.2f}",
            "" if d["low"] is None else f"{d['low']:+.2f} to {d['high']:+.2f}",
            d["verdict"],
        ]
        for d in differences
    ]
    return [
        _table(["row", "base", "novel", "HM", "mean of HMs"], scores),
        _table([f"{main} minus", "HM points", "95% interval", "verdict"], minus),
    ]


def _with_interval(column: dict[str, Any]) -> str:
    span = column["interval"]
    return f"{column['acc1']:.1f}" + (f" ({span[0]:.1f} to {span[1]:.1f})" if span else "")


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
