"""Leases in a PostgreSQL database: renewing the lease of this worker and watching those of others.

Owns the statements of the lease thread, which uses the connection of its worker. Invariant: a worker is dead when its lease has
expired by the server clock, or when its process on this machine has ended. Time in which the server accepted no renewals does
not count.
"""

from __future__ import annotations

import threading
from typing import Any

from ...clock import Clock
from ...host import Process, this_process
from ..liveness import Reclaiming, Taken, WorkerRow, gone_here, pause, unknown_label
from ..rows import worker_label
from .connection import Connection, PostgresConnection
from .schema import Names, true_name

__all__ = ["PostgresLeaseKeeping"]

_PATIENCE = 1.0  # seconds at most: reclaiming can wait for the next check, and the renewal must not wait for it
_LONG = 2.0  # seconds without an answer after which other workers may have had no answer either

_OVERDUE = 3.0  # seconds without a check by any worker, after which the next worker that renews checks at once

# Only calls of functions by qualified names: these run with the settings of the session.
_RENEW = "SELECT speval.renew_1(%s, %s, %s)"
_LOOK = "SELECT kind, id, host, pid, machine, start, lease, beat, dead FROM speval.look_1(%s, %s)"
_TAKE_BACK = "SELECT more, pending, failed FROM speval.take_back_1(%s, %s, %s, %s, %s, %s)"


class PostgresLeaseKeeping(Reclaiming):
    """The lease thread's part of a worker's connection.

    It shares the connection of the store, because a server allows few. A renewal waits for at most one transaction; while that
    gets no answer, a renewal would get none either.

    Args:
        connection: The connection of the worker.
        names: The statements for its schema.
        clock: The clock.
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
        self._undisturbed: float | None = None  # since when the server has answered, monotonic; None: always
        self._next_look = 0.0  # monotonic
        self._here: list[WorkerRow] = []  # the live workers of this machine at the last check

    def __repr__(self) -> str:
        return f"<PostgresLeaseKeeping {self._connection.shown!r}>"

    def renew(self, worker: int, patience: float) -> bool:
        def beat(c: Connection) -> bool | None:
            alive: bool | None
            (alive,) = self._execute(c, _RENEW, worker, self._clock.wall(), _OVERDUE).fetchone()
            return alive

        alive = self._run(patience, beat)
        if alive is None:
            self._next_look = 0.0  # the other workers have not checked for seconds: most of them are gone
        return alive is None or bool(alive)

    def look(self, worker: int) -> tuple[list[WorkerRow], list[object]]:
        """Return the dead workers, and the orphaned holders: ids in claims that no active worker has.

        The server compares all leases with its clock, so one check serves all workers: the more workers there are, the less
        often each one checks. Between checks, a worker that dies on this machine is detected without a query.
        """
        if self._clock.monotonic() < self._next_look and not gone_here(self._here, worker, self._machine):
            return [], []
        found = self._run(self._patience, lambda c: self._execute(c, _LOOK, worker, self._machine).fetchall())
        now = self._clock.monotonic()
        dead: list[WorkerRow] = []
        orphaned: list[object] = []
        self._here = []
        for kind, id, host, pid, machine, start, lease, beat, is_dead in found:
            if kind == 0:
                self._next_look = now + pause(id)
            elif kind == 3:
                orphaned.append(id)
            else:
                row = WorkerRow(id, Process(host, pid, machine, start), lease, beat, is_dead)
                # If this worker was disconnected, others may have been too, and need time to renew.
                has_had_time = self._undisturbed is None or now - self._undisturbed >= lease
                (dead if is_dead or (kind == 1 and has_had_time) else self._here).append(row)
        return dead + gone_here(self._here, worker, self._machine), orphaned

    def take_back(self, row: WorkerRow, max_attempts: int, bound: int) -> Taken | None:
        label = worker_label(row.id, row.process.host, row.process.pid)
        return self._take(row.id, row.beat, f"worker {label} died or was out of reach", max_attempts, bound)

    def take_back_orphaned(self, holder: object, max_attempts: int, bound: int) -> Taken | None:
        message = f"worker {unknown_label(holder)} is not an active worker of this database"
        return self._take(holder, None, message, max_attempts, bound)

    def _take(self, holder: object, beat: int | None, message: str, max_attempts: int, bound: int) -> Taken | None:
        def take(c: Connection) -> Taken | None:
            values = (holder, beat, message, max_attempts, self._clock.wall(), bound)
            row = self._execute(c, _TAKE_BACK, *values).fetchone()
            return None if row is None else Taken(row[0], row[1], [true_name(name) for name in row[2]])

        taken: Taken | None = self._run(self._patience, take)
        return taken

    def forget(self) -> None:
        self._next_look = 0.0
        self._undisturbed = self._clock.monotonic()

    def give_up(self) -> None:
        self._given_up.set()

    def close(self) -> None:
        """Do nothing: the connection belongs to the store."""

    def _run(self, patience: float, work: Any) -> Any:
        started = self._clock.monotonic()
        try:
            result = self._connection.run_within(patience, False, self._given_up, work, bare=True)
        except BaseException:
            self.forget()
            raise
        if self._connection.connected != self._connected or self._clock.monotonic() - started > _LONG:
            self._connected = self._connection.connected
            self.forget()
        return result

    def _execute(self, c: Connection, sql: str, *values: object) -> Any:
        return c.execute(self._names(sql), values)
