"""A SQLite file, read or filled as a whole.

Owns the SQL of copying. Invariant: a claim that a worker holds in the source is nobody's in the copy, and charges nothing
there.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ..errors import DatabaseNotEmptyError
from ..space import name_to_key
from .archive import Archive, Content, Counts, StoredAttempt, StoredEvaluation, StoredWorker
from .base import StoreMode
from .rows import settings_of
from .sqlite_file import SqliteFile

__all__ = ["SqliteArchive"]

T = TypeVar("T")

_WORKERS = """
SELECT id, host, pid, machine, start, lease, started_at, last_seen, coalesce(ended_at, last_seen) FROM workers
"""
_ATTEMPTS = """
SELECT seq, evaluation, attempt, worker, started_at, duration, ended_at, outcome, result, error_type, error_message,
    error_traceback
FROM attempts ORDER BY seq
"""
_EVALUATIONS = """
SELECT e.id, e.name, e.args, CASE WHEN s.status IN (2, 3) THEN s.status ELSE 0 END, s.attempt,
    s.released + (s.status = 1), s.forgiven, s.ahead & 2, s.last, s.updated_at
FROM evaluations AS e JOIN states AS s ON s.id = e.id ORDER BY e.id
"""
_IS_EMPTY = "SELECT NOT EXISTS (SELECT 1 FROM evaluations) AND NOT EXISTS (SELECT 1 FROM attempts)"
_ADD_WORKER = """
INSERT INTO workers (id, host, pid, machine, start, lease, started_at, last_seen, ended_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO NOTHING
"""
_ADD_ATTEMPT = "INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_ADD_EVALUATION = "INSERT INTO evaluations (id, name, args) VALUES (?, ?, ?)"
_ADD_STATE = """
INSERT INTO states (id, status, attempt, released, forgiven, ahead, last, updated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
"""
_AT_ONCE = 1000  # evaluations between the two tables they go to


class SqliteArchive(Archive):
    """One SQLite file.

    Args:
        path: The file.
        mode: ``read`` to read it, ``create`` to fill it.
    """

    def __init__(self, path: Path, mode: StoreMode) -> None:
        self._file = SqliteFile(path, mode)
        if mode == "read":
            self._file.show_as_current()

    def __repr__(self) -> str:
        return f"<SqliteArchive {self._file.shown!r}>"

    def close(self) -> None:
        self._file.close()

    def read(self, work: Callable[[Content], T]) -> T:
        def read(c: sqlite3.Connection) -> T:
            # Closed also after an error, which would keep them open and the file locked for as long as it is kept itself.
            with (
                closing(c.execute(_WORKERS)) as workers,
                closing(c.execute(_ATTEMPTS)) as attempts,
                closing(c.execute(_EVALUATIONS)) as evaluations,
            ):
                return work(
                    Content(
                        settings_of(c),
                        map(StoredWorker._make, workers),
                        map(StoredAttempt._make, attempts),
                        _evaluations(evaluations),
                    )
                )

        return self._file.read(read)

    def fill(self, content: Content) -> Counts:
        return self._file.write(self._fill, content)

    def _fill(self, c: sqlite3.Connection, content: Content) -> Counts:
        (is_empty,) = c.execute(_IS_EMPTY).fetchone()
        if not is_empty:
            raise DatabaseNotEmptyError(self._file.shown)
        settings = {"paused": 1 if content.settings.paused else None, "concurrency": content.settings.concurrency}
        c.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", [(k, v) for k, v in settings.items() if v is not None])
        c.executemany(_ADD_WORKER, content.workers)
        attempts = c.executemany(_ADD_ATTEMPT, content.attempts).rowcount
        count = 0
        while some := list(islice(content.evaluations, _AT_ONCE)):
            c.executemany(_ADD_EVALUATION, [(e.id, name_to_key(e.name), e.args) for e in some])
            c.executemany(_ADD_STATE, [_state(e) for e in some])
            count += len(some)
        return Counts(count, max(attempts, 0))


def _evaluations(rows: Iterable[tuple[Any, ...]]) -> Iterator[StoredEvaluation]:
    for id, name, args, status, attempt, released, forgiven, suspect, last, updated_at in rows:
        yield StoredEvaluation(id, str(name), args, status, attempt, released, forgiven, bool(suspect), last, updated_at)


def _state(e: StoredEvaluation) -> tuple[Any, ...]:
    return e.id, e.status, e.attempt, e.released, e.forgiven, 2 if e.is_suspect else 0, e.last, e.updated_at
