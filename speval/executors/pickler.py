"""Pickles the function and everything it refers to for a fresh interpreter.

Owns the choice between pickling by name and by value. Invariant: an object pickled by name comes from the same file in the
other process. An object for which this is false, and which can't be pickled by value, raises an error that names it.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import importlib.util
import io
import operator
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeVar

import cloudpickle

from .importable import FreshInterpreter, files_of, is_being_imported, is_compiled

__all__ = ["Pickler"]

_internals = cloudpickle.cloudpickle
_NO_FILE = "<dynamic-code>"  # what cloudpickle puts instead
_Cached = type(functools.cache(len))
_dispatched: Any = functools.singledispatch(len)
_make_object: Callable[..., Any] = vars(copyreg)["__newobj__"]
_IMPORT = dis.opmap["IMPORT_NAME"]
_HEAP_TYPE = 1 << 9  # a flag of classes that are not built in
_OF_ANOTHER_PROCESS = ("__builtins__", "__cached__", "__loader__", "__spec__")  # set by the import of a module


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Differs from cloudpickle in five points.

    1. An object is pickled by name only if a fresh interpreter imports the same module; otherwise by value, also modules.
    2. Code keeps the name of its file, so that a traceback shows the lines of a script.
    3. Wrappers of ``functools`` with caches and locks are pickled by value, with empty caches, if the wrapped function is.
    4. An instance that pickles itself by name (a sentinel, a ``NewType``) is pickled by value if its module is.
    5. A proxy of a ``multiprocessing`` manager keeps its authentication key.

    Args:
        file: The output.
        buffer_callback: Receives large buffers, which are then not part of the output.
        is_alone: Whether the other process runs only this function. Then the globals of the script become those of its
            ``__main__``, so that objects pickled there by name are found.
    """

    def __init__(
        self,
        file: io.BytesIO,
        buffer_callback: Callable[[pickle.PickleBuffer], object] | None = None,
        is_alone: bool = False,
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffer_callback)
        self._fresh = FreshInterpreter()
        managers = sys.modules.get("multiprocessing.managers")
        self._proxies: Any = managers.BaseProxy if managers is not None else ()
        if is_alone:
            self.globals_ref[id(vars(sys.modules["__main__"]))] = _MainGlobals()

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is CodeType:
            return self._code(obj)
        if issubclass(kind, ModuleType):
            return self._module(obj)
        if issubclass(kind, self._proxies):
            return _with_its_key(obj)
        if kind is _Cached and hasattr(obj, "cache_parameters") and not self._can_be_named(obj, obj.__qualname__):
            return operator.call, (_Decorator(**obj.cache_parameters()), obj.__wrapped__)
        if kind is functools.cached_property:
            return kind, (obj.func,), {"attrname": obj.attrname, "__doc__": obj.__doc__}
        if kind is functools.singledispatchmethod:
            return kind, (obj.func,), {"dispatcher": obj.dispatcher}
        if kind is FunctionType and obj.__code__ is _dispatched.__code__ and not self._can_be_named(obj, obj.__qualname__):
            return functools.singledispatch, (obj.__wrapped__,), list(obj.registry.items()), None, None, _register_all
        # This concerns classes, and objects with a qualified name, which are kinds of functions, not other instances.
        if issubclass(kind, type) or "__qualname__" in kind.__dict__ or kind is TypeVar:
            name = _home(obj)
            if isinstance(name, str) and name != "__main__" and not self._goes_by_name(name):
                return self._by_value(obj, name)
        elif _reduces_itself(kind) and kind not in self.dispatch_table:
            reduced = obj.__reduce_ex__(5)
            return _named(obj) if isinstance(reduced, str) and not self._can_be_named(obj, reduced) else reduced
        return super().reducer_override(obj)

    def _goes_by_name(self, name: str) -> bool:
        """Tell whether what is in a module goes by name, as far as the module goes."""
        return not isinstance(sys.modules.get(name), ModuleType) or self._fresh.imports(name)

    def _can_be_named(self, obj: Any, qualname: str) -> bool:
        """Tell whether an object is pickled by name."""
        name = obj.__module__
        if not self._fresh.imports(name) or _internals._is_registered_pickle_by_value(sys.modules[name]):
            return False
        try:
            return operator.attrgetter(qualname)(sys.modules[name]) is obj
        except AttributeError:
            return False

    def _by_value(self, obj: Any, name: str) -> Any:
        """Reduce an object whose module is different in the other process."""
        module = sys.modules[name]
        if is_compiled(module):
            raise pickle.PicklingError(self._trouble(name, "a compiled module, which can't be pickled"))
        if isinstance(obj, FunctionType):
            return self._dynamic_function_reduce(obj)
        if isinstance(obj, TypeVar):
            return _internals._make_typevar, _internals._decompose_typevar(obj)
        if isinstance(obj, type) and obj.__flags__ & _HEAP_TYPE:
            return _internals._dynamic_class_reduce(obj)
        return super().reducer_override(obj)

    def _module(self, module: ModuleType) -> Any:
        name = module.__name__
        # The __name__ of some modules differs from the name they are imported by: that of _decimal is "decimal".
        spec: Any = getattr(module, "__spec__", None)
        for known in (name, getattr(spec, "name", name)):
            if known == "__main__" or (sys.modules.get(known) is module and self._fresh.imports(known)):
                if _internals._is_registered_pickle_by_value(module):
                    return NotImplemented
                return importlib.import_module, (known,)
        if is_compiled(module):
            raise pickle.PicklingError(self._trouble(name, "a compiled module, which can't be pickled"))
        # The content is pickled as state, after the module itself, because modules may refer to each other.
        content = {key: value for key, value in vars(module).items() if key not in _OF_ANOTHER_PROCESS}
        if "__path__" in content:
            content["__path__"] = list(content["__path__"])
        return ModuleType, (name,), content

    def _code(self, code: CodeType) -> Any:
        make, parts = self.dispatch_table[CodeType](code)
        return make, tuple(code.co_filename if isinstance(part, str) and part == _NO_FILE else part for part in parts)

    def _dynamic_function_reduce(self, func: FunctionType) -> Any:
        """Reduce a function by value; refuse it if an import in its body would import another file in the other process."""
        for name in _imported(func.__code__, func.__globals__.get("__package__")):
            loaded = name
            while loaded not in sys.modules and "." in loaded:
                loaded = loaded.rpartition(".")[0]
            module = sys.modules.get(loaded)
            if (
                isinstance(module, ModuleType)
                and loaded != "__main__"
                and not is_being_imported(module)
                and not self._fresh.imports(loaded)
                and self._fresh.file(name)
            ):
                raise pickle.PicklingError(self._trouble(loaded, f"imported in the body of {func.__qualname__}()"))
        return super()._dynamic_function_reduce(func)

    def _trouble(self, name: str, what: str) -> str:
        here = (files_of(sys.modules.get(name)) or ["this process"])[0]
        there = self._fresh.file(name)
        found = f"another one, from {there}" if there else "none"
        return (
            f"the module {name!r} is {what}: here it is from {here}, and a fresh interpreter finds {found}. Keep its folder in "
            f"sys.path, before other folders with a module of this name, during the whole call"
        )


class _Decorator:
    """Becomes lru_cache(...) in the worker process."""

    def __init__(self, maxsize: int | None, typed: bool) -> None:
        self.parameters = maxsize, typed

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.lru_cache, self.parameters


class _MainGlobals:
    """Becomes the globals of ``__main__`` in the worker process."""

    def __reduce__(self) -> tuple[Any, ...]:
        main = sys.modules["__main__"]
        values: dict[str, Any] = {key: vars(main)[key] for key in ("__file__", "__package__") if key in vars(main)}
        # A process that multiprocessing spawns there runs the script again, which is intended only if it has a main guard.
        spec = getattr(main, "__spec__", None)
        name = "__main__" if not _is_guarded(values.get("__file__")) else None if spec is None else spec.name
        values["__spec__"] = None if name is None else ModuleSpec(name, None)
        return vars, (main,), None, None, iter(values.items())


def _is_guarded(file: Any) -> bool:
    """Tell whether a script has a main guard."""
    try:
        return re.search(rb"^if\b.*__name__.*__main__", Path(str(file)).read_bytes(), re.MULTILINE) is not None
    except OSError:
        return False


def _home(obj: Any) -> str | None:
    """Return the module of a class or function, or None for methods of built-in classes, which pickle finds by their class."""
    name: str | None = getattr(obj, "__module__", None)
    if name is None and isinstance(obj, (FunctionType, type)):
        # Made by exec() without a module name. cloudpickle searches all modules, and would pickle what it finds by name.
        name = _internals._whichmodule(obj, obj.__qualname__)
    return name


def _reduces_itself(kind: Any) -> bool:
    """Tell whether instances of a class may pickle themselves by name: it has a Python __reduce__, or is from ``typing``."""
    methods = getattr(kind, "__reduce__", None), getattr(kind, "__reduce_ex__", None)
    return kind.__module__ == "typing" or any(isinstance(method, FunctionType) for method in methods)


def _named(obj: Any) -> Any:
    """Return how to create an instance that would pickle itself by name, such as a sentinel or an object of ``typing``."""
    kind = type(obj)
    if kind.__module__ == "typing" and hasattr(obj, "__value__"):  # type X = ...
        return functools.partial(operator.call, kind, type_params=obj.__type_params__), (obj.__name__, obj.__value__)
    if kind.__module__ == "typing" and kind.__name__ in ("ParamSpec", "TypeVarTuple"):
        return kind, (obj.__name__,)
    return _make_object, (kind,), obj.__getstate__()


# A lambda, so that it is pickled by value: the other process may not have speval.
_register_all = lambda function, registry: [function.register(*pair) for pair in registry]  # noqa: E731


def _with_its_key(proxy: Any) -> Any:
    """Return how to create a proxy of a manager in a process that multiprocessing has not started."""
    make, args, *rest = proxy.__reduce__()
    if make.__name__ == "RebuildProxy":
        args = (*args[:3], args[3] | {"authkey": bytes(proxy._authkey)})
    return make, args, *rest


def _imported(code: CodeType, package: str | None) -> Iterator[str]:
    """Yield the full names of modules that the body of a function imports; some may be names of other objects."""
    if _IMPORT in code.co_code[::2]:
        instructions = [instruction for instruction in dis.get_instructions(code) if instruction.opname != "EXTENDED_ARG"]
        for level, names, instruction in zip(instructions, instructions[1:], instructions[2:], strict=False):
            if instruction.opname == "IMPORT_NAME":
                name = "." * level.argval + instruction.argval
                if level.argval:
                    try:
                        name = importlib.util.resolve_name(name, package)
                    except ImportError:  # it leads out of the package, also in the other process
                        continue
                yield name
                yield from (f"{name}.{part}" for part in names.argval or ())
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _imported(part, package)
