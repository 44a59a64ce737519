"""What an overview of an eval space of a PostgreSQL database is made of.

Owns the SQL of it. Invariant: all of it reads one snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...model import Cause, Running, Settings
from ..overview import Holding, Look, StatusCounts, WorkerRow
from .connection import Connection
from .rows import settings_of
from .schema import Names, true_name

__all__ = ["PostgresLook"]

_COUNTS = """
SELECT (SELECT count(*) FROM speval.queue), count(*) FILTER (WHERE r.held), count(*) FILTER (WHERE NOT r.held),
    (SELECT count(*) FROM speval.evaluations)
FROM speval.running AS r
"""
_CAUSES = """
SELECT a.outcome, count(*) FROM speval.attempts AS a WHERE a.final AND a.outcome <> 'completed' GROUP BY a.outcome
"""
_WORKERS = """
SELECT id, host, pid, machine, start, lease, dead, started_at, last_seen, expires_at < speval.clock() FROM speval.workers
WHERE ended_at IS NULL ORDER BY started_at, id
"""
# What is claimed ahead and has waited for long is under way: else it would have been given back.
_IS_RUNNING = "NOT r.held AND (NOT r.ahead OR r.updated_at < %(begun)s)"
_HOLDINGS = f"""
SELECT r.worker, count(*) FILTER (WHERE {_IS_RUNNING}), count(*) FILTER (WHERE NOT r.held), count(*) FILTER (WHERE r.held)
FROM speval.running AS r GROUP BY r.worker
"""
_RUNS = f"""
SELECT e.name, r.updated_at FROM speval.running AS r JOIN speval.evaluations AS e ON e.id = r.id
WHERE r.worker = %(worker)s AND {_IS_RUNNING} ORDER BY r.updated_at, r.id LIMIT %(limit)s
"""
_FAILURES = """
SELECT e.name, a.outcome, a.error_type, a.error_message, a.attempt - a.released, a.ended_at, w.id, w.host, w.pid
FROM speval.attempts AS a JOIN speval.evaluations AS e ON e.id = a.evaluation
LEFT JOIN speval.workers AS w ON w.id = a.worker
WHERE a.final AND a.outcome <> 'completed' ORDER BY a.seq DESC LIMIT %s
"""
_MAX_SEQ = "SELECT coalesce(max(seq), 0) FROM speval.attempts"
_NEXT_ATTEMPT = "SELECT seq, ended_at FROM speval.attempts WHERE seq >= %s ORDER BY seq LIMIT 1"
_EARLIER_ATTEMPT = "SELECT ended_at FROM speval.attempts WHERE seq <= %s ORDER BY seq DESC LIMIT 1 OFFSET %s"


class PostgresLook(Look):
    """A look at an eval space, in an open transaction on one snapshot."""

    def __init__(self, c: Connection, names: Names) -> None:
        self._c = c
        self._names = names
        self._causes: dict[Cause, int] = dict(self._execute(_CAUSES).fetchall())

    def _execute(self, sql: str, values: Any = None) -> Any:
        return self._c.execute(self._names(sql), values)

    def counts(self) -> StatusCounts:
        queued, held, in_progress, total = self._execute(_COUNTS).fetchone()
        return StatusCounts(queued + held, in_progress, sum(self._causes.values()), total)

    def causes(self) -> dict[Cause, int]:
        return self._causes

    def settings(self) -> Settings:
        return settings_of(self._c, self._names)

    def workers(self, now: float) -> list[WorkerRow]:
        return [WorkerRow(*row) for row in self._execute(_WORKERS).fetchall()]

    def holdings(self, begun: float) -> dict[int, Holding]:
        return {worker: Holding(*counts) for worker, *counts in self._execute(_HOLDINGS, {"begun": begun}).fetchall()}

    def runs(self, worker: int, begun: float, limit: int) -> list[Running]:
        rows = self._execute(_RUNS, {"worker": worker, "begun": begun, "limit": limit}).fetchall()
        return [Running(true_name(name), since) for name, since in rows]

    def failures(self, limit: int) -> list[Sequence[Any]]:
        rows = self._execute(_FAILURES, (limit,)).fetchall()
        return [
            (true_name(name), cause, true_name(type_ or ""), true_name(message or ""), *more)
            for name, cause, type_, message, *more in rows
        ]

    def newest(self) -> int:
        return int(self._execute(_MAX_SEQ).fetchone()[0])

    def next_end(self, seq: int) -> tuple[int, float]:
        found: tuple[int, float] = self._execute(_NEXT_ATTEMPT, (seq,)).fetchone()
        return found

    def end_before(self, seq: int, count: int) -> float | None:
        row = self._execute(_EARLIER_ATTEMPT, (seq, count)).fetchone()
        return None if row is None else row[0]
