"""Imports point one way: from room to room as docs/architecture.md draws it, and in no circle between files."""

import ast
import re
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mergekit_vl"
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in PACKAGE.rglob("*.py")
}


FACE = "mergekit_vl"
"""It names what the rooms export, for type checkers alone: tests/api/test_names.py holds it to that."""


def imports(module):
    """The package's modules that a file imports: at its top, inside functions and for types alone."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "mergekit_vl":
                yield name if name in FILES else name.rpartition(".")[0]


def room(module):
    """The folder that a module lies in, or the file itself where it lies in none."""
    return module.split(".")[1] if "." in module else module


def floors():
    """(room, floor) from the ground up, as docs/architecture.md draws them."""
    table = re.findall(r"^\| (\d+) \| (.+?) \|", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    return [(name, int(floor)) for floor, names in table for name in re.findall(r"`(\w+)(?:\.py|/)`", names)]


def test_every_room_is_drawn_once():
    drawn = [name for name, _ in floors()]
    assert sorted(drawn) == sorted({room(module) for module in FILES} - {"mergekit_vl"})


def test_imports_go_down():
    drawn = dict(floors()) | {"mergekit_vl": 0}
    wrong = [
        f"{module} imports {other}"
        for module in FILES
        if module != FACE
        for other in imports(module)
        if room(other) != room(module) and drawn[room(other)] >= drawn[room(module)]
    ]
    assert not wrong
    assert sum(1 for module in FILES for _ in imports(module)) > 700  # it reads all of them


def test_no_files_import_each_other_in_a_circle():
    try:
        TopologicalSorter({module: set(imports(module)) - {module} for module in FILES if module != FACE}).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_every_package_is_installed():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(file.parent.relative_to(ROOT).parts) for file in PACKAGE.rglob("__init__.py")}
    assert there | {"mergekit_vl.recipes.installed"} == set(told)
