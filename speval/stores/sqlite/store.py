"""The store in one SQLite file, through aiosqlite.

Owns the SQL of every verb a worker uses on its own connection. Invariant: each verb is one or a few whole transactions,
each run in one go on the connection's thread, so no cancelled task can leave one open and no stall of the event loop can
make others wait.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import aiosqlite
from anyio import CancelScope

from ...clock import Clock
from ...errors import (
    ArgsChangedError,
    DatabaseError,
    EvaluationDamagedError,
    StoreClosedError,
    SystemLimitError,
)
from ...host import this_process
from ...model import Cause, Claim, Durability, Evaluation, OnChanged, Summary
from ...spaces.eager import Key, Space
from ..base import Ended, LeaseKeeping, Record, Recorded, Seeded, Store, StoreMode, TakenIn
from ..rows import STATUS, Damaged, settings_of
from . import seed as seeding
from .checksum import of_attempt, of_evaluation
from .file import SqliteFile, shown_path
from .late import take_in
from .lease import SqliteLeaseKeeping
from .rows import COLUMNS, bounded, check_evaluation, evaluation
from .watchman import missing_log

__all__ = ["SqliteStore"]

logger = logging.getLogger("speval.store")

P = ParamSpec("P")
T = TypeVar("T")

_AT_ONCE = (512, 64, 8, 1)  # rows of one statement
_A_ROW = 1000  # bytes of file that a row of an eval space counts as, for what may be done to it
_HEAVY = 10_000_000  # characters of results that are not given to one statement together

# The evaluations of a worker's space are all up to :last but those in ``strangers``, which is nearly always empty.
_OPENED = "CREATE TEMP TABLE strangers (id INTEGER PRIMARY KEY)"
_ALL = 2**62  # as the highest id of a space: whatever is stored, and whatever will be

# The index holds pending rows only, in order: a claim is as cheap behind a million completed ones as behind none.
_FIND = """
SELECT s.id, s.attempt + 1, s.attempt + 1 - s.released - s.forgiven, e.name, e.args, e.crc
FROM states AS s INDEXED BY states_pending CROSS JOIN evaluations AS e ON e.id = s.id
WHERE s.status = 0 AND s.id <= :last AND s.id NOT IN strangers ORDER BY s.id LIMIT :limit
"""
_FIND_FRESH = _FIND.replace("ORDER BY", "AND s.attempt = s.released + s.forgiven AND s.ahead = 0 ORDER BY")
_CLAIM = """
UPDATE states SET status = 1, attempt = attempt + 1, ahead = ahead & 2 | :ahead, worker = :worker, updated_at = :now
WHERE id IN (SELECT value FROM json_each(:ids)) AND status = 0
"""

# Guarded by the whole token: a stale attempt changes no row, and the count of changed rows tells.
_END = """
UPDATE states SET status = e.column1, worker = e.column2, ahead = ahead & 2, last = e.column3, updated_at = e.column4
FROM (VALUES {rows}) AS e
WHERE states.id = e.column5 AND states.attempt = e.column6 AND states.worker = e.column7 AND states.status = 1
"""
_ADD_ATTEMPT = """
INSERT INTO attempts (seq, evaluation, attempt, worker, started_at, duration, ended_at, outcome, result,
    error_type, error_message, error_traceback, crc)
VALUES {rows}
"""
_MAX_SEQ = "SELECT coalesce(max(seq), 0) FROM attempts"
_RELEASE = """
UPDATE states SET status = 0, worker = NULL, released = released + 1, ahead = ahead & 2, updated_at = ?
WHERE id = ? AND attempt = ? AND worker = ? AND status = 1
"""
_RELEASE_ALL = """
UPDATE states SET released = released + (status = 1), status = 0, worker = NULL, ahead = ahead & 2, updated_at = ?
WHERE worker = ? AND status IN (1, 4)
"""
_DUE = "UPDATE states SET status = 0, worker = NULL WHERE id = ? AND attempt = ? AND worker = ? AND status = 4"
_LEAVE = "UPDATE workers SET ended_at = ?, last_seen = ? WHERE id = ? AND ended_at IS NULL"

_ANY_PENDING = """
SELECT EXISTS (
    SELECT 1 FROM states INDEXED BY states_pending WHERE status = 0 AND id <= :last AND id NOT IN strangers
)
"""
# The index finds them, the table says so: an index that is damaged must not make anybody wait for nobody.
_ANY_HELD = """
SELECT EXISTS (
    SELECT 1 FROM states AS i INDEXED BY states_held CROSS JOIN states AS s ON s.id = i.id
    WHERE i.status IN (1, 4) AND s.status IN (1, 4) AND i.id <= :last AND i.id NOT IN strangers
)
"""
_FAILURES = """
SELECT count(*) FROM states AS s INDEXED BY states_failed
WHERE s.status = 3 AND s.last > :since AND s.id <= :last AND s.id NOT IN strangers
"""
_IS_HERE = "SELECT 1 FROM workers WHERE id = ? AND ended_at IS NULL AND NOT dead"
_REGISTER = """
INSERT INTO workers (id, host, pid, machine, start, lease, started_at, last_seen)
VALUES (:id, :host, :pid, :machine, :start, :lease, :now, :now)
"""

_ENDED_SINCE = f"""
SELECT {COLUMNS}
FROM attempts AS a JOIN states AS s ON s.id = a.evaluation AND s.last = a.seq LEFT JOIN evaluations AS e ON e.id = s.id
LEFT JOIN workers AS w ON w.id = a.worker
WHERE a.seq > :cursor AND s.status IN (2, 3) AND s.id <= :last AND s.id NOT IN strangers ORDER BY a.seq
"""
_SEQ = 9  # the place of the attempt's number in it

_COUNTS = """
SELECT status, count(*), min(last), max(last) FROM states WHERE id <= :last AND id NOT IN strangers GROUP BY status
"""
_IS_KEPT = "SELECT 1 FROM attempts WHERE seq = ?"
_CAUSES = """
SELECT coalesce(CAST(a.outcome AS TEXT), ''), count(*)
FROM states AS s INDEXED BY states_failed JOIN attempts AS a ON a.seq = s.last
WHERE s.status = 3 AND s.id <= :last AND s.id NOT IN strangers GROUP BY 1
"""


class _Connection(aiosqlite.Connection):
    """An aiosqlite connection that runs whole functions on its thread.

    aiosqlite's own methods are one hop to the thread per statement, which is slow and leaves transactions open when
    their task is cancelled; what queues a function is not public there, hence this one place that uses it.
    """

    def __init__(self, connector: Callable[[], sqlite3.Connection]) -> None:
        super().__init__(connector, iter_chunk_size=64)
        # The second Ctrl-C must end the process whatever this thread is waiting for.
        self._thread.daemon = True
        self._thread.name = "speval store"

    async def finish(self) -> None:
        """Close the connection behind whatever its thread is still doing, also when cancelled."""
        stopped = self.stop()
        try:
            if stopped is not None:
                with CancelScope(shield=True):
                    await asyncio.shield(stopped)
        except asyncio.CancelledError:
            with suppress(sqlite3.ProgrammingError):  # closed by now
                if self._connection is not None:
                    self._connection.interrupt()
            raise
        finally:
            self.join()

    @property
    def has_begun(self) -> bool:
        """Return whether there was room for its thread."""
        return self._thread.ident is not None

    def join(self) -> None:
        """Wait for the thread, which has been told to end and must not outlive the loop it reports to."""
        if self.has_begun:
            self._thread.join()

    async def run(self, work: Callable[[], T]) -> T:
        """Run a function without parameters: aiosqlite logs what it is given, and args and results are not for logs."""
        result: T = await self._execute(work)  # type: ignore[no-untyped-call]
        return result


class SqliteStore(Store):
    """Evaluations in one SQLite file.

    Args:
        path: The file.
        mode: ``create`` makes it if it is missing, ``write`` needs it to be there, ``read`` changes nothing.
        durability: ``process`` survives the death of any process, ``power`` a power cut too.
        clock: Where the time comes from.
    """

    def __init__(
        self,
        path: Path,
        mode: StoreMode = "create",
        durability: Durability = "process",
        clock: Clock | None = None,
    ) -> None:
        self.path = path
        self._shown = shown_path(path)
        self._mode: StoreMode = mode
        self._durability: Durability = durability
        self._clock = clock or Clock()
        self.damaged = Damaged(self._shown)
        self._given_up = threading.Event()
        self._file: SqliteFile | None = None
        self._connection: _Connection | None = None
        self._last = 0  # the highest id of the space
        self._since = 0  # the highest attempts.seq when the space was seeded
        self._version = -1

    def __repr__(self) -> str:
        return f"<SqliteStore {self._shown!r}{'' if self._connection else ' closed'}>"

    @property
    def shown(self) -> str:
        return self._shown

    @property
    def beside(self) -> Path:
        return Path(os.path.realpath(self.path))  # one name, by whichever link a copy was given the file

    async def open(self) -> None:
        def connect() -> sqlite3.Connection:
            # A copy that starts waits for as long as one that runs.
            patience = math.inf if self._mode == "create" else None
            self._file = SqliteFile(self.path, self._mode, self._durability, patience, self._given_up)
            self._file.connection.execute(_OPENED)
            return self._file.connection

        connection = _Connection(connect)
        try:
            await connection
        except BaseException as error:
            # A cancelled connect would leave its thread and its file behind, and the thread may be waiting for a lock.
            self._given_up.set()
            connection.join()
            if self._file is not None:  # cancelled when it was open already
                self._file.close()
            if not connection.has_begun:
                raise SystemLimitError("the database's thread") from error
            raise
        self._connection = connection
        await self._look_for_log()
        if self._file is not None and self._file.network and self._mode == "create":
            logger.warning(
                "%s is on a network filesystem (%s), or on what may be one: commits are slow there, and safe only where its "
                "locks work; for many machines a PostgreSQL database is the way",
                self._shown,
                self._file.network,
            )

    async def _look_for_log(self) -> None:
        """Warn of a file that was copied without its -wal; with workers of this machine, another program may have merged it."""
        if self._mode == "create" and self._file is not None and self._file.lacks_log:
            problem = await self._read(missing_log, this_process().machine)
            if problem is not None:
                logger.warning("%s: %s; what is not in it is evaluated again", self._shown, problem)

    async def close(self) -> None:
        self.damaged.tell()
        connection, self._connection = self._connection, None
        if connection is not None and self._file is not None and self._file.owner.is_here:
            self._given_up.set()
            try:
                await connection.finish()
            finally:
                self._file.close()

    def abandon(self) -> None:
        self._given_up.set()

    def lease_keeping(self) -> LeaseKeeping:
        # A symbolic link may lead elsewhere by now.
        return SqliteLeaseKeeping(self._file.path if self._file else self.path, self._clock)

    async def _write(self, work: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        connection, file = self._opened()
        return await connection.run(lambda: file.write(work, *args, **kwargs))

    async def _read(self, work: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        connection, file = self._opened()
        return await connection.run(lambda: file.read(work, *args, **kwargs))

    def _opened(self) -> tuple[_Connection, SqliteFile]:
        if self._connection is None or self._file is None:
            raise StoreClosedError(self._shown)
        self._file.owner.check()  # a fork does not have the thread that would answer
        return self._connection, self._file

    # The space

    async def seed(self, space: Space, on_changed: OnChanged) -> Seeded:
        file = self._opened()[1]
        file.connection.allowance = space.count * _A_ROW
        (self._since, self._last, is_known) = await self._read(seeding.is_known, space)
        if is_known:
            return Seeded(new=0, unchanged=space.count, changed=0, gone=0)
        if space.count and not self._last and await self._fill(space):
            return Seeded(new=space.count, unchanged=0, changed=0, gone=0)
        # Left behind when cancelled or broken off: the connection is closed then, and its TEMP tables go with it.
        await self._read(seeding.load, space.rows())
        try:
            while True:
                comparison = await self._read(seeding.compare)
                comparison.refuse(self._shown, on_changed)
                added = 0
                for low in range(0, space.count, seeding.CHUNK) if comparison.missing else ():
                    # Looked up without the lock: most of a space that is only extended needs no writing.
                    if await self._read(seeding.count_missing, low, low + seeding.CHUNK):
                        added += await self._write(seeding.add, low, low + seeding.CHUNK, self._clock.wall())
                if added != comparison.missing:
                    continue  # others are seeding as well, and what they have stored must be compared
                settled = await self._write(seeding.settle, space, comparison, on_changed, self._clock.wall())
                if settled is not None:
                    break  # else others have given evaluations new args since we compared
        except ArgsChangedError:
            await self._read(seeding.unload)
            raise
        await self._read(seeding.unload)
        gone, self._last = settled
        return comparison.seeded(space.count, gone)

    async def _fill(self, space: Space) -> bool:
        """Seed a database without evaluations, where there is nothing to compare; False if somebody else does so too."""
        rows, filled = space.rows(), 0
        while filled < space.count:
            added = await self._write(seeding.fill, space, rows, filled, self._clock.wall())
            if not added:
                return False
            filled += added
        self._last = filled
        return True

    async def follow(self) -> None:
        self._since = await self._read(seeding.follow)
        self._last = _ALL

    async def extend(self, rows: Sequence[tuple[Key, str]], on_changed: OnChanged) -> Seeded:
        return await self._write(seeding.extend, self._shown, rows, on_changed, self._clock.wall())

    # Claiming and recording

    async def register(self, lease: float) -> int:
        process, worker = this_process(), secrets.randbits(47)
        values = {"id": worker, "lease": lease, "now": self._clock.wall(), "machine": process.machine}
        values |= {"host": process.host, "pid": process.pid, "start": process.start}
        _, file = self._opened()
        await self._write(lambda c: c.execute(_REGISTER, values).rowcount)
        file.wait_as_usual()  # what is to be written from now on is kept by the worker meanwhile
        return worker

    async def record(self, record: Record) -> Recorded:
        if not (record.ended or record.released or record.due):
            # Take no lock before there is something to claim.
            is_any, recorded = await self._read(self._look, record.count_failures)
            if not is_any or not (record.idle or record.ahead):
                return recorded
        return await self._write(self._record, record)

    def _look(self, c: sqlite3.Connection, count_failures: bool) -> tuple[bool, Recorded]:
        pending, settings = self._any(c, _ANY_PENDING), settings_of(c)
        failures = self._failures(c) if count_failures else None
        recorded = Recorded(open=pending or self._any(c, _ANY_HELD), failures=failures, settings=settings)
        return pending and not settings.paused, recorded

    def _any(self, c: sqlite3.Connection, sql: str) -> bool:
        (found,) = c.execute(sql, {"last": self._last}).fetchone()
        return bool(found)

    def _failures(self, c: sqlite3.Connection) -> int:
        (count,) = c.execute(_FAILURES, {"last": self._last, "since": self._since}).fetchone()
        return int(count)

    def _record(self, c: sqlite3.Connection, record: Record) -> Recorded:
        now = self._clock.wall()
        recorded = Recorded(settings=settings_of(c))
        if record.ended:
            recorded.refused = _end(c, record.ended, now)
        if record.released:
            c.executemany(_RELEASE, [(now, claim.id, claim.attempt, claim.worker) for claim in record.released])
        if record.due:
            c.executemany(_DUE, [(claim.id, claim.attempt, claim.worker) for claim in record.due])
        if record.idle or record.ahead:
            if c.execute(_IS_HERE, (record.worker,)).fetchone() is None:
                recorded.lost = True
                return recorded
            if not recorded.settings.paused:
                recorded.claims = self._claim(c, record, now)
            if len(recorded.claims) < record.idle:
                pending = self._any(c, _ANY_PENDING)
                if pending and not (recorded.settings.paused or record.ended or record.released or record.due):
                    raise self._damaged()  # once there is nothing to be written with it
                recorded.open = bool(recorded.claims) or pending or self._any(c, _ANY_HELD)
        if record.count_failures:
            recorded.failures = self._failures(c)
        return recorded

    def _claim(self, c: sqlite3.Connection, record: Record, now: float) -> list[Claim]:
        worker, idle, ahead = record.worker, record.idle, record.ahead
        values = {"worker": worker, "now": now, "last": self._last}
        found = c.execute(_FIND, values | {"limit": idle}).fetchall() if idle else []
        self._take(c, found, values | {"ahead": 0})
        if ahead and len(found) == idle:
            fresh = c.execute(_FIND_FRESH, values | {"limit": ahead}).fetchall()
            self._take(c, fresh, values | {"ahead": 1})
            found = sorted(found + fresh, key=itemgetter(0))
        claims = []
        for id, attempt, charged, name, args, crc in found:
            if crc != of_evaluation(id, name, args):
                check_evaluation(self._shown, id, name, args, crc)
            claims.append(Claim(id, attempt, charged, str(name), args, worker))
        return claims

    def _take(self, c: sqlite3.Connection, found: list[Any], values: dict[str, Any]) -> None:
        taken = c.execute(_CLAIM, values | {"ids": json.dumps([row[0] for row in found])}).rowcount if found else 0
        if taken != len(found):
            raise self._damaged()

    def _damaged(self) -> DatabaseError:
        fix = f"`sqlite3 {self._shown} REINDEX` may mend it"
        return DatabaseError(self._shown, f"damaged: what it says is pending is not there to be had; {fix}")

    async def take_in(self, ended: Sequence[Ended]) -> TakenIn:
        return await self._write(take_in, ended, self._clock.wall(), _end)

    async def leave(self, worker: int) -> None:
        def leave(c: sqlite3.Connection) -> None:
            now = self._clock.wall()
            c.execute(_RELEASE_ALL, (now, worker))
            c.execute(_LEAVE, (now, now, worker))

        await self._write(leave)

    # Reading

    async def changed(self) -> bool:
        connection, file = self._opened()
        version = await connection.run(file.data_version)
        before, self._version = self._version, version
        return version != before

    async def ended_since(self, cursor: int, limit: int) -> tuple[int, list[tuple[int, Evaluation]]]:
        def fetch(c: sqlite3.Connection) -> tuple[int, list[tuple[int, Evaluation]]]:
            # Rows that are passed over need not be looked at again.
            (newest,) = c.execute(_MAX_SEQ).fetchone()
            found: list[tuple[int, Evaluation]] = []
            seen = cursor
            while not found and seen < newest:
                count = 0
                rows = c.execute(_ENDED_SINCE, {"cursor": seen, "last": self._last})
                for row in bounded(self._shown, rows, limit, _SEQ):
                    count += 1
                    seen = row[_SEQ]
                    try:
                        found.append((row[0], evaluation(self._shown, row)))
                    except EvaluationDamagedError as error:
                        self.damaged.add(error)
                if not count:
                    seen = newest
            return seen, found

        return await self._read(fetch)

    async def summary(self, *, at_end: bool = False) -> Summary:
        def count(c: sqlite3.Connection) -> Summary:
            counts: dict[str, int] = dict.fromkeys(STATUS.values(), 0)
            ended = 0
            for status, number, *seqs in c.execute(_COUNTS, {"last": self._last}).fetchall():
                # The first and the last attempt stand for all: whoever deletes attempts deletes the oldest or all of them.
                is_kept = status not in (2, 3) or all(c.execute(_IS_KEPT, (seq,)).fetchone() for seq in seqs)
                counts[STATUS[status]] += number if is_kept or not at_end else 0
                ended += number if status in (2, 3) else 0
            if at_end:  # after all were deleted, their numbers are given again
                counts["completed"] -= min(counts["completed"], max(0, ended - c.execute(_MAX_SEQ).fetchone()[0]))
            causes: dict[Cause, int] = dict(c.execute(_CAUSES, {"last": self._last}).fetchall())
            return Summary(counts["pending"], counts["in_progress"], counts["completed"], counts["failed"], causes)

        return await self._read(count)


def _for_rows(c: sqlite3.Connection, sql: str, rows: Sequence[tuple[Any, ...]], at_once: tuple[int, ...] = _AT_ONCE) -> int:
    """Execute a statement for rows, many at once, and return how many rows of the table it has changed.

    Each execution gives the GIL away, and has to wait for it afterwards where the event loop is busy.
    """
    changed, start = 0, 0
    one = f"({', '.join('?' * len(rows[0]))})"
    for size in at_once:
        while len(rows) - start >= size:
            statement = _statement(sql, one, size)
            changed += c.execute(statement, tuple(chain.from_iterable(rows[start : start + size]))).rowcount
            start += size
    return changed


@lru_cache
def _statement(sql: str, row: str, count: int) -> str:
    return sql.format(rows=", ".join([row] * count))


def _end(c: sqlite3.Connection, ended: Sequence[Ended], now: float) -> list[Claim]:
    """Record the attempts whose tokens are good and return the claims of the others."""
    (newest,) = c.execute(_MAX_SEQ).fetchone()
    updates = []
    for seq, (claim, outcome, again) in enumerate(ended, newest + 1):
        status = 2 if outcome.cause is None else 4 if again else 3
        holder = claim.worker if again else None
        updates.append((status, holder, seq, now, claim.id, claim.attempt, claim.worker))
    if _for_rows(c, _END, updates) == len(updates):
        attempts = [_attempt(u[2], e, now) for u, e in zip(updates, ended, strict=True)]
        # SQLite copies what a statement is given.
        is_heavy = sum(len(e.outcome.result or "") for e in ended) > _HEAVY
        _for_rows(c, _ADD_ATTEMPT, attempts, (1,) if is_heavy else _AT_ONCE)
        return []
    # Some are stale, and only their own rows tell which: a good one now points to its row in attempts.
    refused = []
    for update, e in zip(updates, ended, strict=True):
        row = c.execute("SELECT attempt, last FROM states WHERE id = ?", (e.claim.id,)).fetchone()
        if row == (e.claim.attempt, update[2]):
            _for_rows(c, _ADD_ATTEMPT, [_attempt(update[2], e, now)])
        else:
            refused.append(e.claim)
    return refused


def _attempt(seq: int, ended: Ended, now: float) -> tuple[Any, ...]:
    claim, outcome, _ = ended
    error = outcome.error
    shown = (None, None, None) if error is None else (error["type"], error["message"], error["traceback"])
    times = (outcome.started_at, outcome.duration, now)
    row = (seq, claim.id, claim.attempt, claim.worker, *times, outcome.cause or "completed", outcome.result, *shown)
    return (*row, of_attempt(row))
