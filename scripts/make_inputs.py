"""Write docs/inputs.md, what is read and what is only named, as the code lists it; a test holds it to that.

python scripts/make_inputs.py
"""

from __future__ import annotations

from pathlib import Path

from mergekit_vl.checkpoints import foreign
from mergekit_vl.datasets import class_names, foreign_data, image_files
from mergekit_vl.merge_files import mergekit_documents

FILE = Path(__file__).parent.parent / "docs" / "inputs.md"
HEAD = """# What is read

Made from the code by `python scripts/make_inputs.py`. Whatever was read in another form than it is stored in is told in one line; whatever is not read is called what it
is, with the next step. No file is executed: pickles are read by our own restricted interpreter, of whole modules the tensors alone.
"""
TABLE = "| what | recognised by | what is told |\n|---|---|---|"


def page() -> str:
    """The page: one table, with a line above each part of it."""
    rows = [TABLE]
    rows += _part("**Models**", foreign.READ)
    rows += _part("**Files that are named, with the next step**", [(f.what, f.sign, f.step) for f in foreign.FORMATS])
    rows += _part(
        "**Files of methods that are not here**",
        [(m.what, f"`{m.sign}`", "what they are") for m in foreign.METHODS],
    )
    rows += _part("**Data**", foreign_data.READ)
    rows += _part(
        "**Data that is named, with the next step**", [(f.what, f.sign, _short(f.step)) for f in foreign_data.FORMS]
    )
    by_step: dict[str, list[str]] = {}
    for ending, step in image_files.LEFT_OUT.items():
        by_step.setdefault(step, []).append(ending)
    rows += _part(
        "**Pictures that are left out and counted**",
        [(", ".join(endings), "the ending", s) for s, endings in by_step.items()],
    )
    rows += _part(
        "**Class names** (`--classes`, `classes_file`)", [(what, f"`{form}`", "") for what, form in class_names.LISTS]
    )
    text, running = (
        ", ".join(f"`{key}`" for key in keys) for keys in (mergekit_documents.OF_TEXT, mergekit_documents.OF_RUNNING)
    )
    rows += _part(
        "**mergekit's YAML**",
        [
            ("keys about text", text, "that they are passed over"),
            ("options of its command", running, "that they are passed over"),
            (
                "slices and modules of whole models",
                "the same layers of every model, from the first on",
                "that they are read as models",
            ),
            (
                "parameters that a method does not have",
                "their names",
                "that mergekit ignores them too; misspelt ones are refused",
            ),
            ("several documents", "`---`", "each, with the folder of its result"),
        ],
    )
    return HEAD + "\n" + "\n".join(rows) + "\n"


def _part(title: str, lines: list[tuple[str, str, str]] | tuple[tuple[str, str, str], ...]) -> list[str]:
    return [f"| {title} | | |", *(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)]


def _short(step: str) -> str:
    """A step without its program, which the error prints for the folder at hand."""
    head, _, rest = step.partition('python -c "')
    return f"{head}a line of Python that writes class folders".strip() if rest else step


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
    print("written:", FILE)
