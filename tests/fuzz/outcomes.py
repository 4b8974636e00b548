"""What every fuzz test asserts: whatever a file holds, a command ends with 0 or with one line and 2, soon, and in little memory.

`make test` tries a few inputs of each kind, `make fuzz` as many as a test's `counted` says.
"""

import contextlib
import functools
import io
import os
import resource
import sys
import time

import typer
from hypothesis import HealthCheck, settings

from mergekit_vl.errors import UserError
from mergekit_vl.printable import shown

FUZZ = "MERGEKIT_VL_FUZZ" in os.environ
SECONDS, BYTES = 1.0, 64 << 20
"""What a file may take beyond a good one of its size; the files here are of a few kB."""


def counted(many: int, few: int = 25) -> settings:
    """A decorator: how many inputs are tried, by `make fuzz` and by `make test`; the latter tries the same ones each time."""
    return settings(
        max_examples=many if FUZZ else few,
        derandomize=not FUZZ,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@functools.cache
def _commands() -> typer.core.TyperGroup:
    from mergekit_vl.commands import app

    return typer.main.get_command(app.application())


def answer(*words: object) -> int:
    """Run a command in this process: its exit code, 0 or 2. Any other exception than a UserError of one line fails the test."""
    code, told = 0, ""
    with bounded(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            _commands().main([str(word) for word in words], "mergekit-vl")
        except SystemExit as end:
            code, told = end.code or 0, errors.getvalue()
        except UserError as error:
            code, told = 2, str(error)
            assert told == shown(told, 4000), told
    assert code in (0, 2), (code, told)
    return code


@contextlib.contextmanager
def bounded():
    """Fail where the block takes more than SECONDS, or raises the process' peak by more than BYTES."""
    peak, began = _peak(), time.process_time()
    yield
    took, grown = time.process_time() - began, _peak() - peak
    assert took < SECONDS and grown < BYTES, f"{took:.1f} s, {grown >> 20} MB"


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
