"""Records results from side files of an earlier run in a PostgreSQL database.

Owns the SQL that finds their evaluations and restores their fencing tokens. Invariant: it is one transaction that blocks all
other writers, and results are recorded by the same code as those of running attempts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...model import Claim
from ..base import Ended, TakenIn
from ..late import Standing, note_refused, sort_out, standing_of
from .connection import Connection, numbers, texts
from .schema import READY, Names, stored_name, true_name

__all__ = ["take_in"]

_BLOCK_WRITERS = "SELECT pg_advisory_xact_lock(1936745846, speval.movers())"
_STANDING = """
SELECT e.name, e.id, e.args,
    CASE WHEN f.seq IS NOT NULL THEN CASE f.outcome WHEN 'completed' THEN 'completed' ELSE 'failed' END
        WHEN r.id IS NOT NULL THEN 'in_progress' ELSE 'pending' END,
    coalesce(f.attempt, r.attempt, q.attempt, 0), coalesce(f.released, r.released, q.released, 0), r.worker,
    EXISTS (SELECT FROM speval.workers AS w WHERE w.id = r.worker AND w.ended_at IS NULL AND NOT w.dead)
FROM speval.evaluations AS e LEFT JOIN speval.queue AS q ON q.id = e.id LEFT JOIN speval.running AS r ON r.id = e.id
LEFT JOIN speval.attempts AS f ON f.evaluation = e.id AND f.final
WHERE e.name = ANY (%s::text[])
"""
_ENDS = """
SELECT a.evaluation, a.attempt, a.worker, a.started_at, a.outcome FROM speval.attempts AS a
WHERE a.evaluation = ANY (%s::bigint[])
"""
# Move each evaluation to the state "running by its worker", so that its attempt can be recorded as usual.
_ADOPT = """
WITH given AS (
    SELECT * FROM unnest(%(ids)s::bigint[], %(attempts)s::integer[], %(released)s::integer[], %(workers)s::bigint[])
        AS g (id, attempt, released, worker)
), waiting AS (
    DELETE FROM speval.queue AS q USING given AS g WHERE q.id = g.id RETURNING q.id, q.forgiven, q.suspect
), held AS (
    DELETE FROM speval.running AS r USING given AS g WHERE r.id = g.id RETURNING r.id, r.forgiven, r.suspect
), ended AS (
    UPDATE speval.attempts AS a SET final = false FROM given AS g WHERE a.evaluation = g.id AND a.final
    RETURNING a.evaluation, 0, a.suspect
)
SELECT t.id, g.attempt, g.released, t.forgiven, t.suspect, g.worker
FROM (SELECT * FROM waiting UNION ALL SELECT * FROM held UNION ALL SELECT * FROM ended) AS t (id, forgiven, suspect)
JOIN given AS g ON g.id = t.id
"""
_FORGET_LOST = """
DELETE FROM speval.attempts AS a USING unnest(%s::bigint[], %s::integer[]) AS g (id, attempt)
WHERE a.evaluation = g.id AND a.attempt = g.attempt AND a.outcome = 'lost'
"""
_HOLD = """
INSERT INTO speval.running (id, attempt, released, forgiven, suspect, ahead, held, worker, call, updated_at)
VALUES (%s, %s, %s, %s, %s, false, false, %s, 0, %s)
"""

End = Callable[[Connection, Sequence[Ended]], Sequence[Claim]]


def take_in(c: Connection, names: Names, ended: Sequence[Ended], now: float, end: End) -> TakenIn:
    """Record the results that may still be recorded.

    Args:
        c: The connection.
        names: The statements for the schema.
        ended: The results.
        now: Unix seconds.
        end: Records attempts, and releases evaluations for another attempt.
    """
    with c.block():
        c.execute(names(_BLOCK_WRITERS))
        c.execute(names(READY))
        taken, adopted = sort_out(ended, _look_up(c, names, ended))
        if adopted:
            tokens = [a.ended.claim for a in adopted]
            values = {
                "ids": numbers(t.id for t in tokens),
                "attempts": numbers(t.attempt for t in tokens),
                "workers": numbers(t.worker for t in tokens),
                "released": numbers(a.released for a in adopted),
            }
            rows = c.execute(names(_ADOPT), values).fetchall()
            lost = [a.ended.claim for a in adopted if a.in_place]
            c.execute(names(_FORGET_LOST), (numbers(t.id for t in lost), numbers(t.attempt for t in lost)))
            with c.cursor() as cursor:
                cursor.executemany(names(_HOLD), [(*row, now) for row in rows])
            note_refused(taken, adopted, end(c, [a.ended for a in adopted]))
    return taken


def _look_up(c: Connection, names: Names, ended: Sequence[Ended]) -> dict[str, Standing]:
    wanted = texts({stored_name(one.claim.name) for one in ended})
    rows = c.execute(names(_STANDING), (wanted,)).fetchall()
    ends = c.execute(names(_ENDS), (numbers(row[1] for row in rows),)).fetchall()
    return standing_of([(true_name(name), *rest) for name, *rest in rows], ends)
