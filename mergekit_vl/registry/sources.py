"""Hashes of source code: of a module and of everything it imports from this package or from its plugin.

Keys of what is kept on disk hold them, so that a change of the maths makes again what depends on it and nothing else. Imports are read
and not followed by running them: those inside functions count, those for type checkers do not.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

from mergekit_vl import PLACES

OURS = "mergekit_vl"
NO_NUMBERS = (
    *("errors", "printable", "registry"),
    *("system.atomic_files", "system.interrupts", "system.locks", "system.memory", "system.regular_files"),
    *(
        "checkpoints.archives",
        "checkpoints.pickles",
        "checkpoints.reader",
        "checkpoints.unpickler",
        "checkpoints.writer",
    ),
    *("checkpoints.checkpoint", "models.shards"),
)
"""Modules that make no number: words, locks, the registry; and files, since keys hold a hash of what is read from them."""


def closure(modules: Iterable[str], without: Iterable[str] = ()) -> dict[str, str]:
    """Module -> hash of its source, of these modules and what they import, but for the modules, or packages, `without` of ours."""
    left_out = {f"{OURS}.{name}" for name in (*NO_NUMBERS, *without)}
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        parents = {module.rsplit(".", i)[0] for i in range(module.count(".") + 1)}
        if module in found or parents & left_out or (source := _source(module)) is None:
            continue
        found[module], imported = source
        waiting += imported
    return dict(sorted(found.items()))


def modules_of(things: Iterable[object]) -> list[str]:
    """Where the classes of these objects are defined; a string is the name of a module itself."""
    classes = (thing if isinstance(thing, (type, str)) else type(thing) for thing in things)
    return [thing if isinstance(thing, str) else thing.__module__ for thing in classes]


def digest(code: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(code.items())).encode()).hexdigest()[:16]


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files that differ, as messages name them."""
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return sorted(name.removeprefix(f"{OURS}.").replace(".", "/") + ".py" for name in differing)


@cache
def _source(module: str) -> tuple[str, tuple[str, ...]] | None:
    """The hash of a module's source and what it imports of its own distribution and of ours; None where there is no such source."""
    file = _file(module)
    if file is None:
        return None
    try:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError):
        return None
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    within = {OURS, module.partition(".")[0]}
    found = (*_imports(tree, package), *_read_off(tree))
    imported = [_home(name) for name in found if name.partition(".")[0] in within and name != OURS]
    return hashlib.sha256(text.encode()).hexdigest()[:12], tuple(dict.fromkeys(imported))


def _read_off(tree: ast.AST) -> Iterator[str]:
    """What a file reads off our package itself: `mk.option` after `import mergekit_vl as mk`."""
    ours = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == OURS
    }
    for node in ast.walk(tree) if ours else ():
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            yield f"{OURS}.{node.attr}"


def _home(name: str) -> str:
    """The module of a name that our package itself offers."""
    top, _, public = name.partition(".")
    return PLACES[public][0] if top == OURS and public in PLACES else name


def _imports(node: ast.AST, package: str) -> Iterator[str]:
    """Names of modules, and of what may be one."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - child.level] if child.level else []
            base = ".".join([*above, *([child.module] if child.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in child.names)
        yield from _imports(child, package)


@cache
def _file(module: str) -> Path | None:
    """Of a module, found beside its top package without importing it."""
    if module in sys.modules:
        file = vars(sys.modules[module]).get("__file__")
        return Path(file) if file and file.endswith(".py") else None
    top, _, rest = module.partition(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not rest:
        return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None
    for root in spec.submodule_search_locations or ():
        place = Path(root, *rest.split("."))
        for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if file.is_file():
                return file
    return None
