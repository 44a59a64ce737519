"""What can still be read of a damaged SQLite file, as a stream for another database.

Owns the way around what SQLite can't read. Invariant: whatever is yielded has its checksum, and so is as it was written; what
is missing is named, by its number where the name is gone.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ...bitmap import Bitmap
from ...errors import DatabaseError, EvaluationDamagedError
from ...model import Settings
from ..archive import Archive, Content, Counts, StoredAttempt, StoredEvaluation, StoredWorker
from ..rows import Damaged, settings_of
from .checksum import of_attempt, of_evaluation
from .file import SqliteFile

__all__ = ["SqliteSalvage"]

logger = logging.getLogger("speval.store")

T = TypeVar("T")

_MOST_FAILURES = 300_000  # looks that bring nothing but an error, before the rest of a table is given up
_HIGHEST = 2**62

_EVALUATIONS = "SELECT id, name, args, crc FROM evaluations WHERE id > ? AND id <= ? ORDER BY id"
_STATES = """
SELECT id, status, attempt, released, forgiven, ahead, last, updated_at FROM states NOT INDEXED
WHERE id > ? AND id <= ? ORDER BY id
"""
_ATTEMPTS = """
SELECT seq, evaluation, attempt, worker, started_at, duration, ended_at, outcome, result, error_type, error_message,
    error_traceback, crc
FROM attempts WHERE seq > ? AND seq <= ? ORDER BY seq
"""
_WORKERS = """
SELECT id, host, pid, machine, start, lease, started_at, last_seen, coalesce(ended_at, last_seen) FROM workers NOT INDEXED
WHERE id > ? AND id <= ? ORDER BY id
"""
_LAST = "SELECT evaluation, attempt, outcome FROM attempts WHERE seq = ?"
_BOUNDS = (
    "SELECT max(seq) FROM sqlite_sequence",
    "SELECT max(id) FROM evaluations",
    "SELECT max(id) FROM states",
    "SELECT max(last) FROM states NOT INDEXED",
    "SELECT max(seq) FROM attempts",
)


class SqliteSalvage(Archive):
    """A damaged SQLite file, of which as much is read as can be.

    Args:
        path: The file; nothing is written to it.

    Raises:
        DatabaseError: not even what is in it can be told.
    """

    def __init__(self, path: Path) -> None:
        self._file = SqliteFile(path, "read")
        if self._file.is_0_1 or self._file.is_empty:
            self._file.close()
            raise DatabaseError(self._file.shown, "has no checksums to tell good from bad; use `speval copy`")
        self.damaged = Damaged(self._file.shown)
        self._failures = 0

    def __repr__(self) -> str:
        return f"<SqliteSalvage {self._file.shown!r}>"

    def close(self) -> None:
        self._file.close()

    def fill(self, content: Content) -> Counts:
        raise NotImplementedError("a damaged file is only read")

    def read(self, work: Callable[[Content], T]) -> T:
        c = self._file.connection
        c.execute("BEGIN")  # one moment of it, and rolled back: of a damaged file not even the end of reading can be committed
        try:
            found = [_tried(c, sql) for sql in _BOUNDS]
            numbers = [value for row in found if row is not None for value in row if isinstance(value, int)]
            if None in found:  # then there may be more than the others tell of, but no more than there is room for
                numbers.append(self._file.path.stat().st_size)
            upto = min(max(numbers, default=0), _HIGHEST)
            known, standing = Bitmap(), Bitmap()
            for id, name, args, crc in self._rows(c, _EVALUATIONS, upto):
                if _is_sound(id, name, args, crc):
                    known.add(id)
            for row in self._rows(c, _STATES, upto):
                if _stands(row):
                    standing.add(row[0])
                if row[0] not in known:
                    self._miss(f"number {row[0]}", "its name or its args are lost")
            latest: dict[int, tuple[int, int, str]] = {}
            attempts = self._attempts(c, upto, known, standing, latest)
            workers = map(StoredWorker._make, self._rows(c, _WORKERS, _HIGHEST))
            return work(Content(_settings(c), workers, attempts, self._evaluations(c, upto, latest)))
        finally:
            with suppress(sqlite3.Error):
                c.rollback()

    def _miss(self, name: str, problem: str) -> None:
        self.damaged.add(EvaluationDamagedError(self._file.shown, name, problem))

    def _rows(self, c: sqlite3.Connection, sql: str, upto: int) -> Iterator[tuple[Any, ...]]:
        """Yield the rows that can be read, in the order of their numbers; around what can't, spans are halved."""
        spans = [(0, upto)]
        self._failures = 0
        while spans:
            low, high = spans.pop()
            try:
                for row in c.execute(sql, (low, high)):
                    if isinstance(row[0], int) and low < row[0] <= high:
                        low = row[0]
                        yield row
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                self._failures += 1
                if self._failures > _MOST_FAILURES:
                    logger.warning("%s: all from number %d on is given up (%s)", self._file.shown, low, error)
                    return
                middle = (low + high) // 2
                if high - low > 1:
                    spans += [(middle, high), (low, middle)]

    def _attempts(
        self, c: sqlite3.Connection, upto: int, known: Bitmap, standing: Bitmap, latest: dict[int, tuple[int, int, str]]
    ) -> Iterator[StoredAttempt]:
        """Yield sound attempts at evaluations that are known; note the latest of each that does not stand anywhere."""
        self._sound = Bitmap()
        for *row, crc in self._rows(c, _ATTEMPTS, upto):
            attempt = StoredAttempt(*row)
            if crc != of_attempt(row) or attempt.evaluation not in known:
                continue
            self._sound.add(attempt.seq)
            if attempt.evaluation not in standing:
                latest[attempt.evaluation] = (attempt.attempt, attempt.seq, attempt.outcome)
            yield attempt

    def _evaluations(
        self, c: sqlite3.Connection, upto: int, latest: dict[int, tuple[int, int, str]]
    ) -> Iterator[StoredEvaluation]:
        """Yield sound evaluations and how they stand; those whose result is lost are pending."""
        states = self._rows(c, _STATES, upto)
        state = next(states, None)
        for id, name, args, crc in self._rows(c, _EVALUATIONS, upto):
            if not _is_sound(id, name, args, crc):
                continue  # named already
            while state is not None and state[0] < id:
                state = next(states, None)
            if state is not None and state[0] == id and _stands(state):
                yield StoredEvaluation(id, str(name), args, *self._standing(c, str(name), state))
            else:
                number, seq, outcome = latest.get(id, (0, None, ""))
                status = 2 if outcome == "completed" else 0
                if not status:
                    self._miss(str(name), "its status is lost; it is pending")
                yield StoredEvaluation(id, str(name), args, status, number, 0, 0 if status else number, False, seq, 0.0)

    def _standing(self, c: sqlite3.Connection, name: str, state: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return status, attempt, released, forgiven, whether it is suspect, the last attempt and when that was."""
        id, status, attempt, released, forgiven, ahead, last, updated_at = state
        if last not in self._sound if isinstance(last, int) else True:
            last = None
        if status in (2, 3):
            ended = None if last is None else _tried(c, _LAST, last)
            if ended is None or ended[:2] != (id, attempt) or (ended[2] == "completed") != (status == 2):
                self._miss(name, "its result is lost; it is pending")
                return 0, attempt, released, attempt - released, False, None, updated_at
            return status, attempt, released, forgiven, bool(ahead & 2), last, updated_at
        return 0, attempt, released + (status == 1), forgiven, bool(ahead & 2), last, updated_at


def _tried(c: sqlite3.Connection, sql: str, *values: object) -> tuple[Any, ...] | None:
    try:
        row: tuple[Any, ...] | None = c.execute(sql, values).fetchone()
        return row
    except (sqlite3.DatabaseError, UnicodeDecodeError):
        return None


def _settings(c: sqlite3.Connection) -> Settings:
    try:
        return settings_of(c)
    except (sqlite3.DatabaseError, UnicodeDecodeError, ValueError, TypeError):
        return Settings()


def _is_sound(id: int, name: object, args: object, crc: object) -> bool:
    return isinstance(name, int | str) and isinstance(args, str) and crc == of_evaluation(id, name, args)


def _stands(state: tuple[Any, ...]) -> bool:
    """Tell whether a row of ``states`` is one that speval writes."""
    _, status, attempt, released, forgiven, ahead, _, updated_at = state
    numbers = (status, attempt, released, forgiven, ahead)
    if not all(isinstance(number, int) and 0 <= number < 2**31 for number in numbers) or not isinstance(updated_at, float):
        return False
    return bool(status <= 4 and ahead <= 3 and attempt - released - forgiven >= (status == 1))
