"""The function on its way to the worker processes.

Owns the pickling of the function and the file it is written to, once. Invariant: whatever a fresh interpreter could not
import by name travels by value, and what can't travel at all is refused by name before anything is claimed.
"""

from __future__ import annotations

import functools
import inspect
import io
import marshal
import operator
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, ModuleType
from typing import Any

import cloudpickle

from ..errors import FunctionError
from ..model import Function, RetryOn

__all__ = ["pickled", "write_payload"]

_NO_FILE = "<dynamic-code>"  # what cloudpickle puts instead
_Cached = type(functools.cache(len))
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
    body = pickled(function, retry_on, buffers.append)
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
    function: Function, retry_on: RetryOn, buffer_callback: Callable[[pickle.PickleBuffer], object] | None = None
) -> bytes:
    """Pickle a function with the exception types that go with it.

    Raises:
        FunctionError: it can't be pickled.
    """
    with _by_value(function):
        try:
            _Pickler(file := io.BytesIO(), protocol=5, buffer_callback=buffer_callback).dump((function, retry_on))
        except Exception as error:
            raise FunctionError(_name(function), _culprit(function) or f"{type(error).__name__}: {error}") from error
    return file.getvalue()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Sends two things otherwise than cloudpickle does.

    1. Code keeps the name of its file, by which a traceback shows the lines of a script.
    2. A function with ``functools.cache`` goes by value where a function without would, with an empty cache.
    """

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is CodeType:
            make, parts = self.dispatch_table[CodeType](obj)
            return make, tuple(obj.co_filename if isinstance(part, str) and part == _NO_FILE else part for part in parts)
        if type(obj) is _Cached and hasattr(obj, "cache_parameters") and not _can_be_named(obj):
            return operator.call, (_Decorator(**obj.cache_parameters()), obj.__wrapped__)
        return super().reducer_override(obj)


class _Decorator:
    """What is lru_cache(...) in the worker process."""

    def __init__(self, maxsize: int | None, typed: bool) -> None:
        self.parameters = maxsize, typed

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.lru_cache, self.parameters


def _can_be_named(function: Any) -> bool:
    """Tell whether a function goes by name: importing its module brings the same one."""
    module = function.__module__
    if module == "__main__" or module in cloudpickle.list_registry_pickle_by_value():
        return False
    try:
        return operator.attrgetter(function.__qualname__)(sys.modules[module]) is function
    except (AttributeError, KeyError):
        return False


def _head(spans: list[tuple[int, int]]) -> bytes:
    path = [entry for entry in sys.path if isinstance(entry, str)]
    # A relative path would be another one after the function has changed the folder.
    # Version 2 writes everything out; later ones refer to what they have written already, and the length would be no bound.
    return marshal.dumps(([os.path.abspath(entry) for entry in path], list(sys.argv), spans), 2)  # noqa: PTH100


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


@contextmanager
def _by_value(function: Function) -> Iterator[None]:
    """Have cloudpickle send modules by value that a fresh interpreter could not, or must not, import by name."""
    registered = []
    for module in _unimportable(function):
        if module.__name__ not in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.register_pickle_by_value(module)
            registered.append(module)
    try:
        yield
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)


def _unimportable(function: Function) -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        # One that is still being imported has called us from its top level; imported again, it would do so again. And
        # __mp_main__ is a name that exists in the children of multiprocessing only.
        if isinstance(module, ModuleType) and (name == "__mp_main__" or _is_being_imported(module)):
            yield module
    home = sys.modules.get(getattr(_plain(function), "__module__", None) or "")
    if home is not None and home.__name__ != "__main__" and not _can_be_found(home.__name__):
        yield home


def _is_being_imported(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False)) and module.__name__ != "__main__"


def _can_be_found(name: str) -> bool:
    """Tell whether a fresh interpreter with our sys.path finds a module of this name."""
    # find_spec() would answer from sys.modules, where also modules are that no finder knows.
    try:
        folders = None
        for part in (names := name.split(".")):
            path = ".".join(names[: names.index(part) + 1])
            spec = None
            for finder in sys.meta_path:
                spec = finder.find_spec(path, folders)
                if spec is not None:
                    break
            if spec is None:
                return False
            folders = spec.submodule_search_locations
    except Exception:
        return False
    return True


def _plain(function: Any) -> Any:
    """Return the function inside partials, methods and callable objects, or the class of an object."""
    while hasattr(function, "func"):
        function = function.func
    function = getattr(function, "__func__", function)
    return function if inspect.isfunction(function) or inspect.isclass(function) else type(function)


def _name(function: Any) -> str:
    return getattr(_plain(function), "__qualname__", None) or repr(function)


def _culprit(function: Any) -> str | None:
    """Name what keeps the function from being pickled, if it is one of the things the function refers to."""
    plain = _plain(function)
    if not inspect.isfunction(plain):
        return None
    found = inspect.getclosurevars(plain)
    parts: list[tuple[str, str, Any]] = [("global", name, value) for name, value in found.globals.items()]
    parts += [("variable", name, value) for name, value in found.nonlocals.items()]
    parts += [("default", name, value) for name, value in (plain.__kwdefaults__ or {}).items()]
    parts += [("default", f"number {i}", value) for i, value in enumerate(plain.__defaults__ or ())]
    for kind, name, value in parts:
        try:
            cloudpickle.dumps(value)
        except Exception as error:
            return f"its {kind} {name!r} is a {type(value).__qualname__}, and {error}"
    return None
