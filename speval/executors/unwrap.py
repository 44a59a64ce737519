"""The function inside partials and methods.

Owns unwrapping them. Invariant: it ends for every object: attributes are read only from objects of known types, because a mock
has every attribute and an object may refer to itself.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

__all__ = ["unwrapped"]

_DEEPEST = 100  # partials may be nested, or circular
_func_of = functools.partial.func.__get__


def unwrapped(function: Any) -> Any:
    """Return the function that partials and methods finally call."""
    for _ in range(_DEEPEST):
        if issubclass(type(function), functools.partial):  # isinstance() reads __class__ of the object, which may be wrong
            function = _func_of(function)
        elif type(function) is MethodType:
            function = function.__func__
        else:
            break
    return function
