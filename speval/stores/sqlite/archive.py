"""A SQLite file, read or filled as a whole.

Owns the SQL of copying. Invariant: claims are not copied; an evaluation in progress is pending in the copy, and no attempt is
charged for it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from ...errors import DatabaseNotEmptyError, EvaluationDamagedError
from ...spaces.eager import name_to_key
from ..archive import Archive, Content, Counts, StoredAttempt, StoredEvaluation, StoredWorker, pieces
from ..base import StoreMode
from ..rows import Damaged, settings_of
from .checksum import of_attempt, of_evaluation
from .file import SqliteFile
from .rows import ATTEMPT, check_evaluation
from .states import FRESH, STATES, Counters, add_range, put_back, runs

__all__ = ["SqliteArchive"]

T = TypeVar("T")

_WORKERS = """
SELECT id, host, pid, machine, start, lease, started_at, last_seen, coalesce(ended_at, last_seen) FROM workers
"""
_ATTEMPTS = "SELECT {}, e.name FROM attempts AS a LEFT JOIN evaluations AS e ON e.id = a.evaluation ORDER BY a.seq"
_ATTEMPTS = _ATTEMPTS.format(ATTEMPT)
_EVALUATIONS = f"""
SELECT e.id, e.name, e.args, e.crc, s.status, s.attempt, s.released + (s.status = 1), s.forgiven, s.suspect, s.last,
    s.updated_at
FROM {STATES} AS s JOIN evaluations AS e ON e.id = s.id ORDER BY e.id
"""
_LAST_ATTEMPT = "SELECT coalesce(max(attempt), 0) FROM attempts WHERE evaluation = ? AND NOT final"
_IS_EMPTY = "SELECT NOT EXISTS (SELECT 1 FROM evaluations) AND NOT EXISTS (SELECT 1 FROM attempts)"
_ADD_WORKER = """
INSERT INTO workers (id, host, pid, machine, start, lease, started_at, last_seen, ended_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO NOTHING
"""
# What its evaluation ended with is said of it with the evaluation.
_ADD_ATTEMPT = "INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0, 0, 0, ?)"
_ADD_EVALUATION = "INSERT INTO evaluations (id, name, args, crc) VALUES (?, ?, ?, ?)"
_END = "UPDATE attempts SET final = 1, released = ?, suspect = ? WHERE seq = ?"


class SqliteArchive(Archive):
    """One SQLite file.

    Args:
        path: The file.
        mode: ``read`` to read it, ``create`` to fill it.
    """

    def __init__(self, path: Path, mode: StoreMode) -> None:
        self._file = SqliteFile(path, mode)
        self.damaged = Damaged(self._file.shown)
        if mode == "read":
            self._file.show_as_current()

    def __repr__(self) -> str:
        return f"<SqliteArchive {self._file.shown!r}>"

    def close(self) -> None:
        self.damaged.tell()
        self._file.close()

    def read(self, work: Callable[[Content], T]) -> T:
        def read(c: sqlite3.Connection) -> T:
            lost: set[int] = set()
            workers = map(StoredWorker._make, self._file.rows(_WORKERS))
            return work(Content(settings_of(c), workers, self._attempts(lost), self._evaluations(lost)))

        return self._file.read(read)

    def _attempts(self, lost: set[int]) -> Iterator[StoredAttempt]:
        """Yield attempts that are as they were written, and note the numbers of the others."""
        for *row, crc, name in self._file.rows(_ATTEMPTS):
            if crc == of_attempt(row) or (name is None and crc is None):  # what is left of a dropped one
                yield StoredAttempt(*row)
            else:
                lost.add(row[0])

    def _evaluations(self, lost: set[int]) -> Iterator[StoredEvaluation]:
        """Yield evaluations that are as they were written; those whose result is lost are pending."""
        for id, name, args, crc, *state in self._file.rows(_EVALUATIONS):
            with self.damaged.left_out():
                check_evaluation(self._file.shown, id, name, args, crc)
                status, attempt, released, forgiven, suspect, last, updated_at = state
                if status == -1:
                    raise EvaluationDamagedError(self._file.shown, str(name), "its status is gone")
                has_ended = status in (2, 3)
                problem = None
                if status is None:
                    problem = "its status is gone"
                    ((attempt,),) = self._file.rows(_LAST_ATTEMPT, (id,))
                    released, updated_at = 0, 0.0
                elif has_ended and last in lost:
                    problem = "its last attempt, with its result, is corrupt"
                if problem is not None:
                    self.damaged.add(EvaluationDamagedError(self._file.shown, str(name), problem))
                    has_ended, forgiven, last = False, attempt - released, None
                status = status if has_ended else 0
                yield StoredEvaluation(
                    id, str(name), args, status, attempt, released, forgiven, bool(suspect), last, updated_at
                )

    def fill(self, content: Content) -> Counts:
        return self._file.write(self._fill, content)

    def _fill(self, c: sqlite3.Connection, content: Content) -> Counts:
        (is_empty,) = c.execute(_IS_EMPTY).fetchone()
        if not is_empty:
            raise DatabaseNotEmptyError(self._file.shown)
        settings = {"paused": 1 if content.settings.paused else None, "concurrency": content.settings.concurrency}
        c.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", [(k, v) for k, v in settings.items() if v is not None])
        c.executemany(_ADD_WORKER, content.workers)
        attempts = c.executemany(_ADD_ATTEMPT, ((*row, of_attempt(row)) for row in content.attempts)).rowcount
        count = 0
        for some in pieces(content.evaluations):
            checked = [(e.id, name_to_key(e.name), e.args, of_evaluation(e.id, e.name, e.args)) for e in some]
            c.executemany(_ADD_EVALUATION, checked)
            _add_states(c, some)
            count += len(some)
        return Counts(count, max(attempts, 0))


def _add_states(c: sqlite3.Connection, some: Sequence[StoredEvaluation]) -> None:
    """Put evaluations, in the order of their ids, into the tables of their states."""
    c.executemany(_END, [(e.released, e.is_suspect, e.last) for e in some if e.status])
    pending = [e for e in some if not e.status]
    for moment, group in groupby((e for e in pending if not e.attempt), key=lambda e: e.updated_at):
        for first, last in runs([e.id for e in group]):
            add_range(c, FRESH, first, last, moment)
    for e in pending:
        if e.attempt:
            put_back(c, [(e.id, e.attempt, Counters(e.released, e.forgiven, e.is_suspect))], e.updated_at)
