"""Imports point one way: the command line knows everything, strategies know no command line."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mergekit_vl"
LAYERS = (
    (
        "errors",
        "reading",
        "hookspecs",
        "files",
        "locks",
        "memory",
        "plugin_calls",
        "reproducible",
        "interrupts",
        "printable",
        "sources",
    ),
    ("choices",),
    (
        "options",
        "plugins",
        "builtins",
        "recipe",
        "references",
        "yaml_text",
        "statistics",
        "data",
        "model",
        "per_sample",
        "per_task",
        "microworld",
    ),
    ("dtypes", "coefficients"),
    (
        "shards",
        "views",
        "pieces",
        "output",
        "checkpoints",
        "unpickler",
        "archives",
        "pickles",
        "loading",
        "families",
        "symmetries",
    ),
    ("closed_form", "surveys", "task_vectors", "singular", "rebasin"),
    ("merge_plan", "merge_memory", "provenance"),
    ("features", "batch_norm", "strategy", "protocol", "weights", "evaluate", "surrogates", "calibration"),
    ("backbones", "adapters"),
    ("datasets", "tuners", "protocols", "information", "grams"),
    ("strategies",),
    ("saved", "export"),
    ("cell", "landscape", "search"),
    ("experiment", "suite", "runs", "report", "page", "landscape_page", "card", "streaming"),
    ("terminal", "exits"),
    ("bench",),
    ("path_command", "cache_command", "mergekit_yaml", "merge_words", "merge_command", "use_commands"),
    ("cli",),
    ("__main__",),
)


def test_imports_point_upwards_only():
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    files = [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"]
    assert len(files) > 20
    for file in files:
        own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert own in rank, f"{own} has no layer: add it to LAYERS"
        for node in ast.parse(
            file.read_text()
        ).body:  # the module's own imports; those inside functions and TYPE_CHECKING are late
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mergekit_vl."):
                other = node.module.split(".")[1]
                assert rank[other] <= rank[own], f"{file.name} imports {node.module}, which lies below it"


def test_every_package_is_installed():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "mergekit_vl").rglob("__init__.py")}
    assert there | {"mergekit_vl.recipes"} == set(told)
