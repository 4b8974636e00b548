"""How a command ends: nothing but one line for what the user or the system can mend, and an exit code."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Callable

import typer

from mergekit_vl.commands.terminal import say
from mergekit_vl.errors import LONGEST, UserError
from mergekit_vl.printable import shown
from mergekit_vl.system.interrupts import Stop, unwinding

FAULT = 2
"""The exit code of every error that the user or the system can mend."""
CLOSED_PIPE = 141
"""What a shell tells of a process that wrote to `head` after it had left: 128 and SIGPIPE's number."""
USAGE: type[Exception] = typer.BadParameter.mro()[2]
"""Whatever is wrong with the words of the command line; newer versions of Typer have a click of their own."""
PLAIN = {"±": "+-", "→": "->", "−": "-", "–": "-", "“": '"', "”": '"', "…": "..."}
"""How we write our own characters where the terminal's encoding has none of them."""


def exit_code(work: Callable[[], object], *, starting: Callable[[], object] = lambda: None) -> int:
    """Do it, and print the line of what went wrong; an exception that nobody can mend but us goes on as a traceback.

    `starting` is done first, and leaves nothing to tidy up when a signal comes.
    """
    _write_anything()
    stop = Stop()
    try:
        starting()
        with unwinding(stop):
            work()
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        return 0
    except BaseException as error:
        if stop.number is not None or isinstance(error, KeyboardInterrupt):
            _complain("; ".join(["interrupted", *getattr(error, "__notes__", ())]))
            return 128 + (stop.number or 2)
        if isinstance(error, typer.Exit):
            return error.exit_code
        if isinstance(error, BrokenPipeError):
            return CLOSED_PIPE
        line = _line(error)
        if line is None:
            raise
        _complain(f"error: {line}")
        return FAULT
    finally:
        _close_what_fails()


def _line(error: BaseException) -> str | None:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, USAGE):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "mergekit-vl"
        message: Callable[[], str] = getattr(error, "format_message", error.__str__)
        return f"{' '.join(message().split())} (see {command} --help)"
    if isinstance(error, OSError) and error.strerror:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        return ": ".join([" and ".join(names), error.strerror] if names else [error.strerror])
    if isinstance(error, MemoryError):
        return "the memory that is there is not enough"
    return None


def _complain(text: str) -> None:
    try:
        say(shown(text, LONGEST), err=True)
    except (OSError, UserError):
        pass  # there is nobody to be told


def _write_anything() -> None:
    """What the encoding of the terminal does not have is written as an escape and ends nothing."""
    codecs.register_error("mergekit_vl", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="mergekit_vl")


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError) and (plain := PLAIN.get(error.object[error.start])):
        return plain, error.start + 1
    return codecs.backslashreplace_errors(error)


def _close_what_fails() -> None:
    """What cannot be written goes nowhere, or Python would try again at its end and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
