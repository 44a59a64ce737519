"""Copies one database to another one of any kind.

Owns the order of the steps. Invariant: the source is only read, and the target is filled completely or not changed.
"""

from __future__ import annotations

from os import PathLike
from typing import NamedTuple

from ..errors import DatabaseNotEmptyError, EvaluationDamagedError, OptionError
from ..options import Location, checked_database
from ..url import PostgresUrl
from . import make_archive, make_salvage
from .archive import Counts

__all__ = ["Salvaged", "copy", "salvage"]


class Salvaged(NamedTuple):
    """The result of a salvage: the counts of what was saved, and the damaged evaluations."""

    copied: Counts
    lost: list[EvaluationDamagedError]  # the first thousand
    lost_count: int


def copy(source: str | PathLike[str] | Location, target: str | PathLike[str]) -> Counts:
    """Copy a whole database to an empty one: evaluations with their status, attempts, and settings.

    Workers may use the source meanwhile: the copy is a snapshot. Evaluations in progress are pending in the target, and no
    attempt is charged for them.

    Args:
        source: A file name or a URL; also a database of speval 0.1.1.
        target: A file name or a URL; created if it does not exist.

    Returns:
        The number of evaluations and attempts copied; they are durable.

    Raises:
        DatabaseNotEmptyError: the target has evaluations; it was not changed.
        DatabaseError: one of the two can't be used; the target then has no evaluations.
    """
    read = make_archive(checked_database(source), "read")
    try:
        written = make_archive(checked_database(target), "create")
        try:
            return read.read(written.fill)
        finally:
            written.close()
    finally:
        read.close()


def salvage(source: str | PathLike[str], target: str | PathLike[str]) -> Salvaged:
    """Copy the intact rows of a damaged file to an empty database.

    The damaged file is only read. An evaluation with a damaged result is pending in the new database.

    Args:
        source: A file name.
        target: A file name or a URL; created if it does not exist.

    Raises:
        DatabaseNotEmptyError: the target has evaluations; it was not changed.
        DatabaseError: the source can't be read at all, or the target can't be used.
    """
    path, new = checked_database(source), checked_database(target)
    if isinstance(path, PostgresUrl):
        raise OptionError("source", repr(path.shown), "name a file; restore a server from its own backups")
    if path == new:
        raise DatabaseNotEmptyError(str(target))
    read = make_salvage(path)
    try:
        written = make_archive(new, "create")
        try:
            copied = read.read(written.fill)
        finally:
            written.close()
        return Salvaged(copied, read.damaged.first, read.damaged.count)
    finally:
        read.close()
