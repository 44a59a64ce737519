"""What rows of a SQLite file mean, and whether they are what was written.

Owns the columns of an evaluation, with what it takes to check them. Invariant: what is not as it was written is an error that
names the evaluation, never a value; and where there are evaluations to read, those that are damaged keep none of the others
from being read.
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

__all__ = [
    "ATTEMPT",
    "COLUMNS",
    "FROM",
    "bounded",
    "check_attempt",
    "check_evaluation",
    "check_states",
    "evaluation",
]

# Of states (s), evaluations (e), attempts (a) and workers (w).
ATTEMPT = """
    a.seq, a.evaluation, a.attempt, a.worker, a.started_at, a.duration, a.ended_at, a.outcome, a.result, a.error_type,
    a.error_message, a.error_traceback, a.crc
"""
COLUMNS = f"""
    s.id, s.status, s.attempt, s.released, s.forgiven, s.updated_at, e.name, e.args, e.crc, {ATTEMPT}, w.id, w.host, w.pid
"""
FROM = """
FROM states AS s LEFT JOIN evaluations AS e ON e.id = s.id LEFT JOIN attempts AS a ON a.seq = s.last
LEFT JOIN workers AS w ON w.id = CASE s.status WHEN 1 THEN s.worker WHEN 2 THEN a.worker WHEN 3 THEN a.worker END
"""

_TEXTS = (7, 17, 20)  # the places of args, result and traceback

_COUNTS = """
SELECT (SELECT count(*) FROM states WHERE id > :after AND id <= :upto),
    (SELECT count(*) FROM evaluations WHERE id > :after AND id <= :upto)
"""
_STATELESS = """
SELECT id, name FROM evaluations AS e
WHERE id > ? AND id <= ? AND NOT EXISTS (SELECT 1 FROM states AS s WHERE s.id = e.id) ORDER BY id
"""


def evaluation(db: str, row: Sequence[Any]) -> Evaluation:
    """Return the evaluation that a row of ``COLUMNS`` stands for.

    Raises:
        EvaluationDamagedError: it is not as it was written.
    """
    id, status, attempt, released, forgiven, updated, name, args, crc = row[:9]
    ended, ended_crc, worker = row[9:21], row[21], row[22:]
    if args is None or crc != of_evaluation(id, name, args):
        check_evaluation(db, id, name, args, crc)
    has_ended = status in (2, 3)
    if not (isinstance(updated, int | float) and released >= 0 and attempt - released - max(forgiven, 0) >= (status == 1)):
        raise EvaluationDamagedError(db, str(name), "its status is not as anything writes it")
    if has_ended:
        check_attempt(db, name, ended, ended_crc)
        # The names of the columns are in checksum.of_attempt().
        if ended[1] != id or ended[2] != attempt or (ended[7] == "completed") != (status == 2):
            raise EvaluationDamagedError(db, str(name), "its status and its last attempt contradict each other")
        updated = ended[6]
    elif status not in STATUS:
        raise EvaluationDamagedError(db, str(name), f"its status is {status!r}, which none is")
    elif ended[7] == "completed" and ended[1] == id and attempt - released - forgiven > (status == 1):
        raise EvaluationDamagedError(db, str(name), "it is said to be pending, and has a result")
    started_at, duration, _, outcome, result, *error = ended[4:] if has_ended else (None,) * 8
    values = (name, status, updated, args, attempt - released, result, outcome, *error, started_at, duration, *worker)
    return shown_evaluation(db, values)


def check_evaluation(db: str, id: int, name: object, args: Any, crc: int | None) -> None:
    """Check a row of ``evaluations``.

    Raises:
        EvaluationDamagedError: it is not as it was written.
    """
    if args is None:
        raise EvaluationDamagedError(db, f"number {id}", "its name and its args are gone")
    if crc != of_evaluation(id, name, args):
        raise EvaluationDamagedError(db, str(name), "its name or its args are not as they were written")


def check_attempt(db: str, name: object, row: Sequence[Any], crc: int | None) -> None:
    """Check a row of ``attempts``, from ``seq`` to ``error_traceback``.

    Raises:
        EvaluationDamagedError: it is not as it was written.
    """
    if row[0] is None:
        raise EvaluationDamagedError(db, str(name), "its last attempt, with its result, is gone")
    if crc != of_attempt(row):
        what = "the result" if row[7] == "completed" else "the outcome"
        raise EvaluationDamagedError(db, str(name), f"{what} of its attempt {row[2]} is not as it was written")


def check_states(c: sqlite3.Connection, db: str, damaged: Damaged, after: int, upto: int) -> None:
    """Note evaluations above ``after`` up to ``upto`` that have no row in ``states``, and so come in no page."""
    states, evaluations = c.execute(_COUNTS, {"after": after, "upto": upto}).fetchone()
    if states < evaluations:
        for _, name in c.execute(_STATELESS, (after, upto)):
            damaged.add(EvaluationDamagedError(db, str(name), "its status is gone"))


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
                fix = f"`speval salvage {db} NEW` saves what can be saved"
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
