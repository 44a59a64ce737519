"""Compacts a SQLite file.

Owns the order of the steps. Invariant: no worker is alive meanwhile, evaluations are unchanged, and the file is valid at any
moment.
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
# Ended workers without attempts: only attempts and claims refer to a worker.
_PRUNE = """
DELETE FROM workers WHERE ended_at IS NOT NULL
    AND id NOT IN (SELECT worker FROM attempts WHERE worker IS NOT NULL)
    AND id NOT IN (SELECT worker FROM claimed WHERE worker IS NOT NULL)
    AND id NOT IN (SELECT worker FROM running WHERE worker IS NOT NULL)
"""


def compact(file: SqliteFile) -> Compacted:
    """Shrink a database, and delete ended workers without attempts.

    Raises:
        DatabaseError: workers are alive, or another program uses the file; nothing was changed, except for deleted workers.
    """
    before = _bytes(file.path)
    pruned = file.write(_prune, file.shown)
    try:
        file.rewrite()
    except DatabaseLockedError as error:
        problem = "another program uses the file; it was not changed, try again when that program has ended"
        raise DatabaseError(file.shown, problem) from error
    return Compacted(before, _bytes(file.path), pruned)


def _prune(c: sqlite3.Connection, shown: str) -> int:
    (count,) = c.execute(_AT_WORK).fetchone()
    if count:
        fix = "stop them first, or wait until they end; the next worker that starts declares dead ones dead"
        raise DatabaseError(shown, f"{counted(count, 'worker')} alive would wait for a long time; {fix}")
    pruned: int = c.execute(_PRUNE).rowcount
    return pruned


def _bytes(path: Path) -> int:
    total = 0
    for name in (path, Path(f"{path}-wal")):
        with suppress(FileNotFoundError):
            total += name.stat().st_size
    return total
