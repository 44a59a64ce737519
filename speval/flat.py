"""Evaluations as flat rows: a column for each argument and each key of the result.

Owns the conversion of nested values to columns, for data frames and exported files. Invariant: no part of args and results is
dropped, and a column has the same meaning in every row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, overload

from .codec import encode
from .errors import MissingExtraError, OptionError
from .model import Evaluation, Status
from .options import checked_database, checked_status
from .stores import make_control

if TYPE_CHECKING:
    import pandas
    import polars

__all__ = ["flattened", "needs", "table", "to_frame", "unmixed"]

# Args and results stand between these.
_BEFORE = ("name", "status")
_AFTER = ("attempts", "started", "duration", "updated", "worker", "error.cause", "error.type", "error.message")


def flattened(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as one flat row.

    Dicts in args and result become columns: ``args.lr``, ``result.loss``, ``result.scores.f1``. Any other value, also a list,
    is the value of one column; args or a result that are not a dict have the column ``args`` or ``result``. A key with dots is
    followed by an apostrophe per dot: ``args.a.b'`` is the value of "a.b", ``args.a.b`` that of "b" in "a".
    """
    row: dict[str, Any] = {"name": evaluation["name"], "status": evaluation["status"]}
    _flatten(row, "args", evaluation["args"])
    if evaluation["status"] == "completed":
        _flatten(row, "result", evaluation["result"])
    for key in ("attempts", "started", "duration", "updated", "worker"):
        row[key] = evaluation[key]
    if error := evaluation["error"]:
        # No traceback: its many lines do not fit into a table cell.
        row |= {"error.cause": error["cause"], "error.type": error["type"], "error.message": error["message"]}
    return row


def _flatten(row: dict[str, Any], column: str, value: Any) -> None:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            _flatten(row, f"{column}.{_marked(key)}", item)
    else:
        row[column] = value


def _marked(key: str) -> str:
    """Return a key for a column name: two paths of keys never have the same column name."""
    # The end of a column name shows how many dots belong to the last key, and so where the key starts.
    if key.endswith(("'", '"')):
        key += '"'
    return key + "'" * key.count(".")


def table(evaluations: Iterable[Evaluation]) -> dict[str, list[Any]]:
    """Return flat columns of equal length, with None for missing values.

    Name and status come first, then the args and the results in the order in which they first appear, then the rest.
    """
    columns: dict[str, list[Any]] = {}
    count = 0
    for evaluation in evaluations:
        for column, value in flattened(evaluation).items():
            values = columns.setdefault(column, [])
            values.extend([None] * (count - len(values)))
            values.append(value)
        count += 1
    for values in columns.values():
        values.extend([None] * (count - len(values)))
    return {column: columns.get(column) or [None] * count for column in ordered(columns)}


def ordered(columns: Iterable[str]) -> list[str]:
    """Return columns in display order: name and status, args, results, the other fixed columns."""
    given = list(columns)
    args = [column for column in given if column == "args" or column.startswith("args.")]
    results = [column for column in given if column == "result" or column.startswith("result.")]
    return [*_BEFORE, *args, *results, *_AFTER]


def unmixed(values: list[Any]) -> list[Any]:
    """Return a column with values of one type, for files and frames with typed columns.

    Whole numbers among floats become floats, if every one keeps its value. If the values have no common type, all of them
    become JSON text.
    """
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float} and not _has_finer(values):
        return [value if value is None else float(value) for value in values]
    is_plain = len(kinds) <= 1 and dict not in kinds
    if is_plain and (list not in kinds or _are_alike(values)) and (int not in kinds or _fit(values)):
        return values
    return [value if value is None else encode(value, "a value") for value in values]


def _has_finer(values: list[Any]) -> bool:
    """Tell whether a whole number in the list has no exact float."""
    return any(type(value) is int and not -(2**53) <= value <= 2**53 for value in values)


def _are_alike(lists: list[Any]) -> bool:
    """Tell whether all items of the lists have one type, and it is neither list nor dict."""
    kinds = {type(item) for items in lists if items is not None for item in items if item is not None}
    return len(kinds) <= 1 and not kinds & {dict, list} and (int not in kinds or all(_fit(items) for items in lists if items))


def _fit(values: list[Any]) -> bool:
    return all(value is None or -(2**63) <= value < 2**63 for value in values)


def needs(module: str, what: str, extra: str) -> None:
    """Check that a package is installed.

    Raises:
        MissingExtraError: the package is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(what, module, extra)


@overload
def to_frame(db: str | PathLike[str], *, status: Status | None = ..., library: Literal["pandas"] = ...) -> pandas.DataFrame: ...
@overload
def to_frame(db: str | PathLike[str], *, status: Status | None = ..., library: Literal["polars"]) -> polars.DataFrame: ...
def to_frame(db: str | PathLike[str], *, status: Status | None = None, library: Literal["pandas", "polars"] = "pandas") -> Any:
    """Read evaluations into a data frame, a row for each, with a column for each argument and each key of the result.

    This changes nothing and blocks no worker.

    Args:
        db: The database: a file name or a URL.
        status: Only evaluations with this status. None: all.
        library: Whose data frame: ``"pandas"`` or ``"polars"``; ``speval[pandas]`` and ``speval[polars]`` install them.

    Returns:
        A frame in eval-space order: ``name``, ``status``, ``args.*``, ``result.*``, ``attempts``, ``started``, ``duration``,
        ``updated``, ``worker``, ``error.cause``, ``error.type``, ``error.message``. Args and results that are not a dict are
        one column, ``args`` or ``result``. With polars, a column whose values have no common type contains JSON text.

    Raises:
        MissingExtraError: the library is not installed.
        DatabaseError: the database does not exist, or can't be read.
    """
    path = checked_database(db)
    checked_status(status, (None, "pending", "in_progress", "completed", "failed"))
    if library not in ("pandas", "polars"):
        raise OptionError("library", repr(library), "'pandas' or 'polars'")
    needs(library, f"library={library!r}", library)
    with make_control(path) as control:
        columns = table(control.evaluations(status=status))
    if library == "polars":
        import polars

        return polars.DataFrame({column: polars.Series(column, unmixed(values)) for column, values in columns.items()})
    import pandas

    return pandas.DataFrame({column: _exact(pandas, values) for column, values in columns.items()})


def _exact(pandas: Any, values: list[Any]) -> Any:
    """Return a pandas column: of objects, if pandas would convert whole numbers to inexact floats."""
    if any(type(value) is not int for value in values) and _has_finer(values):
        return pandas.Series(values, dtype=object)
    return values
