"""What the commands share: progress on the terminal, the device, and a run's own folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import typer

from mergekit_vl.errors import UserError, unknown
from mergekit_vl.plugins import Registry, load_plugins

ALL_CELLS = "all cells"
MARK = ".recipe-hash"
DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""One of these is there where torch may find a GPU on Linux: NVIDIA's, AMD's, that of WSL."""


@lru_cache(maxsize=1)
def registry() -> Registry:
    """The plugins, loaded once a process."""
    return load_plugins()


def warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


def claim(folder: Path, mark: str, load: Callable[[Path], Any], *, force: bool, goes_on: bool = False) -> Any:
    """Take a folder for what `mark` stands for; what `load` finds there if it is done already, and not to be gone on with.

    Raises UserError for the folder of something else.
    """
    import shutil

    from mergekit_vl.files import PARTIAL, sweep, write_text

    file = folder / MARK
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file", where=str(folder), mend="choose another --out")
    if folder.is_dir() and any(path.suffix != PARTIAL for path in folder.iterdir()):
        if not file.exists() or file.read_text().strip() != mark:
            raise UserError(
                "this folder belongs to another recipe, or to other settings of it",
                where=str(folder),
                mend="choose another --out",
            )
        if force:
            shutil.rmtree(folder)
        elif not goes_on and (found := load(folder)) is not None:
            return found
    write_text(file, mark + "\n")
    sweep(folder)
    return None


def release(folder: Path) -> None:
    """Leave nothing behind of what failed before its first result."""
    if [path.name for path in folder.iterdir()] == [MARK]:
        (folder / MARK).unlink()
        folder.rmdir()


def check_device(name: str) -> None:
    """Raise UserError for what is no device's name; whether it is there is not asked."""
    if name.split(":")[0] not in ("auto", "cpu", "cuda"):
        raise unknown("device", name, ("auto", "cpu", "cuda"))


def device_of(name: str) -> str:
    """A device as torch names it; raises UserError for one that is not there.

    torch takes seconds and memory to import: without a driver it is not asked.
    """
    check_device(name)
    if name.startswith("cpu") or (name == "auto" and sys.platform == "linux" and not any(map(os.path.exists, DRIVERS))):
        return name.replace("auto", "cpu")
    import torch

    if name != "auto" and not torch.cuda.is_available():
        raise UserError(f"device {name}: no GPU is visible to torch", mend="use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


class TerminalProgress:
    """Rich progress on stderr: what is done now, and above it all cells where there are several, each with the time left."""

    def __init__(self, show: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not show)
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> TerminalProgress:
        self.bar.start()
        return self

    def __call__(self, done: int, total: int, what: str) -> None:
        if what not in self.tasks:
            for old in [name for name in self.tasks if name != ALL_CELLS] if what != ALL_CELLS else ():
                self.bar.remove_task(self.tasks.pop(old))
            self.tasks[what] = self.bar.add_task(what, total=total or None)
        self.bar.update(self.tasks[what], completed=done, total=total or None)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
