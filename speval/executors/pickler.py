"""How the function and all it refers to become bytes for an interpreter that knows nothing of this process.

Owns what goes by name and what by value. Invariant: what goes by name is, over there, from the very file it is from here;
what is not, and can't go by value either, raises an error that names it.
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
_OF_ANOTHER_PROCESS = ("__builtins__", "__cached__", "__loader__", "__spec__")  # what a module has from its import


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Sends some things otherwise than cloudpickle does.

    1. What goes by name is what a fresh interpreter imports alike; all else goes by value, also single modules.
    2. Code keeps the name of its file, by which a traceback shows the lines of a script.
    3. What ``functools`` makes of a function or method, with caches and locks, goes by value where what it is made of does,
       with empty caches.
    4. An instance that goes by its own name (a sentinel, a ``NewType``) goes by value where its module does.
    5. A proxy of a ``multiprocessing`` manager takes its key along.

    Args:
        file: Where the bytes go.
        buffer_callback: Given large buffers, which are left out then.
        is_alone: Whether the other process is for this function only. Then the script's globals become those of its
            ``__main__``, where what is pickled by name over there is found.
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
        # Instances are not looked at, their classes are; an object with a qualified name is some kind of function.
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
        """Tell whether an object goes by name."""
        name = obj.__module__
        if not self._fresh.imports(name) or _internals._is_registered_pickle_by_value(sys.modules[name]):
            return False
        try:
            return operator.attrgetter(qualname)(sys.modules[name]) is obj
        except AttributeError:
            return False

    def _by_value(self, obj: Any, name: str) -> Any:
        """Reduce what is in a module that is not the same one over there."""
        module = sys.modules[name]
        if is_compiled(module):
            raise pickle.PicklingError(self._trouble(name, "a compiled module, which can't travel"))
        if isinstance(obj, FunctionType):
            return self._dynamic_function_reduce(obj)
        if isinstance(obj, TypeVar):
            return _internals._make_typevar, _internals._decompose_typevar(obj)
        if isinstance(obj, type) and obj.__flags__ & _HEAP_TYPE:
            return _internals._dynamic_class_reduce(obj)
        return super().reducer_override(obj)

    def _module(self, module: ModuleType) -> Any:
        name = module.__name__
        # Some say that they have another name than the one they are imported by: _decimal says "decimal".
        spec: Any = getattr(module, "__spec__", None)
        for known in (name, getattr(spec, "name", name)):
            if known == "__main__" or (sys.modules.get(known) is module and self._fresh.imports(known)):
                if _internals._is_registered_pickle_by_value(module):
                    return NotImplemented
                return importlib.import_module, (known,)
        if is_compiled(module):
            raise pickle.PicklingError(self._trouble(name, "a compiled module, which can't travel"))
        # Its content is its state, which follows when the module is known: modules refer to each other.
        content = {key: value for key, value in vars(module).items() if key not in _OF_ANOTHER_PROCESS}
        if "__path__" in content:
            content["__path__"] = list(content["__path__"])
        return ModuleType, (name,), content

    def _code(self, code: CodeType) -> Any:
        make, parts = self.dispatch_table[CodeType](code)
        return make, tuple(code.co_filename if isinstance(part, str) and part == _NO_FILE else part for part in parts)

    def _dynamic_function_reduce(self, func: FunctionType) -> Any:
        """Reduce a function that goes by value. An import in its body brings what the name means over there."""
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
            f"the module {name!r} is {what}: it is from {here} here, and a fresh interpreter finds {found}. Have its folder in "
            f"sys.path, before all others with a module of this name, for the whole call"
        )


class _Decorator:
    """What is lru_cache(...) in the worker process."""

    def __init__(self, maxsize: int | None, typed: bool) -> None:
        self.parameters = maxsize, typed

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.lru_cache, self.parameters


class _MainGlobals:
    """What is the globals of ``__main__`` in the worker process."""

    def __reduce__(self) -> tuple[Any, ...]:
        main = sys.modules["__main__"]
        values: dict[str, Any] = {key: vars(main)[key] for key in ("__file__", "__package__") if key in vars(main)}
        # Processes that multiprocessing spawns over there run the script again, which is meant only where it has a guard.
        spec = getattr(main, "__spec__", None)
        name = "__main__" if not _is_guarded(values.get("__file__")) else None if spec is None else spec.name
        values["__spec__"] = None if name is None else ModuleSpec(name, None)
        return vars, (main,), None, None, iter(values.items())


def _is_guarded(file: Any) -> bool:
    """Tell whether a script asks whether it is the main program."""
    try:
        return re.search(rb"^if\b.*__name__.*__main__", Path(str(file)).read_bytes(), re.MULTILINE) is not None
    except OSError:
        return False


def _home(obj: Any) -> str | None:
    """Return the module of a class or function. Methods of built-in classes have none; pickle reaches them by their class."""
    name: str | None = getattr(obj, "__module__", None)
    if name is None and isinstance(obj, (FunctionType, type)):
        # Code that exec() ran without a module's name. cloudpickle searches all modules, and would send what it finds by name.
        name = _internals._whichmodule(obj, obj.__qualname__)
    return name


def _reduces_itself(kind: Any) -> bool:
    """Tell whether instances of a class may go by their own name: Python code says so, or ``typing`` has made them."""
    methods = getattr(kind, "__reduce__", None), getattr(kind, "__reduce_ex__", None)
    return kind.__module__ == "typing" or any(isinstance(method, FunctionType) for method in methods)


def _named(obj: Any) -> Any:
    """Return how to make an instance that would go by its own name, as sentinels and what ``typing`` makes do."""
    kind = type(obj)
    if kind.__module__ == "typing" and hasattr(obj, "__value__"):  # type X = ...
        return functools.partial(operator.call, kind, type_params=obj.__type_params__), (obj.__name__, obj.__value__)
    if kind.__module__ == "typing" and kind.__name__ in ("ParamSpec", "TypeVarTuple"):
        return kind, (obj.__name__,)
    return _make_object, (kind,), obj.__getstate__()


# Without a name it goes by value itself: the other process may know nothing of speval.
_register_all = lambda function, registry: [function.register(*pair) for pair in registry]  # noqa: E731


def _with_its_key(proxy: Any) -> Any:
    """Return how to make a proxy of a manager in a process that multiprocessing has not started."""
    make, args, *rest = proxy.__reduce__()
    if make.__name__ == "RebuildProxy":
        args = (*args[:3], args[3] | {"authkey": bytes(proxy._authkey)})
    return make, args, *rest


def _imported(code: CodeType, package: str | None) -> Iterator[str]:
    """Return the full names of modules that a function's body imports; there may be names of other things among them."""
    if _IMPORT in code.co_code[::2]:
        instructions = [instruction for instruction in dis.get_instructions(code) if instruction.opname != "EXTENDED_ARG"]
        for level, names, instruction in zip(instructions, instructions[1:], instructions[2:], strict=False):
            if instruction.opname == "IMPORT_NAME":
                name = "." * level.argval + instruction.argval
                if level.argval:
                    try:
                        name = importlib.util.resolve_name(name, package)
                    except ImportError:  # it leads out of the package: so it does over there
                        continue
                yield name
                yield from (f"{name}.{part}" for part in names.argval or ())
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _imported(part, package)
