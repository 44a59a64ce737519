"""Claiming and recording in a SQLite file.

Owns the SQL by which a worker claims evaluations, ends their attempts and gives them back. Invariant: each function is work
within one transaction that holds the write lock, and an attempt changes something only if its whole token is good.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

from ...errors import DatabaseError
from ...model import Claim
from ..base import Ended, Record, Recorded
from ..rows import settings_of
from .checksum import of_attempt, of_evaluation
from .rows import check_evaluation
from .states import CLAIMED, FRESH, add_range, put_back, runs, take_claims, take_out

__all__ = ["Part", "due", "end", "look", "newest", "record"]

_AT_ONCE = (512, 64, 8, 1)  # rows of one statement
_HEAVY = 10_000_000  # characters of results that are not given to one statement together

# The evaluations of a worker's space are all up to :last but those in ``unlisted``, which is nearly always empty.
_FIND_QUEUED = """
SELECT q.id, q.attempt + 1, q.attempt + 1 - q.released - q.forgiven, e.name, e.args, e.crc
FROM queue AS q CROSS JOIN evaluations AS e ON e.id = q.id
WHERE q.id <= :last AND q.id NOT IN unlisted ORDER BY q.id LIMIT :limit
"""
_FIND_QUEUED_FRESH = _FIND_QUEUED.replace("ORDER BY", "AND q.attempt = q.released + q.forgiven AND NOT q.suspect ORDER BY")
# From range to range, skipping those with only unlisted evaluations.
_FIND_FRESH = """
SELECT e.id, 1, 1, e.name, e.args, e.crc FROM fresh AS f CROSS JOIN evaluations AS e ON e.id BETWEEN f.first AND f.last
WHERE f.first <= :last AND e.id <= :last AND e.id NOT IN unlisted ORDER BY f.first, e.id LIMIT :limit
"""
_RUN_QUEUED = """
INSERT INTO running (id, attempt, released, forgiven, suspect, ahead, held, worker, updated_at)
SELECT id, attempt + 1, released, forgiven, suspect, :ahead, 0, :worker, :now
FROM queue WHERE id IN (SELECT value FROM json_each(:ids))
"""
_UNQUEUE = "DELETE FROM queue WHERE id IN (SELECT value FROM json_each(?))"

_ADD_ATTEMPT = """
INSERT INTO attempts (seq, evaluation, attempt, worker, started_at, duration, ended_at, outcome, result,
    error_type, error_message, error_traceback, final, released, suspect, crc)
VALUES {rows}
"""
_MAX_SEQ = "SELECT coalesce(max(seq), 0) FROM attempts"
_HOLD = """
INSERT INTO running (id, attempt, released, forgiven, suspect, ahead, held, worker, updated_at)
VALUES (?, ?, ?, ?, ?, 0, 1, ?, ?)
"""
_DUE = """
INSERT INTO queue (id, attempt, released, forgiven, suspect, updated_at)
SELECT id, attempt, released, forgiven, suspect, updated_at FROM running WHERE id = ? AND attempt = ? AND worker = ? AND held
"""
_NOT_HELD = "DELETE FROM running WHERE id = ? AND attempt = ? AND worker = ? AND held"

_IS_HERE = "SELECT 1 FROM workers WHERE id = ? AND ended_at IS NULL AND NOT dead"

# Of a range: it holds an id that is of the space.
_IN_SPACE = """
first <= :last
AND min(last, :last) - first + 1 > (SELECT count(*) FROM unlisted WHERE id BETWEEN first AND min(last, :last))
"""
_ANY_PENDING = f"""
SELECT EXISTS (SELECT 1 FROM queue WHERE id <= :last AND id NOT IN unlisted)
    OR EXISTS (SELECT 1 FROM fresh WHERE {_IN_SPACE})
"""
_ANY_HELD = f"""
SELECT EXISTS (SELECT 1 FROM claimed WHERE {_IN_SPACE})
    OR EXISTS (SELECT 1 FROM running WHERE id <= :last AND id NOT IN unlisted)
"""
_FAILURES = """
SELECT count(*) FROM attempts INDEXED BY attempts_failed
WHERE final AND outcome <> 'completed' AND seq > :since AND evaluation <= :last AND evaluation NOT IN unlisted
"""


class Part(NamedTuple):
    """A worker's part of what is stored: the evaluations of its space, and the failures since it began."""

    last: int  # the highest id of the space
    since: int  # the highest attempts.seq when the space was seeded


def look(c: sqlite3.Connection, part: Part, count_failures: bool) -> tuple[bool, Recorded]:
    """Return whether there is something to claim, and how things are."""
    settings, pending = settings_of(c), any_pending(c, part)
    recorded = Recorded(
        open=pending or any_held(c, part), failures=failures(c, part) if count_failures else None, settings=settings
    )
    return pending and not settings.paused, recorded


def record(c: sqlite3.Connection, db: str, part: Part, record: Record, now: float) -> Recorded:
    """Write what a worker has to write, and claim what it wants.

    Args:
        c: A connection in a transaction that writes.
        db: The database, for errors.
        part: The worker's part of it.
        record: What to write, and what is wanted.
        now: Unix seconds.
    """
    recorded = Recorded(settings=settings_of(c))
    if record.ended:
        recorded.refused = end(c, record.ended, now)
    if record.released:
        release(c, record.released, now)
    if record.due:
        due(c, record.due)
    if record.idle or record.ahead:
        if c.execute(_IS_HERE, (record.worker,)).fetchone() is None:
            recorded.lost = True
            return recorded
        if not recorded.settings.paused:
            recorded.claims = claim(c, db, part, record, now)
        if len(recorded.claims) < record.idle:
            pending = any_pending(c, part)
            if pending and not (recorded.settings.paused or record.ended or record.released or record.due):
                raise damaged(db)  # once there is nothing to be written with it
            recorded.open = bool(recorded.claims) or pending or any_held(c, part)
    if record.count_failures:
        recorded.failures = failures(c, part)
    return recorded


def newest(c: sqlite3.Connection) -> int:
    """Return the number of the latest attempt that ended, 0 before the first."""
    (seq,) = c.execute(_MAX_SEQ).fetchone()
    return int(seq)


def any_pending(c: sqlite3.Connection, part: Part) -> bool:
    """Tell whether an evaluation of the space is pending."""
    return bool(c.execute(_ANY_PENDING, {"last": part.last}).fetchone()[0])


def any_held(c: sqlite3.Connection, part: Part) -> bool:
    """Tell whether a worker runs or holds an evaluation of the space."""
    return bool(c.execute(_ANY_HELD, {"last": part.last}).fetchone()[0])


def failures(c: sqlite3.Connection, part: Part) -> int:
    """Count the evaluations of the space that failed since it was seeded."""
    return int(c.execute(_FAILURES, {"last": part.last, "since": part.since}).fetchone()[0])


def claim(c: sqlite3.Connection, db: str, part: Part, record: Record, now: float) -> list[Claim]:
    """Claim evaluations of the space, the first ones of it, as many as a record wants."""
    found = _claim(c, db, part, record.worker, record.idle, 0, now) if record.idle else []
    if record.ahead and len(found) == record.idle:
        found = sorted(found + _claim(c, db, part, record.worker, record.ahead, 1, now), key=itemgetter(0))
    claims = []
    for id, attempt, charged, name, args, crc in found:
        if crc != of_evaluation(id, name, args):
            check_evaluation(db, id, name, args, crc)
        claims.append(Claim(id, attempt, charged, str(name), args, record.worker))
    return claims


def _claim(c: sqlite3.Connection, db: str, part: Part, worker: int, limit: int, ahead: int, now: float) -> list[Any]:
    values = {"last": part.last, "limit": limit}
    queued = c.execute(_FIND_QUEUED_FRESH if ahead else _FIND_QUEUED, values).fetchall()
    fresh = c.execute(_FIND_FRESH, values).fetchall()
    found = fresh
    if queued:
        found = sorted(queued + fresh, key=itemgetter(0))[:limit]
        chosen = {row[0] for row in found}
        queued = [row for row in queued if row[0] in chosen]
        fresh = [row for row in fresh if row[0] in chosen]
        listed = json.dumps([row[0] for row in queued])
        c.execute(_RUN_QUEUED, {"ahead": ahead, "worker": worker, "now": now, "ids": listed})
        if c.execute(_UNQUEUE, (listed,)).rowcount != len(queued):
            raise damaged(db)
    ids = [row[0] for row in fresh]
    if len(take_out(c, FRESH, ids)) != len(ids):
        raise damaged(db)
    for first, last in runs(ids):
        add_range(c, CLAIMED, first, last, worker, ahead, now)
    return found


def damaged(db: str) -> DatabaseError:
    """Return the error for a file that says what cannot be."""
    problem = "damaged: evaluations marked pending could not be claimed"
    return DatabaseError(db, f"{problem}; `speval doctor {db}` names them, `speval salvage {db} NEW` saves the others")


def release(c: sqlite3.Connection, claims: Sequence[Claim], now: float) -> None:
    """Give claims back unused."""
    taken = take_claims(c, claims)
    rows = ((id, attempt, n._replace(released=n.released + 1)) for (id, attempt, _), n in taken.items())
    put_back(c, rows, now)


def due(c: sqlite3.Connection, claims: Sequence[Claim]) -> None:
    """Make pending what was held for a backoff that is over."""
    tokens = {(claim.id, claim.attempt, claim.worker) for claim in claims}
    c.executemany(_DUE, tokens)
    c.executemany(_NOT_HELD, tokens)


def end(c: sqlite3.Connection, ended: Sequence[Ended], now: float) -> list[Claim]:
    """Record the attempts whose tokens are good, and return the claims of the others."""
    taken = take_claims(c, [e.claim for e in ended])
    seq = newest(c)
    refused, attempts, held = [], [], []
    size = 0
    for claim, outcome, again in ended:
        id, attempt, worker = token = (claim.id, claim.attempt, claim.worker)
        counters = taken.pop(token, None)
        if counters is None:
            refused.append(claim)
            continue
        seq += 1
        error = outcome.error
        shown = (None, None, None) if error is None else (error["type"], error["message"], error["traceback"])
        times = (outcome.started_at, outcome.duration, now)
        row = (seq, id, attempt, worker, *times, outcome.cause or "completed", outcome.result, *shown)
        attempts.append((*row, not again, counters.released, counters.suspect, of_attempt(row)))
        size += len(outcome.result or "")
        if again:
            held.append((id, attempt, *counters, worker, now))
    # SQLite copies what a statement is given.
    _add_attempts(c, attempts, (1,) if size > _HEAVY else _AT_ONCE)
    c.executemany(_HOLD, held)
    return refused


def _add_attempts(c: sqlite3.Connection, rows: Sequence[tuple[Any, ...]], at_once: tuple[int, ...]) -> None:
    """Insert rows, many at once: after each execution this thread waits for the GIL where the event loop is busy."""
    start = 0
    for size in at_once:
        while len(rows) - start >= size:
            statement = _statement(len(rows[0]), size)
            c.execute(statement, tuple(chain.from_iterable(rows[start : start + size])))
            start += size


@lru_cache
def _statement(columns: int, count: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return _ADD_ATTEMPT.format(rows=", ".join([row] * count))
