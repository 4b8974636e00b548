"""The HTML page of a bench, with its plots inside it: it needs nothing beside itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_vl.benchmark import plots
from mergekit_vl.benchmark.wording import chosen, failed, headline, lead, reasons
from mergekit_vl.models import choices
from mergekit_vl.printable import in_html
from mergekit_vl.reports import landscape_page
from mergekit_vl.reports.html import document

MORE_STYLE = """
body{max-width:1400px} table.sortable{font-size:.9em} .sortable th{white-space:normal;vertical-align:bottom} .sortable th,.sortable td{padding:.25rem .4rem} th[data-sort]{cursor:pointer;user-select:none} th[data-sort]:hover{background:#f0f4f9}
th.up::after{content:" \\25B2"} th.down::after{content:" \\25BC"}
tr.zero-shot td:first-child{color:#555} tr.tuned td:first-child{color:#d9534f} tr.control td:first-child{color:#b87d00}
tr.merged td:first-child{color:#1d5fa8;font-weight:600} td .equal{display:block;color:#777;font-size:.8em;font-weight:400;
white-space:normal;max-width:22em} td .range{display:block} .above{color:#1a7f4b} .below{color:#b3372f} td.best{font-weight:700}
details{margin:.4rem 0} summary{cursor:pointer} pre{white-space:pre-wrap;word-break:break-all;font-size:.85em}
.failed{color:#b3372f} nav{margin:1rem 0} nav a{margin-right:1.2rem}
"""

SCRIPT = """
document.querySelectorAll("table.sortable").forEach(table => {
  table.querySelectorAll("th").forEach((head, column) => {
    head.dataset.sort = ""; head.tabIndex = 0;
    const sort = () => {
      const down = !head.classList.contains("down");
      table.querySelectorAll("th").forEach(h => h.classList.remove("up", "down"));
      head.classList.add(down ? "down" : "up");
      const value = row => { const c = row.cells[column]; const v = c.dataset.value; return v === undefined ? c.textContent : v === "" ? null : +v; };
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => { const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return (typeof x === "string" ? x.localeCompare(y) : x - y) * (down ? -1 : 1); });
      table.tBodies[0].append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", e => { if (e.key === "Enter") sort(); });
  });
});
"""


def html(report: dict[str, Any], cells: list[dict[str, Any]]) -> str:
    parts = [
        f"<h1>{in_html(report['recipe'])}: a bench of {in_html(report['protocol'])}</h1>",
        f"<p class=lead>{in_html(headline(report))}</p>",
        f"<p>{in_html(lead(report))}</p>",
        "<p class=failed>Some of it failed, see <a href=#out>below</a>.</p>" if failed(report) else "",
    ]
    for shown in report["tables"]:
        shots = f" with {shown['shots']} shots" if len(report["tables"]) > 1 else ""
        if not shown["rows"]:
            parts.append(f"<h2>Rows{shots}</h2><p class=failed>No row is there in every cell.</p>")
            continue
        parts += [
            f"<h2>Rows{shots}</h2>{_legend(report, shown)}{_table(shown, report)}",
            f"<h2>Quality and cost{shots}</h2><figure>{plots.pareto(shown)}</figure>"
            f"<p>{in_html(_costs(report, shown))}</p>",
        ]
        means = _by_dataset(cells, shown, report)
        if len(means) > 1:
            parts.append(f"<h2>By dataset{shots}</h2><figure>{plots.by_dataset(shown, means)}</figure>")
    if len([t for t in report["tables"] if t["rows"]]) > 1:
        parts.append(
            f"<h2>By shots</h2><figure>{plots.over_shots([t for t in report['tables'] if t['rows']])}</figure>"
        )
    if report["path"]:
        parts.append(landscape_page.section(report["path"], report["base"], report["tuned"][0]))
    parts += [_chosen(report), _left_out(reasons(report)), _repeat(report)]
    told = ", ".join(f"{k} {v}" for k, v in report["environment"].items())
    parts.append(f"<h2>Environment</h2><p>{in_html(told)}; last run {report['seconds']:.0f} s.</p>")
    return document(report["recipe"], "".join(parts), MORE_STYLE, SCRIPT)


def _legend(report: dict[str, Any], shown: dict[str, Any]) -> str:
    metric = shown["metric"]
    text = [f"Percent. Tuned: {', '.join(report['tuned'])}."]
    if metric["harmonic"]:
        text.append(
            "HM is the harmonic mean of the averages, as the field prints it; beside it the mean of the cells' own."
        )
    for name, tests in metric["columns"].items():
        if len(tests) > 1:
            text.append(f"{name} is the mean of {', '.join(tests)}.")
    if metric["normalised"]:
        text.append("Normalised: each accuracy divided by that of the task's own tuned model, averaged.")
    text.append("Click a column to sort. Green and red: the 95% interval excludes 0.")
    return f"<p>{in_html(' '.join(text))}</p>"


def _table(shown: dict[str, Any], report: dict[str, Any]) -> str:
    metric, several = shown["metric"], len(shown["metric"]["columns"]) > 1
    heads = ["row", *metric["columns"], *([metric["headline"]] * several), *(["mean of HMs"] * metric["harmonic"]),
             *(["normalised"] * metric["normalised"]), "sd", "rank", f"minus {report['base']}", f"minus {shown['anchor']}",
             "default", "chosen", "search s", "seconds", "towers", "heads", "ms a sample", "peak MB", "MB"]  # fmt: skip
    body = []
    best = max(row["score"] for row in shown["rows"])
    for row in sorted(shown["rows"], key=lambda r: -r["score"]):
        equal = f"<span class=equal>= {in_html(', '.join(row['equal']))}</span>" if row["equal"] else ""
        cells = [f"<td>{in_html(row['row'])}{equal}</td>"]
        for column in row["columns"].values():
            span = column["interval"]
            title = (f"95% {span[0]:.1f} to {span[1]:.1f}, " if span else "") + f"n = {column['n']}"
            cells.append(f"<td data-value={column['acc1']:.6f} title='{title}'>{column['acc1']:.1f}</td>")
        if several:
            mark = " class=best" if row["score"] == best else ""
            cells.append(f"<td{mark} data-value={row['score']:.6f}>{row['score']:.1f}</td>")
        cells += [_number(row["mean_of_scores"], ".1f")] * metric["harmonic"]
        cells += [_number(row.get("normalised"), ".1f")] * metric["normalised"]
        cells += [_number(row["sd"], ".1f"), _number(row["rank"], ".1f")]
        for key in ("minus_base", "minus_tuned"):
            d = row[key]
            if d is None:
                cells.append("<td data-value=''></td>")
                continue
            mark = f" class={d['verdict']}" if d["verdict"] in ("above", "below") else ""
            span = "" if d["low"] is None else f" <span class=range>{d['low']:+.1f} to {d['high']:+.1f}</span>"
            cells.append(f"<td{mark} data-value={d['mean']:.6f}>{d['mean']:+.1f}{span}</td>")
        mb = [None if row[key] is None else row[key] / 1e6 for key in ("peak_bytes", "bytes")]
        cells += [
            _number(row["default"], ".1f"), f"<td>{in_html(chosen(row, most=1))}</td>",
            _number(row["search_seconds"] if row["searched"] else None, ".1f"),
            _number(row["seconds"], ".2f"), _number(row["towers"], ".0f"), _number(row["forwards"], ".0f"),
            _number(row["ms_per_sample"], ".3f"), _number(mb[0], ".0f"), _number(mb[1], ".3f"),
        ]  # fmt: skip
        body.append(f"<tr class={row['kind']}>{''.join(cells)}</tr>")
    head = "".join(f"<th>{in_html(h)}</th>" for h in heads)
    return f"<table class=sortable><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _number(value: float | None, form: str) -> str:
    return "<td data-value=''></td>" if value is None else f"<td data-value={value:.6f}>{value:{form}}</td>"


def _costs(report: dict[str, Any], shown: dict[str, Any]) -> str:
    twice = [r["row"] for r in shown["rows"] if (r["towers"] or 1) > 1]
    text = (
        f"Seconds are those of one cell, without encoding images, which serves every row, and without the anchors' own tuning. A sample costs {report['image_ms']:.3f} ms"
        " a tower on this machine (batches of 16), and what its heads take."
    )
    if twice:
        text += f" Rows that run several towers for a sample, and cost as many times as much: {', '.join(twice)}."
    heads = [r["row"] for r in shown["rows"] if r["forwards"] > 1 and (r["towers"] or 1) == 1]
    if heads:
        text += f" Several heads on one tower, which cost little: {', '.join(heads)}."
    return text


def _by_dataset(cells: list[dict[str, Any]], shown: dict[str, Any], report: dict[str, Any]) -> dict[str, list[float]]:
    means: dict[str, list[float]] = {}
    inside = [cell for cell in cells if cell["shots"] == shown["shots"]]
    for name in report["grid"]["datasets"]:
        own = [cell for cell in inside if cell["dataset"] == name]
        by_row = [{row["row"]: row for row in cell["rows"] if row} for cell in own]
        means[name] = [100 * float(np.mean([rows[r["row"]]["score"] for rows in by_row])) for r in shown["rows"]]
    return means


def _chosen(report: dict[str, Any]) -> str:
    if not report["chosen"]:
        return ""
    parts = []
    for each in report["chosen"]:
        counts: dict[str, int] = {}
        for cell in each["cells"]:
            counts[choices.text(cell["options"])] = counts.get(choices.text(cell["options"]), 0) + 1
        told = "; ".join(f"{value} ({n})" for value, n in sorted(counts.items(), key=lambda item: -item[1]))
        lines = []
        for cell in each["cells"]:
            tried = ", ".join(
                f"{choices.text(c['options'])}: {100 * c['score']:.1f}"
                if "score" in c
                else f"{choices.text(c['options'])}: left out, {c['reason']}"
                for c in cell["configurations"] or []
            )
            own = f"; {choices.text(cell['own'])}" if cell["own"] else ""
            lines.append(f"{cell['cell']}: {choices.text(cell['options'])}{own}" + (f"   [{tried}]" if tried else ""))
        how = f" (chosen on {each['how']} images)" if each["how"] else ""
        parts.append(
            f"<details><summary><b>{in_html(each['row'])}</b>: {in_html(told)}</summary><p>{in_html(how)}</p><pre>{chr(10).join(map(in_html, lines))}</pre></details>"
        )
    return (
        "<h2>What was chosen</h2><p>Options by number of cells; open a row for every configuration and what it scored on the selection "
        f"task, never on test.</p>{''.join(parts)}"
    )


def _left_out(lines: list[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{in_html(line.removeprefix('- '))}</li>" for line in lines)
    return f"<h2 id=out>Not in the table</h2><ul>{items}</ul>"


def _repeat(report: dict[str, Any]) -> str:
    parts = []
    for row, commands in report["repeat"].items():
        text = "\n\n".join(
            ("" if c["cells"] == "all" else f"# {in_html(c['cells'])}\n") + in_html(c["command"]) for c in commands
        )
        parts.append(f"<details><summary>{in_html(row)}</summary><pre>{text}</pre></details>")
    return (
        "<h2>Repeat it</h2><p>All of it: <code>mergekit-vl bench recipe.yaml</code> in this folder. A row alone, with the options that were "
        f"chosen:</p>{''.join(parts)}"
    )
