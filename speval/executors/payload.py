"""The function on its way to the worker processes.

Owns the bytes of the function and the file they are written to, once. Invariant: what can't travel is refused by name before
anything is claimed.
"""

from __future__ import annotations

import inspect
import io
import marshal
import pickle
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

from ..errors import FunctionError
from ..model import Function, RetryOn
from .importable import FreshInterpreter
from .pickler import Pickler
from .unwrap import unwrapped

__all__ = ["pickled", "write_payload"]

_ALIGNMENT = 64  # bytes; what NumPy likes for its arrays


def write_payload(fd: int, function: Function, retry_on: RetryOn) -> None:
    """Write a function where worker processes can map it.

    Args:
        fd: An empty file's descriptor; it stays open.
        function: The function, with all it refers to.
        retry_on: Exception types the worker has to know.

    Raises:
        FunctionError: the function can't be pickled.
    """
    buffers: list[pickle.PickleBuffer] = []
    body = pickled(function, retry_on, buffers.append, is_alone=True)
    parts: list[bytes | memoryview] = [body, *(buffer.raw() for buffer in buffers)]
    spans: list[tuple[int, int]] = []
    # The head tells where the parts are, and how long it is itself depends on that: so it gets room to spare.
    start = _aligned(8 + len(_head([(2**60, 2**60)] * len(parts))))
    for part in parts:
        spans.append((start, start + len(part)))
        start = _aligned(start + len(part))
    head = _head(spans)
    assert 8 + len(head) <= spans[0][0]
    with open(fd, "wb", closefd=False) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for part, (begin, _) in zip(parts, spans, strict=True):
            file.seek(begin)
            file.write(part)


def pickled(
    function: Function,
    retry_on: RetryOn,
    buffer_callback: Callable[[pickle.PickleBuffer], object] | None = None,
    is_alone: bool = False,
) -> bytes:
    """Pickle a function with the exception types that go with it.

    Args:
        function: The function, with all it refers to.
        retry_on: The exception types.
        buffer_callback: Given large buffers, which are left out then.
        is_alone: Whether a process that loads it has nothing else to do.

    Raises:
        FunctionError: it can't be pickled.
    """
    try:
        return _dumped((function, retry_on), buffer_callback, is_alone)
    except Exception as error:
        raise FunctionError(_name(function), _culprit(function) or _text(error)) from error


def _dumped(value: Any, *options: Any) -> bytes:
    Pickler(file := io.BytesIO(), *options).dump(value)
    return file.getvalue()


def _text(error: Exception) -> str:
    return str(error) if type(error) is pickle.PicklingError else f"{type(error).__name__}: {error}"


def _head(spans: list[tuple[int, int]]) -> bytes:
    # Version 2 writes everything out; later ones refer to what they have written already, and the length would be no bound.
    return marshal.dumps((FreshInterpreter().path(), list(sys.argv), spans), 2)


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _name(function: Any) -> str:
    found = unwrapped(function)
    return str(found.__qualname__ if type(found) is FunctionType else type.__dict__["__qualname__"].__get__(type(found)))


def _culprit(function: Any) -> str | None:
    """Name what keeps the function from being pickled, if it is one of the things the function refers to."""
    plain = unwrapped(function)
    if type(plain) is not FunctionType:
        return None
    found = inspect.getclosurevars(plain)
    parts: list[tuple[str, str, Any]] = [("global", name, value) for name, value in found.globals.items()]
    parts += [("variable", name, value) for name, value in found.nonlocals.items()]
    parts += [("default", name, value) for name, value in (plain.__kwdefaults__ or {}).items()]
    parts += [("default", f"number {i}", value) for i, value in enumerate(plain.__defaults__ or ())]
    for kind, name, value in parts:
        try:
            _dumped(value)
        except Exception as error:
            return f"its {kind} {name!r} is a {type(value).__qualname__}, and {error}"
    return None
