"""Leases in a SQLite file: renewing the lease of this worker and watching those of others.

Owns the connection of the lease thread. Invariant: a worker is never declared dead by comparing wall clocks. A worker is dead
when its process on this machine has ended, or when its beat has not changed for its whole lease on our monotonic clock. The
verdict and the reclaiming are one transaction, which checks the beat again.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, NamedTuple

from ...clock import Clock
from ...host import Process, this_process
from ..liveness import Reclaiming, Taken, Watch, WorkerRow, unknown_label
from ..rows import worker_label
from .checksum import of_attempt
from .file import SqliteFile
from .record import newest
from .states import CLAIMED, Counters, put_back, take_out

__all__ = ["SqliteLeaseKeeping"]

_RENEW = "UPDATE workers SET beat = beat + 1, last_seen = ? WHERE id = ? AND ended_at IS NULL AND NOT dead"
# The casts are for what no speval has written: a number is needed to watch with, and the text that stands there may be none.
_OTHERS = """
SELECT id, host, CAST(pid AS INTEGER), machine, start, CAST(lease AS REAL), beat, dead FROM workers INDEXED BY workers_here
WHERE ended_at IS NULL AND id <> ? ORDER BY id
"""
_DECLARE_DEAD = "UPDATE workers SET dead = 1 WHERE id = ? AND ended_at IS NULL AND (dead OR beat = ?)"
_HELD = """
SELECT r.id, r.attempt, r.released, r.forgiven, r.suspect, r.held, r.ahead, r.updated_at, e.name
FROM running AS r INDEXED BY running_worker LEFT JOIN evaluations AS e ON e.id = r.id WHERE r.worker IS ? ORDER BY r.id LIMIT ?
"""
_DROP_HELD = "DELETE FROM running WHERE id = ?"
# From evaluations, as a range that is damaged may be of any length.
_CLAIMED = """
SELECT e.id, c.ahead, c.updated_at, e.name
FROM claimed AS c INDEXED BY claimed_worker CROSS JOIN evaluations AS e ON e.id BETWEEN c.first AND c.last
WHERE c.worker IS ? ORDER BY c.first, e.id LIMIT ?
"""
_DROP_CLAIMED = "DELETE FROM claimed WHERE worker IS ?"
# What has a result keeps it, whatever else a damaged file says of it.
_HAS_ENDED = "SELECT 1 FROM attempts WHERE evaluation = ? AND final"
# From holder to holder through the index, however many evaluations each of them holds.
_HOLDERS = """
WITH RECURSIVE holders (worker) AS (
    SELECT min(worker) FROM {table} INDEXED BY {table}_worker
    UNION ALL
    SELECT (SELECT min(worker) FROM {table} INDEXED BY {table}_worker WHERE worker > holders.worker)
    FROM holders WHERE holders.worker IS NOT NULL
)
SELECT worker FROM holders
WHERE worker IS NOT NULL AND NOT EXISTS (SELECT 1 FROM workers AS w WHERE w.id = holders.worker AND w.ended_at IS NULL)
UNION ALL
SELECT NULL WHERE EXISTS (SELECT 1 FROM {table} INDEXED BY {table}_worker WHERE worker IS NULL)
"""
_ORPHANED = (_HOLDERS.format(table="claimed"), _HOLDERS.format(table="running"))
_IS_THERE = "SELECT 1 FROM workers WHERE id = ? AND ended_at IS NULL"
_IS_KNOWN = "SELECT 1 FROM workers WHERE id = ?"
_ADD_LOST = """
INSERT INTO attempts (seq, evaluation, attempt, worker, started_at, duration, ended_at, outcome, result, error_type,
    error_message, error_traceback, final, released, suspect, crc) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_BURY = "UPDATE workers SET ended_at = ? WHERE id = ?"

_CHECKPOINT_EVERY = 5.0  # seconds of answers, about, that a copy without the -wal lacks at most


class SqliteLeaseKeeping(Reclaiming):
    """The lease thread's own connection; it may be made in one thread and used in another.

    Args:
        path: The database, which must be there.
        clock: Where the time comes from.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._file: SqliteFile | None = None
        self._watch = Watch(this_process().machine)
        self._checkpoint_at = 0.0  # monotonic; with the first look, the space and its workers get into the file

    def __repr__(self) -> str:
        return f"<SqliteLeaseKeeping {str(self._path)!r}>"

    def _opened(self) -> SqliteFile:
        if self._file is None:
            # Reclaiming can wait for the next check, and the renewal must not wait for it.
            self._file = SqliteFile(self._path, "write", patience=1.0)
        return self._file

    def renew(self, worker: int, patience: float) -> bool:
        def beat(c: sqlite3.Connection) -> bool:
            return c.execute(_RENEW, (self._clock.wall(), worker)).rowcount == 1

        return self._opened().write_within(patience, beat)

    def look(self, worker: int) -> tuple[list[WorkerRow], list[object]]:
        """Return the dead workers, and the orphaned holders: ids in claims that no active worker has.

        Each worker watches all others, so a check reads all rows; the more workers there are, the less often each one checks.
        """
        now = self._clock.monotonic()
        if now >= self._checkpoint_at:
            self._checkpoint_at = now + _CHECKPOINT_EVERY
            self._opened().checkpoint()
        if not self._watch.is_due(worker, now):
            return [], []
        others, orphaned = self._opened().read(self._look, worker)
        rows = [
            WorkerRow(id, Process(host, pid, machine, start), lease, beat, bool(dead))
            for id, host, pid, machine, start, lease, beat, dead in others
        ]
        return self._watch.dead(rows, worker, self._clock.monotonic()), orphaned

    def _look(self, c: sqlite3.Connection, worker: int) -> tuple[list[tuple[Any, ...]], list[object]]:
        return c.execute(_OTHERS, (worker,)).fetchall(), _orphaned(c)

    def take_back(self, row: WorkerRow, max_attempts: int, bound: int) -> Taken | None:
        return self._opened().write(self._take_back, row, max_attempts, bound)

    def take_back_orphaned(self, holder: object, max_attempts: int, bound: int) -> Taken | None:
        return self._opened().write(self._take_back_orphaned, holder, max_attempts, bound)

    def _take_back(self, c: sqlite3.Connection, row: WorkerRow, max_attempts: int, bound: int) -> Taken | None:
        if c.execute(_DECLARE_DEAD, (row.id, row.beat)).rowcount == 0:
            return None
        label = worker_label(row.id, row.process.host, row.process.pid)
        taken = self._take_held(c, row.id, row.id, f"worker {label} died or was out of reach", max_attempts, bound)
        if not taken.more:
            c.execute(_BURY, (self._clock.wall(), row.id))
        return taken

    def _take_back_orphaned(self, c: sqlite3.Connection, holder: object, max_attempts: int, bound: int) -> Taken | None:
        if c.execute(_IS_THERE, (holder,)).fetchone() is not None:
            return None
        known = holder if c.execute(_IS_KNOWN, (holder,)).fetchone() else None
        message = f"worker {unknown_label(holder)} is not an active worker of this database"
        return self._take_held(c, holder, known, message, max_attempts, bound)

    def _take_held(
        self, c: sqlite3.Connection, holder: object, known: object, message: str, max_attempts: int, bound: int
    ) -> Taken:
        """Reclaim a bounded number of evaluations of a holder; ``known`` is the worker to record in the table of attempts."""
        now = self._clock.wall()
        taken = _taken(c, holder, bound)
        pending: list[tuple[int, int, Counters]] = []
        lost: list[tuple[Any, ...]] = []
        failed = []
        seq = newest(c)
        for held in taken:
            counters = held.counters
            if c.execute(_HAS_ENDED, (held.id,)).fetchone() is not None:
                continue
            if held.is_waiting:
                pending.append((held.id, held.attempt, counters))
            elif held.is_ahead:
                # Most of what was claimed ahead never began, and which did is unknown. It is not charged once, and only once.
                pending.append((held.id, held.attempt, Counters(counters.released + 1, counters.forgiven, 1)))
            else:
                seq += 1
                row = (seq, held.id, held.attempt, known, held.claimed_at, None, now, "lost", None, "WorkerLost", message, "")
                final = held.attempt - counters.released - counters.forgiven >= max_attempts
                lost.append((*row, final, counters.released, counters.suspect, of_attempt(row)))
                if final:
                    failed.append(str(held.name))
                else:
                    pending.append((held.id, held.attempt, counters))
        c.executemany(_ADD_LOST, lost)
        put_back(c, pending, now)
        return Taken(len(taken) == bound, len(pending), failed)

    def forget(self) -> None:
        self._watch.forget()

    def give_up(self) -> None:
        if self._file is not None:
            self._file.give_up()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _Held(NamedTuple):
    """An evaluation that a dead worker held, taken out of its table."""

    id: int
    attempt: int
    counters: Counters
    is_waiting: bool  # for its backoff
    is_ahead: bool
    claimed_at: float
    name: object


def _orphaned(c: sqlite3.Connection) -> list[object]:
    """Return the orphaned holders: ids in claims that no active worker has, each once."""
    holders: list[object] = []
    for statement in _ORPHANED:
        holders += [holder for (holder,) in c.execute(statement) if holder not in holders]
    return holders


def _taken(c: sqlite3.Connection, holder: object, bound: int) -> list[_Held]:
    """Take a bounded number of evaluations from a worker, those with the lowest ids."""
    found = []
    for id, attempt, released, forgiven, suspect, held, ahead, since, name in c.execute(_HELD, (holder, bound)).fetchall():
        found.append(_Held(id, attempt, Counters(released, forgiven, suspect), bool(held), ahead == 1, since, name))
    for id, ahead, since, name in c.execute(_CLAIMED, (holder, bound)).fetchall():
        found.append(_Held(id, 1, Counters(), False, ahead == 1, since, name))
    taken = sorted(found, key=lambda held: held.id)[:bound]
    ids = [held.id for held in taken]
    c.executemany(_DROP_HELD, [(id,) for id in ids])
    take_out(c, CLAIMED, ids)
    if len(taken) < bound:
        c.execute(_DROP_CLAIMED, (holder,))  # what is left of damaged ranges holds no evaluations
    return taken
