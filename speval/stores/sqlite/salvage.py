"""Reads the intact rows of a damaged SQLite file, as a stream for another database.

Owns skipping the parts that SQLite can't read. Invariant: every yielded row has a valid checksum; each missing evaluation is
named, by its id if its name is unreadable.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from heapq import merge
from itertools import chain
from operator import itemgetter
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
# Of what is in queue or running; in progress counts as given back.
# Of what is in queue or running; what is in progress counts as given back.
_STATES = (
    """
    SELECT id, attempt, released, forgiven, suspect, updated_at FROM queue NOT INDEXED WHERE id > ? AND id <= ? ORDER BY id
    """,
    """
    SELECT id, attempt, released + (NOT held), forgiven, suspect, updated_at FROM running NOT INDEXED
    WHERE id > ? AND id <= ? ORDER BY id
    """,
)
_RANGES = (
    "SELECT first, last, 0, updated_at FROM fresh NOT INDEXED WHERE first > ? AND first <= ? ORDER BY first",
    "SELECT first, last, 1, updated_at FROM claimed NOT INDEXED WHERE first > ? AND first <= ? ORDER BY first",
)
_ATTEMPTS = """
SELECT seq, evaluation, attempt, worker, started_at, duration, ended_at, outcome, result, error_type, error_message,
    error_traceback, final, released, suspect, crc
FROM attempts WHERE seq > ? AND seq <= ? ORDER BY seq
"""
_WORKERS = """
SELECT id, host, pid, machine, start, lease, started_at, last_seen, coalesce(ended_at, last_seen) FROM workers NOT INDEXED
WHERE id > ? AND id <= ? ORDER BY id
"""
_LAST = "SELECT attempt, outcome, released, suspect, ended_at FROM attempts WHERE seq = ?"
_BOUNDS = (
    "SELECT max(seq) FROM sqlite_sequence",
    "SELECT max(id) FROM evaluations",
    "SELECT max(last) FROM fresh NOT INDEXED",
    "SELECT max(evaluation) FROM attempts NOT INDEXED",
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
            known = Bitmap()
            for id, name, args, crc in self._rows(c, _EVALUATIONS, upto):
                if _is_sound(id, name, args, crc):
                    known.add(id)
            latest = _Latest()
            attempts = self._attempts(c, upto, known, latest)
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

    def _attempts(self, c: sqlite3.Connection, upto: int, known: Bitmap, latest: _Latest) -> Iterator[StoredAttempt]:
        """Yield sound attempts at evaluations that are known, and note the latest of each."""
        nameless = Bitmap()
        for *row, final, released, suspect, crc in self._rows(c, _ATTEMPTS, upto):
            attempt = StoredAttempt(*row)
            if crc != of_attempt(row):
                continue
            if attempt.evaluation in known:
                is_final = bool(final) and _are_counts(attempt.attempt - 1, released, suspect)
                latest.add(attempt.evaluation, attempt.seq, is_final=is_final)
                yield attempt
            elif nameless.add(attempt.evaluation):
                self._miss(f"number {attempt.evaluation}", "its name or its args are lost")
        self._name_missing(c, upto, known, nameless)

    def _name_missing(self, c: sqlite3.Connection, upto: int, known: Bitmap, named: Bitmap) -> None:
        """Name the ids without an evaluation that have a state other than an attempt they ended with."""
        singles = (row[0] for sql in _STATES for row in self._rows(c, sql, upto))
        ranges = (range(row[0], _end(row, upto)) for sql in _RANGES for row in self._rows(c, sql, upto))
        for id in chain(singles, chain.from_iterable(ranges)):
            if id not in known and named.add(id):
                self._miss(f"number {id}", "its name or its args are lost")

    def _evaluations(self, c: sqlite3.Connection, upto: int, latest: _Latest) -> Iterator[StoredEvaluation]:
        """Yield sound evaluations and their states; those whose result is lost are pending."""
        states = merge(*(self._rows(c, sql, upto) for sql in _STATES), key=itemgetter(0))
        ranges = merge(*(self._rows(c, sql, upto) for sql in _RANGES), key=itemgetter(0))
        state, span = next(states, None), next(ranges, None)
        for id, name, args, crc in self._rows(c, _EVALUATIONS, upto):
            if not _is_sound(id, name, args, crc):
                continue  # named already
            while state is not None and state[0] < id:
                state = next(states, None)
            while span is not None and _end(span, upto) <= id:
                span = next(ranges, None)
            seq = latest.final.get(id)
            if seq is None and state is not None and state[0] == id and _stands(state):
                _, attempt, released, forgiven, suspect, moment = state
                yield StoredEvaluation(id, str(name), args, 0, attempt, released, forgiven, bool(suspect), None, moment)
            elif seq is None and span is not None and span[0] <= id and id not in latest.earlier and _is_range(span):
                yield StoredEvaluation(id, str(name), args, 0, span[2], span[2], 0, False, None, span[3])
            else:
                yield StoredEvaluation(id, str(name), args, *self._ended(c, id, str(name), latest))

    def _ended(self, c: sqlite3.Connection, id: int, name: str, latest: _Latest) -> tuple[Any, ...]:
        """Return the state, from its latest attempt, of an evaluation that has no other."""
        seq = latest.final.get(id)
        is_final = seq is not None
        row = _tried(c, _LAST, seq if is_final else latest.earlier.get(id))
        number, outcome, released, suspect, ended_at = row or (0, "", 0, 0, 0.0)
        if is_final and row is not None:
            return 2 if outcome == "completed" else 3, number, released, 0, bool(suspect), seq, ended_at
        if outcome == "completed":
            return 2, number, 0, 0, False, latest.earlier.get(id), ended_at
        self._miss(name, "its result or its status is lost; it is pending")
        return 0, number, 0, number, False, None, 0.0


class _Latest:
    """The numbers of the latest attempts of evaluations."""

    def __init__(self) -> None:
        self.final: dict[int, int] = {}  # that an evaluation has ended with
        self.earlier: dict[int, int] = {}

    def add(self, evaluation: int, seq: int, *, is_final: bool) -> None:
        """Note an attempt."""
        (self.final if is_final else self.earlier)[evaluation] = seq


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


def _are_counts(*numbers: object) -> bool:
    return all(isinstance(number, int) and 0 <= number < 2**31 for number in numbers)


def _stands(state: tuple[Any, ...]) -> bool:
    """Tell whether a row of ``queue`` or ``running`` is one that speval writes."""
    _, attempt, released, forgiven, suspect, updated_at = state
    if not _are_counts(attempt, released, forgiven, suspect) or not isinstance(updated_at, float):
        return False
    return bool(suspect <= 1 and attempt - released - forgiven >= 0)


def _is_range(span: tuple[Any, ...]) -> bool:
    return isinstance(span[1], int) and isinstance(span[3], float)


def _end(span: tuple[Any, ...], upto: int) -> int:
    """Return the id behind a range, as far as there are ids."""
    return min(span[1], upto) + 1 if isinstance(span[1], int) else 0
