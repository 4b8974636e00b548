"""Write docs/reference.md, the commands and options as the code declares them; a test holds it to that.

python scripts/make_reference.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import typer

from mergekit_vl import options
from mergekit_vl.commands import app
from mergekit_vl.registry import plugins

FILE = Path(__file__).parent.parent / "docs" / "reference.md"
HEAD = """# Reference

Made from the code by `python scripts/make_reference.py`; `mergekit-vl show NAME` prints the same with the paper's place.
"""


def reference() -> str:
    parts = [HEAD, "## Commands\n"]
    root = typer.main.get_command(app.application())
    parts += [_table("`mergekit-vl`", root)]
    parts += [
        f"### `mergekit-vl {name}`\n\n{command.help}\n\n{_table('', command)}"
        for name, command in root.commands.items()
        if not command.hidden
    ]
    registry = plugins.load_plugins()
    for kind, entries in registry.entries.items():
        parts.append(f"## {kind.capitalize()}\n")
        for entry in entries.values():
            if entry.owner in plugins.DEFAULT_PLUGINS:
                parts.append(_options(entry))
    return "\n".join(parts).rstrip() + "\n"


def _table(title: str, command) -> str:
    rows = []
    for parameter in command.params:
        argument = parameter.param_type_name == "argument"
        name = parameter.name.upper() if argument else ", ".join(parameter.opts)
        rows.append(f"| `{name}` | {(getattr(parameter, 'help', '') or '').replace('|', '/')} |")
    return (
        "\n".join([*([title, ""] if title else []), "| argument or option | meaning |", "|---|---|", *rows, ""])
        if rows
        else ""
    )


def _options(entry: plugins.Entry) -> str:
    lines = [f"### `{entry.name}`", "", f"{entry.summary[0].upper()}{entry.summary[1:]}.", ""]
    cls = entry.resolve()
    described = options.describe(cls) if dataclasses.is_dataclass(cls) and entry.kind != "adapters" else []
    if described:
        lines += ["| option | type | default | meaning |", "|---|---|---|---|"]
        for key, kind, default, meaning in described:
            lines.append(f"| `{key}` | `{kind}` | `{default}` | {meaning} |".replace(" | None`", " or None`"))
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
    print("written:", FILE)
