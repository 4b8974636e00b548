"""Ctrl-C, SIGTERM and SIGHUP end the program with one line and the exit code that shells expect: 128 plus the signal's number.

This module imports almost nothing: a signal that arrives before it is imported ends the program with a traceback.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """The signal that came, if one came."""

    number: int | None = None


def end_at_once() -> None:
    """From here on a signal ends the process where it stands: for moments in which there is nothing to tidy up."""
    _handle(end)


@contextmanager
def unwinding(stop: Stop) -> Iterator[None]:
    """The first signal is written into `stop` and raises KeyboardInterrupt, so that everything tidies up; the second Ctrl-C ends at once.

    `stop` is what counts: a library may turn the KeyboardInterrupt into an exception of its own, as imports of extensions do.
    """

    def first(number: int, frame: FrameType | None) -> None:
        stop.number = number
        for other in before:  # a terminal that is closed sends SIGHUP more than once
            signal.signal(other, end if other == signal.SIGINT else signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in _heeded()}
    try:
        _handle(first)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def noted(text: str) -> Iterator[None]:
    """`text` is what an interruption inside means for the user; it is printed with it."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(text)
        raise


def _heeded() -> list[signal.Signals]:
    """What nohup or the start of a job in the background made ignored stays so."""
    return [number for number in STOPS if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in _heeded():
        signal.signal(number, handler)


def end(number: int, frame: FrameType | None) -> None:
    """The handler of `end_at_once`."""
    try:
        os.write(2, b"interrupted\n")
    except OSError:
        pass
    os._exit(128 + number)
