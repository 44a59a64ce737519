"""The parts of an overview of a SQLite file.

Owns their SQL. Invariant: everything is read in one transaction; only counting depends on the number of evaluations.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from ...model import Cause, Running, Settings
from ..overview import Holding, Look, StatusCounts, WorkerRow
from ..rows import settings_of

__all__ = ["MAX_SEQ", "SqliteLook"]

# With a condition the first is counted row by row, so that it ends in a damaged file too.
_COUNTS = """
SELECT
    (SELECT count(*) FROM evaluations WHERE id > -9e18),
    (SELECT total(last - first + 1) FROM fresh) + (SELECT count(*) FROM queue WHERE id > -9e18)
        + (SELECT total(held) FROM running),
    (SELECT total(last - first + 1) FROM claimed) + (SELECT total(NOT held) FROM running),
    (SELECT count(*) FROM attempts INDEXED BY attempts_failed WHERE final AND outcome <> 'completed')
"""
_CAUSES = """
SELECT CAST(outcome AS TEXT), count(*) FROM attempts INDEXED BY attempts_failed
WHERE final AND outcome <> 'completed' GROUP BY 1
"""
_WORKERS = """
SELECT id, host, pid, machine, start, lease, dead, started_at, last_seen FROM workers INDEXED BY workers_here
WHERE ended_at IS NULL ORDER BY started_at, id
"""
# What is claimed ahead and has waited for long is under way: else it would have been given back.
_IS_RUNNING = "(NOT held AND (NOT ahead OR updated_at < :begun))"
_HOLDINGS = f"""
SELECT worker, total(running), total(in_progress), total(held) FROM (
    SELECT worker, {_IS_RUNNING} AS running, NOT held AS in_progress, held FROM running
    UNION ALL
    SELECT worker, (NOT ahead OR updated_at < :begun) * (last - first + 1), last - first + 1, 0 FROM claimed
)
GROUP BY worker
"""
_RUNS = f"""
SELECT name, updated_at FROM (
    SELECT * FROM (
        SELECT e.name, r.updated_at, r.id FROM running AS r JOIN evaluations AS e ON e.id = r.id
        WHERE r.worker = :worker AND {_IS_RUNNING} ORDER BY r.updated_at, r.id LIMIT :limit
    )
    UNION ALL
    SELECT * FROM (
        SELECT e.name, c.updated_at, e.id FROM claimed AS c JOIN evaluations AS e ON e.id BETWEEN c.first AND c.last
        WHERE c.worker = :worker AND (NOT c.ahead OR c.updated_at < :begun) ORDER BY c.updated_at, e.id LIMIT :limit
    )
)
ORDER BY updated_at, id LIMIT :limit
"""
_FAILURES = """
SELECT e.name, a.outcome, a.error_type, a.error_message, a.attempt - a.released, a.ended_at, w.id, w.host, w.pid
FROM attempts AS a INDEXED BY attempts_failed
JOIN evaluations AS e ON e.id = a.evaluation LEFT JOIN workers AS w ON w.id = a.worker
WHERE a.final AND a.outcome <> 'completed' ORDER BY a.seq DESC LIMIT ?
"""
MAX_SEQ = "SELECT coalesce(max(seq), 0) FROM attempts"
_NEXT_ATTEMPT = "SELECT seq, ended_at FROM attempts WHERE seq >= ? ORDER BY seq LIMIT 1"
_EARLIER_ATTEMPT = "SELECT ended_at FROM attempts WHERE seq <= ? ORDER BY seq DESC LIMIT 1 OFFSET ?"


class SqliteLook(Look):
    """A look at a SQLite file, in an open transaction."""

    def __init__(self, c: sqlite3.Connection) -> None:
        self._c = c

    def counts(self) -> StatusCounts:
        total, pending, in_progress, failed = (int(count) for count in self._c.execute(_COUNTS).fetchone())
        return StatusCounts(pending, in_progress, failed, total)

    def causes(self) -> dict[Cause, int]:
        return dict(self._c.execute(_CAUSES).fetchall())

    def settings(self) -> Settings:
        return settings_of(self._c)

    def workers(self, now: float) -> list[WorkerRow]:
        return [WorkerRow._make((*row, now - row[8] > row[5])) for row in self._c.execute(_WORKERS).fetchall()]

    def holdings(self, begun: float) -> dict[int, Holding]:
        rows = self._c.execute(_HOLDINGS, {"begun": begun}).fetchall()
        return {worker: Holding(*(int(count) for count in counts)) for worker, *counts in rows}

    def runs(self, worker: int, begun: float, limit: int) -> list[Running]:
        rows = self._c.execute(_RUNS, {"worker": worker, "begun": begun, "limit": limit}).fetchall()
        return [Running(str(name), float(since)) for name, since in rows]

    def failures(self, limit: int) -> list[Sequence[Any]]:
        return list(self._c.execute(_FAILURES, (limit,)).fetchall())

    def newest(self) -> int:
        return int(self._c.execute(MAX_SEQ).fetchone()[0])

    def next_end(self, seq: int) -> tuple[int, float]:
        found: tuple[int, float] = self._c.execute(_NEXT_ATTEMPT, (seq,)).fetchone()
        return found

    def end_before(self, seq: int, count: int) -> float | None:
        row = self._c.execute(_EARLIER_ATTEMPT, (seq, count)).fetchone()
        return None if row is None else row[0]
