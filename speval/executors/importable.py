"""Which modules a fresh interpreter imports by name as they are loaded here.

Owns the comparison of a loaded module with what its name means to an interpreter that starts now with this ``sys.path``.
Invariant: a module passes only if its name leads to the same file there; to find out, nothing is imported or executed.
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
    """What an interpreter that starts now would import; it has our ``sys.path``, and the finders of its site folders only."""

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
        """Tell whether it imports the module of this name as it is in ``sys.modules``."""
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = self._compare(name)
        return known

    def file(self, name: str) -> str | None:
        """Return the file that it imports under a name, if it finds one."""
        spec = self._spec(name)
        return spec.origin if spec is not None else None

    def _spec(self, name: str) -> ModuleSpec | None:
        """Return what it finds under a name, whatever is loaded here."""
        if name not in self._specs:
            parent = name.rpartition(".")[0]
            package = self._spec(parent) if parent else None
            self._specs[name] = None
            if package is not None or not parent:
                with suppress(Exception):  # finders of others run here
                    self._specs[name] = self._find(name, package.submodule_search_locations if package else None)
        return self._specs[name]

    def path(self) -> list[str]:
        """Return the ``sys.path`` that it needs, good in any folder."""
        entries = (entry for entry in sys.path if isinstance(entry, str))
        # Entries that a hook recognises are not paths and must not change, such as those of setuptools' editable namespaces.
        return [entry if self._is_sign(entry) else _absolute(entry) for entry in entries]

    def _compare(self, name: str) -> bool:
        module = sys.modules.get(name)
        # One that is still being imported has called us from its top level; imported again, it would do so again. And
        # __mp_main__ is a name that exists in the children of multiprocessing only.
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
        except Exception:  # finders and modules of others run here
            return False

    def _find(self, name: str, locations: Sequence[str] | None) -> ModuleSpec | None:
        for finder in self._finders:
            spec = self._on_path(name, locations) if finder is PathFinder else finder.find_spec(name, locations)
            if spec is not None:
                return spec
        return None

    def _on_path(self, name: str, locations: Sequence[str] | None) -> ModuleSpec | None:
        """Search as ``PathFinder`` does, with the hooks that are there."""
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
        """Return where submodules of a package are looked for."""
        spec, module = self._specs[parent], sys.modules[parent]
        found = list(spec.submodule_search_locations or []) if spec is not None else []
        if spec is not None and spec.origin is None:
            return found
        path = [entry for entry in getattr(module, "__path__", ()) if isinstance(entry, str)]
        # What a package adds to its own path is added there too, what a script has added is not.
        return (
            path if not found or set(path) <= set(found) or _mentions(getattr(module, "__file__", None), b"__path__") else found
        )

    def _is_made_by_its_package(self, module: object, name: str, parent: str) -> bool:
        """Tell whether a submodule that no finder knows is there as soon as its package, which is the same one, is imported.

        Packages make them 1. out of nothing, as extensions do, 2. by giving another module a second name, 3. with a finder.
        """
        files, root = files_of(module), name.partition(".")[0]
        if set(files) <= set(files_of(sys.modules[parent])) or _is_alias(module, name):
            return True
        path = getattr(sys.modules[parent], "__path__", None)
        return any(finder.find_spec(name, path) is not None for finder in sys.meta_path if _root(finder) == root)

    @staticmethod
    def _has(finder: Any) -> bool:
        """Tell whether a finder, or a hook that makes finders, is there from the start."""
        root = _root(finder)
        return root in _STANDARD or root in _site_roots()


def is_being_imported(module: object) -> bool:
    """Tell whether a module's top level is still running."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def is_compiled(module: object) -> bool:
    """Tell whether a module is an extension, which has no code to send."""
    return any(file.endswith(tuple(EXTENSION_SUFFIXES)) for file in files_of(module))


def files_of(module: object) -> list[str]:
    """Return the file a module is from, under the one or two names that it has."""
    origins = getattr(module, "__file__", None), getattr(getattr(module, "__spec__", None), "origin", None)
    return [origin for origin in origins if isinstance(origin, str)]


def _is_alias(module: object, name: str) -> bool:
    return getattr(getattr(module, "__spec__", None), "name", name) != name


def _is_same(module: object, name: str, spec: ModuleSpec) -> bool:
    files = files_of(module)
    if spec.origin in files:
        return True
    if "." in name and _is_alias(module, name):
        # A package, or the submodule itself, that has put another one in its place does so there too; a script does not.
        parent = getattr(sys.modules[name.rpartition(".")[0]], "__file__", None)
        return any(_mentions(file, b"sys.modules") for file in (parent, spec.origin))
    if not files:
        if spec.origin is None:  # a namespace package
            there = set(_real(spec.submodule_search_locations or ()))
            return hasattr(module, "__path__") and set(_real(module.__path__)) <= there
        return type(module) is not ModuleType  # one that has put another object in its place
    return spec.origin is not None and os.path.realpath(spec.origin) in _real(files)


def _mentions(file: Any, word: bytes) -> bool:
    """Tell whether a source file has a word in it, or can't be read."""
    try:
        return word in Path(str(file)).read_bytes()
    except OSError:  # in a zip, say
        return True


@functools.cache
def _site_roots() -> set[str]:
    """Return the packages that an interpreter imports before any program: those that lines of .pth files name."""
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
