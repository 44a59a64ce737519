"""The rows of a SQLite file, and their checksums.

Owns the columns of an evaluation and their check. Invariant: a corrupt row is an error that names the evaluation, never a
value; and when many evaluations are read, the damaged ones are skipped.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from sys import getsizeof
from typing import Any

from ...errors import DatabaseError, EvaluationDamagedError
from ...model import Evaluation
from ..rows import PAGE_SIZE, STATUS, Damaged
from ..rows import evaluation as shown_evaluation
from .checksum import of_attempt, of_evaluation
from .states import JOINS, NUMBERS, STATUS_CODE

__all__ = [
    "ATTEMPT",
    "COLUMNS",
    "FINAL_COLUMNS",
    "FROM",
    "bounded",
    "check_attempt",
    "check_evaluation",
    "check_names",
    "evaluation",
]

ATTEMPT = """
    a.seq, a.evaluation, a.attempt, a.worker, a.started_at, a.duration, a.ended_at, a.outcome, a.result, a.error_type,
    a.error_message, a.error_traceback, a.crc
"""
# Of the tables that states.JOINS names, and workers (w).
COLUMNS = f"e.id, {STATUS_CODE}, {NUMBERS}, e.name, e.args, e.crc, {ATTEMPT}, w.id, w.host, w.pid"
FROM = f"""
FROM {JOINS} LEFT JOIN workers AS w
ON w.id = CASE WHEN a.seq IS NOT NULL THEN a.worker WHEN c.first IS NOT NULL THEN c.worker WHEN NOT r.held THEN r.worker END
"""
# The same of an attempt that its evaluation ended with.
FINAL_COLUMNS = f"""
    a.evaluation, CASE a.outcome WHEN 'completed' THEN 2 ELSE 3 END, a.attempt, a.released, 0, a.ended_at,
    e.name, e.args, e.crc, {ATTEMPT}, w.id, w.host, w.pid
"""

_TEXTS = (7, 17, 20)  # the places of args, result and traceback

# Ids that have a state, and no row in evaluations.
_NAMELESS = """
SELECT id FROM queue WHERE id > :after AND id <= :upto AND id NOT IN (SELECT id FROM evaluations)
UNION SELECT id FROM running WHERE id > :after AND id <= :upto AND id NOT IN (SELECT id FROM evaluations)
UNION SELECT evaluation FROM attempts INDEXED BY attempts_final
    WHERE final AND evaluation > :after AND evaluation <= :upto AND evaluation NOT IN (SELECT id FROM evaluations)
ORDER BY 1
"""
_RANGES = """
SELECT max(first, :after + 1), min(last, :upto) FROM fresh WHERE first <= :upto AND last > :after
UNION ALL SELECT max(first, :after + 1), min(last, :upto) FROM claimed WHERE first <= :upto AND last > :after ORDER BY 1
"""
_IN_RANGE = "SELECT id FROM evaluations WHERE id BETWEEN ? AND ? ORDER BY id"
_HOLES = 1000  # missing ids of a range that are named


def evaluation(db: str, row: Sequence[Any]) -> Evaluation:
    """Return the evaluation of a row with ``COLUMNS``.

    Raises:
        EvaluationDamagedError: the row is corrupt.
    """
    id, status, attempt, released, forgiven, updated, name, args, crc = row[:9]
    ended, ended_crc, worker = row[9:21], row[21], row[22:]
    if args is None or crc != of_evaluation(id, name, args):
        check_evaluation(db, id, name, args, crc)
    if status not in STATUS:
        what = "it is in no table of states" if status is None else "it is in several tables of states"
        raise EvaluationDamagedError(db, str(name), f"its status is gone: {what}")
    has_ended = status in (2, 3)
    if not (
        isinstance(updated, int | float) and released >= 0 and attempt - released - max(forgiven, 0) >= (status in (1, 2, 3))
    ):
        raise EvaluationDamagedError(db, str(name), "its status is not as speval writes it")
    if has_ended:
        check_attempt(db, name, ended, ended_crc)
    started_at, duration, _, outcome, result, *error = ended[4:] if has_ended else (None,) * 8
    values = (name, status, updated, args, attempt - released, result, outcome, *error, started_at, duration, *worker)
    return shown_evaluation(db, values)


def check_evaluation(db: str, id: int, name: object, args: Any, crc: int | None) -> None:
    """Check a row of ``evaluations``.

    Raises:
        EvaluationDamagedError: the row is corrupt.
    """
    if args is None:
        raise EvaluationDamagedError(db, f"number {id}", "its name and its args are gone")
    if crc != of_evaluation(id, name, args):
        raise EvaluationDamagedError(db, str(name), "its name or its args are corrupt")


def check_attempt(db: str, name: object, row: Sequence[Any], crc: int | None) -> None:
    """Check a row of ``attempts``, from ``seq`` to ``error_traceback``.

    Raises:
        EvaluationDamagedError: the row is corrupt.
    """
    if row[0] is None:
        raise EvaluationDamagedError(db, str(name), "its last attempt, with its result, is gone")
    if crc != of_attempt(row):
        what = "the result" if row[7] == "completed" else "the outcome"
        raise EvaluationDamagedError(db, str(name), f"{what} of its attempt {row[2]} is corrupt")


def check_names(c: sqlite3.Connection, db: str, damaged: Damaged, after: int, upto: int) -> None:
    """Note ids above ``after`` up to ``upto`` that have a state and no row in ``evaluations``, and so come in no page."""
    values = {"after": after, "upto": upto}
    missing = [id for (id,) in c.execute(_NAMELESS, values).fetchall()]
    for first, last in c.execute(_RANGES, values).fetchall():
        missing += _holes(c, first, last)
    for id in missing:
        with damaged.left_out():
            check_evaluation(db, id, None, None, None)


def _holes(c: sqlite3.Connection, first: int, last: int) -> Iterator[int]:
    """Yield the ids of a range, the first of them at least, that are not in ``evaluations``."""
    expected = first
    for (id,) in (*c.execute(_IN_RANGE, (first, last)), (last + 1,)):
        yield from range(expected, min(id, expected + _HOLES))
        expected = id + 1


def bounded(db: str, cursor: sqlite3.Cursor, limit: int, place: int = 0) -> Iterator[tuple[Any, ...]]:
    """Yield rows until there are enough of them, or enough text in them.

    Args:
        db: The database, for the error.
        cursor: Where they come from; closed at the end, as an open one keeps a transaction from ending.
        limit: How many at most.
        place: Of the column that has to ascend, and by which the next page begins.

    Raises:
        DatabaseError: it does not ascend, so a page would begin at the wrong place.
    """
    count = size = 0
    last = None
    try:
        for row in cursor:
            if last is not None and row[place] <= last:
                fix = f"`speval salvage {db} NEW` copies all intact data"
                raise DatabaseError(db, f"damaged: number {row[place]} comes after {last}; {fix}")
            last = row[place]
            yield row
            count += 1
            for text in _TEXTS:
                if type(row[text]) is str:
                    size += getsizeof(row[text])
            if count == limit or size > PAGE_SIZE:
                return
    finally:
        cursor.close()
