"""The public names: imported lazily, the same for type checkers as at run time, and all of them used by the tour in docs/."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mergekit_vl

ROOT = Path(mergekit_vl.__file__).parent


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_the_package_imports_nothing_large():
    loaded = set(python("import sys, mergekit_vl; print(*sys.modules)"))
    assert not {"torch", "numpy", "pydantic", "typer", "pluggy"} & {name.partition(".")[0] for name in loaded}
    assert {name for name in loaded if name.startswith("mergekit_vl.")} == set()


@pytest.mark.parametrize("name", ["option", "hookimpl", "UserError", "list_strategies", "closed_form"])
def test_what_plugins_need_to_register_imports_no_torch(name):
    assert "torch" not in python(f"import sys; from mergekit_vl import {name}; print(*sys.modules)")


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == mergekit_vl.PLACES
    assert sorted(mergekit_vl.__all__) == sorted(["__version__", *told])
    assert (ROOT / "py.typed").exists()


@pytest.mark.parametrize("name", mergekit_vl.__all__)
def test_every_name_is_there(name):
    assert getattr(mergekit_vl, name) is not None and name in dir(mergekit_vl)


def test_a_function_is_not_hidden_by_a_room_of_its_name():
    code = (
        "import mergekit_vl, mergekit_vl.benchmark.plan, mergekit_vl.commands.app; print(callable(mergekit_vl.bench))"
    )
    assert python(code) == ["True"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'merg'"):
        mergekit_vl.merg  # noqa: B018
