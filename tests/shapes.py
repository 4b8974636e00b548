"""Shapes that signatures tell, `Float[Tensor, "B K"]`, are checked while the tests run: dimensions of one name are equal within a call.

The package imports jaxtyping for type checkers alone, so nothing is checked, and nothing costs time, outside of the tests.
"""

import functools
import importlib.abc
import inspect
import re
import sys
import types
import typing
from importlib.machinery import PathFinder

import jaxtyping

PACKAGE = "mergekit_vl."
KINDS = ("Bool", "Float", "Int", "UInt")
TOLD = re.compile(rf"\b({'|'.join(KINDS)})\[(Tensor|Array), ['\"]")
"""What an annotation with a shape holds."""


def install():
    """Check every module of the package that is imported from now on."""
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name.startswith(PACKAGE) else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _check_module(module)

        spec.loader.exec_module = exec_module
        return spec


def _check_module(module):
    for name, member in list(vars(module).items()):
        if getattr(member, "__module__", None) != module.__name__:
            continue
        if isinstance(member, types.FunctionType):
            setattr(module, name, checked(member))
        elif isinstance(member, type):
            for inside, own in list(vars(member).items()):
                if isinstance(own, types.FunctionType) and (made := checked(own)) is not own:
                    setattr(member, inside, made)


@functools.cache
def _names():
    import numpy
    import torch

    return {"Tensor": torch.Tensor, "Array": numpy.ndarray, **{name: getattr(jaxtyping, name) for name in KINDS}}


def checked(function):
    """The function with its arguments and its answer checked; itself where its signature tells no shapes."""
    annotations = function.__annotations__.items()
    told = {name: text for name, text in annotations if isinstance(text, str) and TOLD.search(text)}
    if not told:
        return function
    hints = {name: eval(text, function.__globals__ | _names()) for name, text in told.items()}
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        with jaxtyping.jaxtyped("context"):
            given = signature.bind(*args, **kwargs).arguments
            for name, value in given.items():
                _check(function, name, value, hints.get(name))
            answer = function(*args, **kwargs)
            _check(function, "return", answer, hints.get("return"))
            return answer

    return call


def _check(function, name, value, hint):
    if not _fits(value, hint):
        kind = f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else type(value).__name__
        raise TypeError(f"{function.__qualname__}: {name} is {kind}, not {function.__annotations__[name]}")


def _fits(value, hint):
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return len(value) == len(typing.get_args(hint)) and all(map(_fits, value, typing.get_args(hint)))
    return isinstance(value, hint) if isinstance(hint, type) else True
