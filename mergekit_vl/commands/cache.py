"""`mergekit-vl cache`: what the feature store keeps, and clearing it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import typer

from mergekit_vl.commands.terminal import say
from mergekit_vl.errors import UserError

DAY = 86_400


def cache(
    clear: Annotated[
        bool, typer.Option("--clear", help="delete stored features; they are computed again when needed")
    ] = False,
    older_than: Annotated[
        float | None, typer.Option(min=0, help="with --clear: only what was written this many days ago or before")
    ] = None,
) -> None:
    """Show the stored image features (MERGEKIT_VL_CACHE moves them elsewhere), or clear them."""
    from mergekit_vl.models.shards import ENDING, default_folder
    from mergekit_vl.system.atomic_files import sweep

    if older_than is not None and not clear:
        raise UserError("--older-than goes with --clear", where="command line", hint="add --clear")
    if older_than is not None and not math.isfinite(older_than):
        raise UserError(f"--older-than {older_than}", where="command line", hint="a number of days")
    folder = default_folder()
    files, old = sorted(folder.glob(f"??/*{ENDING}")), sorted(folder.glob("??/*.safetensors"))
    if not clear:
        say(f"folder  {folder}")
        say(f"files   {len(files)}, {_size(files)}")
        for days, label in ((1, "today"), (7, "this week"), (30, "this month"), (None, "before")):
            last = {1: 0, 7: 1, 30: 7, None: 30}[days]
            inside = [f for f in files if _age(f) >= last and (days is None or _age(f) < days)]
            if inside:
                say(f"        {label}: {len(inside)}, {_size(inside)}")
        if old:
            say(f"old     {len(old)} files of an earlier version, {_size(old)}: nothing reads them")
        if files or old:
            say("clear it with mergekit-vl cache --clear [--older-than DAYS]")
        return
    sweep(folder)
    chosen = [f for f in (*files, *old) if older_than is None or _age(f) >= older_than]
    freed = _size(chosen)
    for file in chosen:
        file.unlink(missing_ok=True)
    for place in folder.glob("??"):
        if not any(place.iterdir()):
            place.rmdir()
    say(f"deleted {len(chosen)} files, {freed}, from {folder}")


def _age(file: Path) -> float:
    """In days."""
    return (time.time() - file.stat().st_mtime) / DAY


def _size(files: list[Path]) -> str:
    total = sum(file.stat().st_size for file in files)
    return f"{total / 1e9:.2f} GB" if total >= 1e9 else f"{total / 1e6:.1f} MB"
