"""Calls of plugin code: an exception becomes one error that names the plugin, prints go to stderr, and loading has a time limit."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

from mergekit_vl.errors import Failed, UserError
from mergekit_vl.system import interrupts
from mergekit_vl.system.memory import out_of_memory

PACKAGE = __name__.partition(".")[0]
FILE_MODULE = f"{PACKAGE}_plugin_"
"""Before the name of a file of the plugins directory, as a module."""


def owner(module: str) -> str | None:
    """The plugin that a module belongs to; None for this package's own modules."""
    if module.startswith(FILE_MODULE):
        return module.removeprefix(FILE_MODULE).partition(".")[0]
    top = module.partition(".")[0]
    return None if top == PACKAGE else top


def is_plugins(target: object) -> bool:
    """Whether an object is of a plugin's class."""
    return owner(type(target).__module__) is not None


def named(target: object) -> str:
    """An object's class in messages, with its plugin."""
    name = owner(type(target).__module__)
    return f"plugin {name}: {type(target).__qualname__}" if name else type(target).__qualname__


@contextlib.contextmanager
def calling(target: object, what: str) -> Iterator[None]:
    """While a method of `target` runs: what a plugin's raises is a Failed that names it; of ours, memory that ends alone."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if out_of_memory(error):
            raise Failed("out of memory", where=f"{named(target)}: {what}", hint="use fewer threads") from None
        pressed = isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()
        if pressed or not is_plugins(target):  # Ctrl-C reaches the main thread alone
            raise
        raise Failed(told(error), where=f"{named(target)}: {what}") from error


def told(error: BaseException) -> str:
    """An error on one line, with the place where code that is not ours raised it."""
    if isinstance(error, UserError):
        return str(error)
    text = " ".join(str(error).split())[:300]
    place = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{type(error).__name__}: {text}" + "".join(f" ({Path(p.filename).name}:{p.lineno})" for p in place)


def blamed(error: BaseException, modules: dict[str, str]) -> str | None:
    """The plugin, by the names of plugins' modules, in whose code an error was raised; None where there is none.

    SystemExit is the right of a plugin's own command, and an error only where our code asked for something else.
    """
    found, ours = None, False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
        ours |= module.startswith(f"{PACKAGE}.") and not module.endswith(".commands.app")
        name = next((name for own, name in modules.items() if f"{module}.".startswith(f"{own}.")), None)
        if name is not None and (ours or not isinstance(error, SystemExit)):
            found = name
    return found


def to_stderr() -> contextlib.AbstractContextManager[object]:
    """A context in which what plugins print goes to stderr."""
    return contextlib.redirect_stdout(sys.stderr)


class _Late(BaseException):
    """No `except Exception` of the code that is stopped catches it."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in code that takes longer, and RuntimeError for a KeyboardInterrupt that nobody's Ctrl-C made.

    Signals reach the main thread alone: in another one, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    state = {"inside": True, "pressed": False}

    def late(number: int, frame: object) -> None:
        if state["inside"]:
            raise _Late

    def pressed(number: int, frame: object) -> None:
        state["pressed"] = True
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    own = handler is signal.default_int_handler
    silent = handler in (interrupts.end, signal.SIG_IGN, signal.SIG_DFL)
    before = signal.signal(signal.SIGALRM, late)
    if own:
        signal.signal(signal.SIGINT, pressed)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    except _Late:
        raise TimeoutError(f"not done after {seconds:g} s") from None
    except KeyboardInterrupt:
        if state["pressed"] or not (own or silent):
            raise
        raise RuntimeError("it raised KeyboardInterrupt") from None
    finally:
        state["inside"] = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if own:
            signal.signal(signal.SIGINT, signal.default_int_handler)
