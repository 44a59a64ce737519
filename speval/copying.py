"""One database copied to another, of whatever kind.

Owns the order in which things are done. Invariant: the source is read and never written to, and the target is filled as a
whole or left as it was.
"""

from __future__ import annotations

from os import PathLike

from .options import checked_database
from .stores import make_archive
from .stores.archive import Counts

__all__ = ["copy"]


def copy(source: str | PathLike[str], target: str | PathLike[str]) -> Counts:
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
