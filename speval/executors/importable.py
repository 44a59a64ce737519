"""Which loaded modules a fresh interpreter would import from the same file.

Owns the comparison of a loaded module with the module that a new interpreter with this ``sys.path`` finds under its name.
Invariant: a module passes only if its name leads to the same file there; the check imports and executes nothing.
"""

from __future__ import annotations

import functools
import os
import re
import site
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.machinery import EXTENSION_SUFFIXES, BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["FreshInterpreter", "files_of", "is_being_imported", "is_compiled"]

_STANDARD = {"_frozen_importlib", "_frozen_importlib_external", "importlib", "zipimport"}  # packages of finders and of hooks


class FreshInterpreter:
    """A model of what a new interpreter would import, with our ``sys.path`` and only the finders of its site folders."""

    def __init__(self) -> None:
        self._known: dict[str, bool] = {}
        self._specs: dict[str, ModuleSpec | None] = {}
        self._entries: dict[str, Any] = {}
        self._finders = [finder for finder in sys.meta_path if self._has(finder)] or [
            BuiltinImporter,
            FrozenImporter,
            PathFinder,
        ]

    def imports(self, name: str) -> bool:
        """Tell whether it imports the same module under this name as the one in ``sys.modules``."""
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = self._compare(name)
        return known

    def file(self, name: str) -> str | None:
        """Return the file that it finds under a name, or None."""
        spec = self._spec(name)
        return spec.origin if spec is not None else None

    def _spec(self, name: str) -> ModuleSpec | None:
        """Return the spec that it finds under a name, independent of what is loaded here."""
        if name not in self._specs:
            parent = name.rpartition(".")[0]
            package = self._spec(parent) if parent else None
            self._specs[name] = None
            if package is not None or not parent:
                with suppress(Exception):  # this runs finders of other packages
                    self._specs[name] = self._find(name, package.submodule_search_locations if package else None)
        return self._specs[name]

    def path(self) -> list[str]:
        """Return the ``sys.path`` for it, with absolute paths."""
        entries = (entry for entry in sys.path if isinstance(entry, str))
        # An entry that a path hook recognises, such as those of setuptools' editable namespaces, must not be changed.
        return [entry if self._is_sign(entry) else _absolute(entry) for entry in entries]

    def _compare(self, name: str) -> bool:
        module = sys.modules.get(name)
        # A module that is still being imported has called speval at its top level, and would call it again when imported
        # again. The name __mp_main__ exists only in children of multiprocessing.
        if module is None or name in ("__main__", "__mp_main__") or is_being_imported(module):
            return False
        parent = name.rpartition(".")[0]
        if parent and not self.imports(parent):
            return False
        try:
            spec = self._specs[name] = self._find(name, self._locations(parent) if parent else None)
            if spec is None:
                return bool(parent) and self._is_made_by_its_package(module, name, parent)
            return _is_same(module, name, spec)
        except Exception:  # this runs finders and modules of other packages
            return False

    def _find(self, name: str, locations: Sequence[str] | None) -> ModuleSpec | None:
        for finder in self._finders:
            spec = self._on_path(name, locations) if finder is PathFinder else finder.find_spec(name, locations)
            if spec is not None:
                return spec
        return None

    def _on_path(self, name: str, locations: Sequence[str] | None) -> ModuleSpec | None:
        """Search as ``PathFinder`` does, with the path hooks of the new interpreter."""
        portions: list[str] = []
        for entry in sys.path if locations is None else locations:
            finder = self._entry(entry) if isinstance(entry, str) else None
            spec = finder.find_spec(name) if finder is not None else None
            if spec is not None and spec.loader is not None:
                found: ModuleSpec = spec
                return found
            portions += (spec.submodule_search_locations or []) if spec is not None else []
        if not portions:
            return None
        namespace = ModuleSpec(name, None, is_package=True)
        namespace.submodule_search_locations = portions
        return namespace

    def _entry(self, entry: str) -> Any:
        """Return the finder for an entry of a path, or None."""
        if entry not in self._entries:
            place = entry if self._is_sign(entry) else _absolute(entry)
            finder = sys.path_importer_cache.get(place)
            self._entries[entry] = finder if finder is not None and self._has(finder) else self._made(place)
        return self._entries[entry]

    def _made(self, place: str) -> Any:
        for hook in sys.path_hooks:
            if self._has(hook):
                with suppress(ImportError):
                    return hook(place)
        return None

    def _is_sign(self, entry: str) -> bool:
        finder = sys.path_importer_cache.get(entry)
        return finder is not None and _root(finder) not in _STANDARD and self._has(finder)

    def _locations(self, parent: str) -> list[str]:
        """Return the search path for submodules of a package."""
        spec, module = self._specs[parent], sys.modules[parent]
        found = list(spec.submodule_search_locations or []) if spec is not None else []
        if spec is not None and spec.origin is None:
            return found
        path = [entry for entry in getattr(module, "__path__", ()) if isinstance(entry, str)]
        # A package extends its path in the new interpreter too; entries that a script has added are missing there.
        return (
            path if not found or set(path) <= set(found) or _mentions(getattr(module, "__file__", None), b"__path__") else found
        )

    def _is_made_by_its_package(self, module: object, name: str, parent: str) -> bool:
        """Tell whether importing the package, which is the same one, also creates this submodule, which no finder knows.

        Packages create submodules 1. in code, as extensions do, 2. as an alias of another module, 3. with a finder.
        """
        files, root = files_of(module), name.partition(".")[0]
        if set(files) <= set(files_of(sys.modules[parent])) or _is_alias(module, name):
            return True
        path = getattr(sys.modules[parent], "__path__", None)
        return any(finder.find_spec(name, path) is not None for finder in sys.meta_path if _root(finder) == root)

    @staticmethod
    def _has(finder: Any) -> bool:
        """Tell whether a new interpreter has this finder or path hook at its start."""
        root = _root(finder)
        return root in _STANDARD or root in _site_roots()


def is_being_imported(module: object) -> bool:
    """Tell whether the top level of a module is still running."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def is_compiled(module: object) -> bool:
    """Tell whether a module is a compiled extension, which can't be pickled."""
    return any(file.endswith(tuple(EXTENSION_SUFFIXES)) for file in files_of(module))


def files_of(module: object) -> list[str]:
    """Return the one or two names of the file of a module."""
    origins = getattr(module, "__file__", None), getattr(getattr(module, "__spec__", None), "origin", None)
    return [origin for origin in origins if isinstance(origin, str)]


def _is_alias(module: object, name: str) -> bool:
    return getattr(getattr(module, "__spec__", None), "name", name) != name


def _is_same(module: object, name: str, spec: ModuleSpec) -> bool:
    files = files_of(module)
    if spec.origin in files:
        return True
    if "." in name and _is_alias(module, name):
        # If the package or the submodule itself replaces the module, it does so in the new interpreter too; a script doesn't.
        parent = getattr(sys.modules[name.rpartition(".")[0]], "__file__", None)
        return any(_mentions(file, b"sys.modules") for file in (parent, spec.origin))
    if not files:
        if spec.origin is None:  # a namespace package
            there = set(_real(spec.submodule_search_locations or ()))
            return hasattr(module, "__path__") and set(_real(module.__path__)) <= there
        return type(module) is not ModuleType  # a module that has replaced itself with an object
    return spec.origin is not None and os.path.realpath(spec.origin) in _real(files)


def _mentions(file: Any, word: bytes) -> bool:
    """Tell whether a source file contains a word, or can't be read."""
    try:
        return word in Path(str(file)).read_bytes()
    except OSError:  # for example in a zip file
        return True


@functools.cache
def _site_roots() -> set[str]:
    """Return the packages that an interpreter imports at its start: those in lines of .pth files."""
    roots = {"sitecustomize", "usercustomize"}
    if sys.flags.no_site:
        return roots
    for folder in {*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])}:
        with suppress(OSError):
            for file in Path(folder).glob("*.pth"):
                lines = file.read_text(errors="replace").splitlines()
                roots.update(word for line in lines if line.startswith("import") for word in re.findall(r"\w+", line))
    return roots


def _root(thing: Any) -> str:
    module = getattr(thing, "__module__", None) or type(thing).__module__
    return str(module).partition(".")[0]


def _absolute(entry: str) -> str:
    return os.path.abspath(entry)  # noqa: PTH100 - of a Path, links would be followed only where they exist


def _real(paths: Iterable[str]) -> list[str]:
    return [os.path.realpath(path) for path in paths]
