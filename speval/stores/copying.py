"""One database copied to another, of whatever kind.

Owns the order in which things are done. Invariant: the source is read and never written to, and the target is filled as a
whole or left as it was.
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
    """What was saved of a damaged database, and what was not."""

    copied: Counts
    lost: list[EvaluationDamagedError]  # the first thousand
    lost_count: int


def copy(source: str | PathLike[str] | Location, target: str | PathLike[str]) -> Counts:
    """Copy all of a database to an empty one: evaluations, how they stand, their attempts, and the settings.

    Workers may go on with the source meanwhile: what is copied is one moment of it. What they hold then is pending in the
    copy, and no attempt is charged for it there.

    Args:
        source: A file name or a URL; also a database of speval 0.1.1.
        target: A file name or a URL; made if it is missing.

    Returns:
        How many evaluations and attempts were copied; they are durable.

    Raises:
        DatabaseNotEmptyError: there are evaluations in the target; it is as it was.
        DatabaseError: one of the two can't be used; the target has no evaluations then.
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
    """Copy what is sound in a damaged file to an empty database.

    Nothing is written to the damaged file. An evaluation whose result is lost is pending in the new database.

    Args:
        source: A file name.
        target: A file name or a URL; made if it is missing.

    Raises:
        DatabaseNotEmptyError: there are evaluations in the target; it is as it was.
        DatabaseError: nothing can be read of the source, or the target can't be used.
    """
    path, new = checked_database(source), checked_database(target)
    if isinstance(path, PostgresUrl):
        raise OptionError("source", repr(path.shown), "name a file; a server is mended with its own means and backups")
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
