"""Results that an earlier run could not record, taken into a SQLite file.

Owns the SQL that looks their evaluations up and gives them their tokens back. Invariant: the whole is one transaction, and what
is recorded goes the way of every attempt that ends.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence

from ...model import Claim
from ...spaces.eager import name_to_key
from ..base import Ended, TakenIn
from ..late import Adopted, Standing, Status, sort_out, standing_of

__all__ = ["take_in"]

_STANDING = """
SELECT e.id, e.args, s.status, s.attempt, s.released, s.worker,
    EXISTS (SELECT 1 FROM workers AS w WHERE w.id = s.worker AND w.ended_at IS NULL AND NOT w.dead)
FROM evaluations AS e JOIN states AS s ON s.id = e.id WHERE e.name = ?
"""
# No index leads from an evaluation to its attempts, and none is worth having for this: one pass finds those of all.
_WANTED = "CREATE TEMP TABLE wanted (id INTEGER PRIMARY KEY)"
_ENDS = """
SELECT a.evaluation, a.attempt, a.worker, a.started_at, a.outcome FROM attempts AS a
WHERE a.evaluation IN (SELECT id FROM temp.wanted)
"""
_ADOPT = "UPDATE states SET status = 1, attempt = ?, released = ?, worker = ? WHERE id = ?"
# All at once: no index finds an attempt by its token, so that each would go through the whole table.
_FORGET_LOST = """
DELETE FROM attempts WHERE outcome = 'lost' AND (evaluation, attempt) IN (
    SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(?)
)
"""
_LET_GO = "UPDATE states SET status = 0, worker = NULL WHERE id = ? AND status = 4 AND attempt = ?"
_STATUS: dict[int, Status] = {0: "pending", 1: "in_progress", 2: "completed", 3: "failed", 4: "in_progress"}

End = Callable[[sqlite3.Connection, Sequence[Ended], float], list[Claim]]


def take_in(c: sqlite3.Connection, ended: Sequence[Ended], now: float, end: End) -> TakenIn:
    """Record those that may be, by ``end``."""
    taken, adopted = sort_out(ended, _look_up(c, ended))
    if adopted:
        _record(c, adopted, now, end)
    return taken


def _look_up(c: sqlite3.Connection, ended: Sequence[Ended]) -> dict[str, Standing]:
    rows = []
    for name in {one.claim.name for one in ended}:
        found = c.execute(_STANDING, (name_to_key(name),)).fetchone()
        if found is not None:
            id, args, status, *rest, is_alive = found
            rows.append((name, id, args, _STATUS[status], *rest, bool(is_alive)))
    c.execute(_WANTED)
    c.executemany("INSERT INTO temp.wanted VALUES (?)", [(row[1],) for row in rows])
    ends = c.execute(_ENDS).fetchall()
    c.execute("DROP TABLE temp.wanted")
    return standing_of(rows, ends)


def _record(c: sqlite3.Connection, adopted: Sequence[Adopted], now: float, end: End) -> None:
    ended = [one.ended for one in adopted]
    c.executemany(_ADOPT, [(a.ended.claim.attempt, a.released, a.ended.claim.worker, a.ended.claim.id) for a in adopted])
    end(c, ended, now)
    # Only now: the next number in ``seq`` follows the highest there is, and those who follow have seen these.
    if lost := [(a.ended.claim.id, a.ended.claim.attempt) for a in adopted if a.in_place]:
        c.execute(_FORGET_LOST, (json.dumps(lost),))
    c.executemany(_LET_GO, [(one.claim.id, one.claim.attempt) for one in ended if one.again])
