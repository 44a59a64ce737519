"""Results that an earlier run could not record, taken into a SQLite file.

Owns the SQL that looks their evaluations up and gives them their tokens back. Invariant: the whole is one transaction, and what
is recorded goes the way of every attempt that ends.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from ...model import Claim
from ...spaces.eager import name_to_key
from ..base import Ended, TakenIn
from ..late import Adopted, Standing, Status, note_refused, sort_out, standing_of
from .record import due, end
from .states import STATES, Counters, lift

__all__ = ["take_in"]

_STANDING = f"""
SELECT e.id, e.args, s.status, s.attempt, s.released, s.worker,
    EXISTS (SELECT 1 FROM workers AS w WHERE w.id = s.worker AND w.ended_at IS NULL AND NOT w.dead), s.forgiven, s.suspect
FROM evaluations AS e JOIN {STATES} AS s ON s.id = e.id WHERE e.name = ?
"""
_ENDS = """
SELECT evaluation, attempt, worker, started_at, outcome FROM attempts WHERE evaluation = :id AND final
UNION ALL SELECT evaluation, attempt, worker, started_at, outcome FROM attempts WHERE evaluation = :id AND NOT final
"""
_ADOPT = """
INSERT INTO running (id, attempt, released, forgiven, suspect, ahead, held, worker, updated_at)
VALUES (?, ?, ?, ?, ?, 0, 0, ?, ?)
"""
_FORGET_LOST = "DELETE FROM attempts WHERE evaluation = ? AND NOT final AND attempt = ? AND outcome = 'lost'"
_STATUS: dict[int, Status] = {0: "pending", 1: "in_progress", 2: "completed", 3: "failed", 4: "in_progress"}


def take_in(c: sqlite3.Connection, ended: Sequence[Ended], now: float) -> TakenIn:
    """Record those that may be."""
    standing, counters = _look_up(c, ended)
    taken, adopted = sort_out(ended, standing)
    if adopted:
        note_refused(taken, adopted, _record(c, adopted, counters, now))
    return taken


def _look_up(c: sqlite3.Connection, ended: Sequence[Ended]) -> tuple[dict[str, Standing], dict[int, Counters]]:
    rows, ends, counters = [], [], {}
    for name in {one.claim.name for one in ended}:
        found = c.execute(_STANDING, (name_to_key(name),)).fetchone()
        if found is not None:
            id, args, status, attempt, released, worker, is_alive, forgiven, suspect = found
            rows.append((name, id, args, _STATUS[status], attempt, released, worker, bool(is_alive)))
            ends += c.execute(_ENDS, {"id": id}).fetchall()
            counters[id] = Counters(released, forgiven, suspect)
    return standing_of(rows, ends), counters


def _record(c: sqlite3.Connection, adopted: Sequence[Adopted], counters: dict[int, Counters], now: float) -> list[Claim]:
    ended = [one.ended for one in adopted]
    lift(c, [claim.id for claim, _, _ in ended])
    rows = []
    for (claim, _, _), released, _ in adopted:
        rows.append((claim.id, claim.attempt, *counters[claim.id]._replace(released=released), claim.worker, now))
    c.executemany(_ADOPT, rows)
    refused = end(c, ended, now)
    # Only now: the next number in ``seq`` follows the highest there is, and those who follow have seen these.
    c.executemany(_FORGET_LOST, [(a.ended.claim.id, a.ended.claim.attempt) for a in adopted if a.in_place])
    due(c, [one.claim for one in ended if one.again])
    return refused
