"""Count the logical statements of strategies/ that are no maths, no options and no docstrings.

    python scripts/count_statements.py [FOLDER] [--each]        FOLDER: mergekit_vl/strategies of this or of an earlier commit

Counted are nodes `ast.stmt` in functions, the functions themselves, and what a class sets beside its options (`grid = ...`, traits), less

- imports, docstrings, annotated fields (options), declarations (functions with the body `...`), heads of classes, constants of a module;
- maths: a function with arrays, tensors, Gram matrices, chunks or a run over chunks in its signature, the `merge` of a method that is no
  closed form (it is the method), and any other statement that calculates: with + - * / @ **, or with numpy, torch or math.

The contract, the decorator and closed forms on adapters are not looked at: at 935e732 they lay beside strategies/.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ARRAYS = re.compile(r"\b(Tensors?|Array|Grams?|Chunk|Piece|PerModel|Float|Run)\b")
CLOSED = re.compile(r"def merge_(chunk|piece)\(")
ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.MatMult, ast.Pow)
LIBRARIES = ("np", "torch", "F", "math")
ELSEWHERE = ("base", "closed_form", "in_memory")


def is_text(node: ast.AST) -> bool:
    """Whether it is a docstring, or the `...` of a declaration."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_maths(function: ast.FunctionDef, closed: bool) -> bool:
    arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    told = [ast.unparse(each) for each in (*(a.annotation for a in arguments), function.returns) if each is not None]
    return bool(ARRAYS.search(" ".join(told))) or (function.name == "merge" and not closed)


def expressions(statement: ast.AST) -> Iterator[ast.AST]:
    """Those of the statement itself, without the statements in it."""
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, ast.stmt | ast.ExceptHandler):
            yield child
            yield from expressions(child)


def calculates(statement: ast.AST) -> bool:
    return isinstance(statement, ast.AugAssign) or any(
        (isinstance(node, ast.BinOp) and isinstance(node.op, ARITHMETIC))
        or (isinstance(node, ast.Name) and node.id in LIBRARIES)
        for node in expressions(statement)
    )


def count(node: ast.AST, within: ast.AST, closed: bool) -> int:
    """The statements in `node`, which lies directly in the module, class or function `within`, or is it."""
    total = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            if not is_maths(child, closed) and not all(map(is_text, child.body)):
                total += 1 + count(child, child, closed)
        elif isinstance(child, ast.ClassDef):
            total += count(child, child, closed)
        else:
            told = isinstance(child, ast.stmt) and not isinstance(child, ast.Import | ast.ImportFrom)
            declared = isinstance(within, ast.Module)
            declared |= isinstance(within, ast.ClassDef) and not isinstance(child, ast.Assign)
            total += told and not (declared or is_text(child) or calculates(child))
            total += count(child, within, closed)
    return total


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--each"]
    folder = Path(words[0]) if words else Path(__file__).parent.parent / "mergekit_vl" / "strategies"
    total = in_closed = 0
    for file in sorted(folder.glob("*.py")):
        if file.stem in ELSEWHERE:
            continue
        text = file.read_text()
        closed = bool(CLOSED.search(text))
        tree = ast.parse(text)
        found = count(tree, tree, closed)
        total, in_closed = total + found, in_closed + found * closed
        if "--each" in sys.argv:
            print(f"{found:4d} {file.name}")
    print(f"{total} statements, {in_closed} of them in files of closed forms")


if __name__ == "__main__":
    main()
