"""The function inside what was handed in.

Owns looking through partials and methods. Invariant: it ends, whatever is handed in: attributes are looked up on objects of
known types only, because a mock has all of them and an object may refer to itself.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

__all__ = ["unwrapped"]

_DEEPEST = 100  # partials may be nested, and even in a circle
_func_of = functools.partial.func.__get__


def unwrapped(function: Any) -> Any:
    """Return what is called in the end, by partials and methods."""
    for _ in range(_DEEPEST):
        if issubclass(type(function), functools.partial):  # isinstance() asks the object, which may lie
            function = _func_of(function)
        elif type(function) is MethodType:
            function = function.__func__
        else:
            break
    return function
