"""The pickled function for worker processes.

Owns the bytes of the function and the file with them, written once. Invariant: a function that can't be pickled is refused,
with the name of the cause, before anything is claimed.
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

_ALIGNMENT = 64  # bytes; the alignment that NumPy prefers


def write_payload(fd: int, function: Function, retry_on: RetryOn) -> None:
    """Write a function to a file that worker processes can map.

    Args:
        fd: The descriptor of an empty file; it stays open.
        function: The function, with everything it refers to.
        retry_on: Exception types that the worker process needs.

    Raises:
        FunctionError: the function can't be pickled.
    """
    buffers: list[pickle.PickleBuffer] = []
    body = pickled(function, retry_on, buffers.append, is_alone=True)
    parts: list[bytes | memoryview] = [body, *(buffer.raw() for buffer in buffers)]
    spans: list[tuple[int, int]] = []
    # The head contains the positions of the parts, which depend on its length: so it gets spare space.
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
    """Pickle a function together with exception types.

    Args:
        function: The function, with everything it refers to.
        retry_on: The exception types.
        buffer_callback: Receives large buffers, which are then not part of the bytes.
        is_alone: Whether the process that loads it runs only this function.

    Raises:
        FunctionError: the function can't be pickled.
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
    # Version 2 has no back references, so the length of a larger value is an upper bound.
    return marshal.dumps((FreshInterpreter().path(), list(sys.argv), spans), 2)


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _name(function: Any) -> str:
    found = unwrapped(function)
    return str(found.__qualname__ if type(found) is FunctionType else type.__dict__["__qualname__"].__get__(type(found)))


def _culprit(function: Any) -> str | None:
    """Return which object that the function refers to can't be pickled, if there is one."""
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
