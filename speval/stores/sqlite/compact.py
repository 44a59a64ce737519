"""A SQLite file made as small as what is in it.

Owns the order in which it is done. Invariant: nobody is at work meanwhile, nothing of an evaluation changes, and the file is
whole at any moment.
"""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from pathlib import Path

from ...errors import DatabaseError, DatabaseLockedError
from ...model import Compacted, counted
from .file import SqliteFile

__all__ = ["compact"]

_AT_WORK = "SELECT count(*) FROM workers INDEXED BY workers_here WHERE ended_at IS NULL AND NOT dead"
# What nobody refers to: a name in a list of attempts is the only thing that a worker which has left is good for.
_PRUNE = """
DELETE FROM workers WHERE ended_at IS NOT NULL
    AND id NOT IN (SELECT worker FROM attempts WHERE worker IS NOT NULL)
    AND id NOT IN (SELECT worker FROM claimed WHERE worker IS NOT NULL)
    AND id NOT IN (SELECT worker FROM running WHERE worker IS NOT NULL)
"""


def compact(file: SqliteFile) -> Compacted:
    """Shrink a database, and forget workers that left and that no attempt names.

    Raises:
        DatabaseError: workers are at work, or another program reads; the file is as it was, or smaller already.
    """
    before = _bytes(file.path)
    pruned = file.write(_prune, file.shown)
    try:
        file.rewrite()
    except DatabaseLockedError as error:
        problem = "another program uses it; nothing was changed, try again when that has ended"
        raise DatabaseError(file.shown, problem) from error
    return Compacted(before, _bytes(file.path), pruned)


def _prune(c: sqlite3.Connection, shown: str) -> int:
    (count,) = c.execute(_AT_WORK).fetchone()
    if count:
        fix = "stop them first, or wait for their end; a dead one is taken for dead by the next copy that is started"
        raise DatabaseError(shown, f"{counted(count, 'worker')} at work would have to wait for long; {fix}")
    pruned: int = c.execute(_PRUNE).rowcount
    return pruned


def _bytes(path: Path) -> int:
    total = 0
    for name in (path, Path(f"{path}-wal")):
        with suppress(FileNotFoundError):
            total += name.stat().st_size
    return total
