"""Functions and eval spaces named on a command line.

Owns the conversion of ``module:function`` to a function, and of a file or a grid to an eval space. Invariant: an input that
can't be read is an error that names the file and the line.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import itertools
import json
import math
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from ..errors import CalledInWorkerError

__all__ = ["load_object", "load_space"]


def load_object(reference: str, what: str) -> Any:
    """Import and return the object that ``module:name`` or ``file.py:name`` names.

    Raises:
        ClickException: the object does not exist, or its module can't be imported.
    """
    where, _, name = reference.rpartition(":")
    if not where or not name:
        raise click.ClickException(f"{reference!r} does not name a {what}; write module:name or file.py:name")
    module = _from_file(Path(where)) if where.endswith(".py") or "/" in where else _by_name(where)
    found: Any = module
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise click.ClickException(f"{where} has no {name!r}") from None
    return found


def _by_name(name: str) -> ModuleType:
    # As `python -m` does: the first entry of sys.path is the folder of the command, not the current folder.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    with _imported(name):
        return importlib.import_module(name)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise click.ClickException(f"{path} does not exist")
    # The file can import modules from its own folder, as a script can.
    if (folder := str(path.parent.absolute())) not in sys.path:
        sys.path.insert(0, folder)
    with _imported(str(path)):
        module = importlib.import_module(path.stem)
    if module.__file__ is None or not path.samefile(module.__file__):
        raise click.ClickException(f"can't import {path}: another module is named {path.stem!r}; give the file another name")
    return module


@contextmanager
def _imported(what: str) -> Iterator[None]:
    """Turn an exception during an import into a one-line error; refuse a call of speval at the top level of a module."""
    sys.speval_loading = True  # type: ignore[attr-defined]
    try:
        yield
    except CalledInWorkerError:
        raise click.ClickException(
            f'{what} calls speval at its top level; move the call under if __name__ == "__main__"'
        ) from None
    except ModuleNotFoundError as error:
        raise click.ClickException(f"can't import {what}: {error}") from None
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename}:{frame.lineno}"
        if isinstance(error, SyntaxError):
            place = f"{error.filename}:{error.lineno}"
        problem = traceback.format_exception_only(error)[-1].strip()
        raise click.ClickException(f"can't import {what}: {problem} ({place})") from None
    finally:
        del sys.speval_loading  # type: ignore[attr-defined]


def load_space(source: str, name_key: str | None) -> Mapping[str, Any] | Iterable[Any]:
    """Return the eval space that a command line names.

    Args:
        source: A file of JSON lines (.jsonl), a table (.csv), ``grid:lr=0.1,0.01;depth=2,4``, or ``module:name`` of a space or
            of a function that returns one.
        name_key: The key in the args that holds the name of the evaluation.

    Raises:
        ClickException: the source can't be read.
    """
    if source.startswith("grid:"):
        return _named_by(name_key, enumerate(_grid(source).values(), 1), source) if name_key else _grid(source)
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson", ".csv"):
        if not path.is_file():
            raise click.ClickException(f"{source} does not exist")
        rows = _csv_rows(path) if suffix == ".csv" else _json_lines(path)
        return _named_by(name_key, rows, source) if name_key else (args for _, args in rows)
    if ":" in source:
        space = load_object(source, "eval space")
        space = space() if callable(space) and not isinstance(space, Mapping) else space
        return _named_by(name_key, enumerate(space, 1), source) if name_key else space
    raise click.ClickException(f"--space {source}: expected a .jsonl or .csv file, grid:lr=0.1,0.01;depth=2,4 or module:name")


def _grid(source: str) -> dict[str, dict[str, Any]]:
    """Return a grid whose evaluations are named by their args, so that the grid can grow later."""
    axes: dict[str, list[str]] = {}
    for part in source.removeprefix("grid:").split(";"):
        key, equals, values = part.strip().partition("=")
        if not equals or not key.strip() or not values.strip():
            raise click.ClickException(
                f"--space {source}: expected KEY=VALUE,VALUE instead of {part!r}; quote the whole grid for the shell"
            )
        if key.strip() in axes:
            raise click.ClickException(f"--space {source}: {key.strip()!r} appears twice")
        axes[key.strip()] = list(dict.fromkeys(value.strip() for value in values.split(",")))
    points = itertools.product(*axes.values())
    return {
        ";".join(f"{key}={value}" for key, value in zip(axes, point, strict=True)): {
            key: _scalar(value) for key, value in zip(axes, point, strict=True)
        }
        for point in points
    }


def _scalar(text: str) -> Any:
    """Return the value of a text in a table or a grid: a number, True, False, None if it is empty, or the text."""
    if text == "":
        return None
    if text in ("true", "false", "True", "False"):
        return text in ("true", "True")
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        # 007 and 1_000 are identifiers: they stay text.
        is_plain = "_" not in text and not (text.lstrip("+-")[:1] == "0" and text.lstrip("+-")[1:2].isdigit())
        return value if is_plain and (math.isfinite(value) or "n" in text.lower()) else text
    return text


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise click.ClickException(f"{path}:{reader.line_num}: the number of values differs from the header")
                yield reader.line_num, {key: _scalar(value) for key, value in row.items()}
        except (csv.Error, UnicodeDecodeError) as error:
            raise click.ClickException(f"{path}:{reader.line_num + 1}: {error}") from None


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line)
    except (ValueError, RecursionError) as error:
        raise click.ClickException(f"{path}:{max(1, number)}: invalid JSON ({error})") from None


def _named_by(key: str, rows: Iterable[tuple[int, Any]], source: str) -> dict[str, Any]:
    """Return args by name; the name is the value of ``key`` in the args."""
    space: dict[str, Any] = {}
    for number, args in rows:
        if not isinstance(args, dict) or args.get(key) is None:
            raise click.ClickException(f"{source}:{number}: --name {key}: the args have no key {key!r}")
        name = args[key] if isinstance(args[key], str) else json.dumps(args[key])
        if name in space:
            raise click.ClickException(f"{source}:{number}: another evaluation already has the name {name!r}")
        space[name] = args
    return space
