"""Leases in a PostgreSQL database: renewing one's own, watching the others'.

Owns the statements of the lease thread, on the connection of its worker. Invariant: by nothing but the server's clock, or by a
process that is gone on this machine, is anybody declared dead; and never because of a time in which the server itself could not
be renewed with.
"""

from __future__ import annotations

import threading
from typing import Any

from ..clock import Clock
from ..host import Process, this_process
from .postgres_connection import Connection, PostgresConnection
from .postgres_schema import Names, true_name
from .rows import worker_label
from .watch import Reclaiming, Taken, WorkerRow, gone_here, unknown_label

__all__ = ["PostgresLeaseKeeping"]

_PATIENCE = 1.0  # seconds at most: taking back can wait for the next look, one's own renewal can't wait for it
_LONG = 2.0  # seconds without an answer after which others may have had none either

_RENEW = "SELECT speval.renew_1(%s, %s)"
# A server that has just started has kept nobody's lease.
_OTHERS = """
SELECT w.id, w.host, w.pid, w.machine, w.start, w.lease, w.beat, w.dead, speval.clock() > greatest(
    w.expires_at, extract(epoch FROM pg_postmaster_start_time())::double precision + w.lease)
FROM speval.workers AS w WHERE w.ended_at IS NULL AND w.id <> %s ORDER BY w.id
"""
# From holder to holder through the index, however many evaluations each of them holds.
_ORPHANED = """
WITH RECURSIVE holders (worker) AS (
    (SELECT r.worker FROM speval.running AS r ORDER BY r.worker LIMIT 1)
    UNION ALL
    SELECT (SELECT r.worker FROM speval.running AS r WHERE r.worker > holders.worker ORDER BY r.worker LIMIT 1)
    FROM holders WHERE holders.worker IS NOT NULL
)
SELECT h.worker FROM holders AS h
WHERE h.worker IS NOT NULL
    AND NOT EXISTS (SELECT FROM speval.workers AS w WHERE w.id = h.worker AND w.ended_at IS NULL)
"""
_TAKE_BACK = "SELECT more, pending, failed FROM speval.take_back_1(%s, %s, %s, %s, %s, %s)"


class PostgresLeaseKeeping(Reclaiming):
    """The lease thread's part of a worker's connection.

    It shares that of the store, since a server has few: a renewal waits for the one transaction that is under way, and while
    that gets no answer, nor would a renewal.

    Args:
        connection: The worker's.
        names: The statements as they are for its schema.
        clock: Where the time comes from.
        lease: Seconds.
    """

    def __init__(self, connection: PostgresConnection, names: Names, clock: Clock, lease: float) -> None:
        self._connection = connection
        self._names = names
        self._clock = clock
        self._patience = min(_PATIENCE, lease / 10)
        self._machine = this_process().machine
        self._given_up = threading.Event()
        self._connected = connection.connected
        self._undisturbed: float | None = None  # since when, monotonic; None: always

    def __repr__(self) -> str:
        return f"<PostgresLeaseKeeping {self._connection.shown!r}>"

    def renew(self, worker: int, patience: float) -> bool:
        def beat(c: Connection) -> bool:
            (alive,) = self._execute(c, _RENEW, worker, self._clock.wall()).fetchone()
            return bool(alive)

        return bool(self._run(patience, beat))

    def look(self, worker: int) -> tuple[list[WorkerRow], list[object]]:
        def ask(c: Connection) -> tuple[list[tuple[Any, ...]], list[object]]:
            others = self._execute(c, _OTHERS, worker).fetchall()
            return others, [holder for (holder,) in self._execute(c, _ORPHANED)]

        others, orphaned = self._run(self._patience, ask)
        now = self._clock.monotonic()
        dead: list[WorkerRow] = []
        others_alive: list[WorkerRow] = []
        for id, host, pid, machine, start, lease, beat, is_dead, has_expired in others:
            row = WorkerRow(id, Process(host, pid, machine, start), lease, beat, is_dead)
            # When we were cut off, others may have been, and have had no time yet to say that they live.
            has_had_time = self._undisturbed is None or now - self._undisturbed >= lease
            (dead if is_dead or (has_expired and has_had_time) else others_alive).append(row)
        return dead + gone_here(others_alive, worker, self._machine), orphaned

    def take_back(self, row: WorkerRow, max_attempts: int, bound: int) -> Taken | None:
        label = worker_label(row.id, row.process.host, row.process.pid)
        return self._take(row.id, row.beat, f"worker {label} died or was out of reach", max_attempts, bound)

    def take_back_orphaned(self, holder: object, max_attempts: int, bound: int) -> Taken | None:
        message = f"worker {unknown_label(holder)} is none of those in the database that have not ended"
        return self._take(holder, None, message, max_attempts, bound)

    def _take(self, holder: object, beat: int | None, message: str, max_attempts: int, bound: int) -> Taken | None:
        def take(c: Connection) -> Taken | None:
            values = (holder, beat, message, max_attempts, self._clock.wall(), bound)
            row = self._execute(c, _TAKE_BACK, *values).fetchone()
            return None if row is None else Taken(row[0], row[1], [true_name(name) for name in row[2]])

        taken: Taken | None = self._run(self._patience, take)
        return taken

    def forget(self) -> None:
        self._undisturbed = self._clock.monotonic()

    def give_up(self) -> None:
        self._given_up.set()

    def close(self) -> None:
        """Do nothing: the connection is the store's."""

    def _run(self, patience: float, work: Any) -> Any:
        started = self._clock.monotonic()
        try:
            result = self._connection.run_within(patience, False, self._given_up, work)
        except BaseException:
            self.forget()
            raise
        if self._connection.connected != self._connected or self._clock.monotonic() - started > _LONG:
            self._connected = self._connection.connected
            self.forget()
        return result

    def _execute(self, c: Connection, sql: str, *values: object) -> Any:
        return c.execute(self._names(sql), values)
