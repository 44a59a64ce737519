"""The store in one SQLite file, through aiosqlite.

Owns the SQL of every verb a worker uses on its own connection. Invariant: each verb is one or a few whole transactions,
each run in one go on the connection's thread, so no cancelled task can leave one open and no stall of the event loop can
make others wait.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from ...clock import Clock
from ...errors import ArgsChangedError, EvaluationDamagedError, StoreClosedError, SystemLimitError
from ...host import this_process
from ...model import Cause, Durability, Evaluation, OnChanged, Summary
from ...spaces.eager import Key, Space
from ..base import Ended, LeaseKeeping, Record, Recorded, Seeded, Store, StoreMode, TakenIn
from ..rows import Damaged
from . import record as recording
from . import seed as seeding
from .connection import TransactionThread
from .file import SqliteFile, shown_path
from .late import take_in
from .lease import SqliteLeaseKeeping
from .record import Part
from .rows import FINAL_COLUMNS, bounded, evaluation
from .states import put_back_all
from .watchman import missing_log

__all__ = ["SqliteStore"]

logger = logging.getLogger("speval.store")

P = ParamSpec("P")
T = TypeVar("T")

_A_ROW = 1000  # bytes of file that a row of an eval space counts as, for what may be done to it
_OPENED = "CREATE TEMP TABLE unlisted (id INTEGER PRIMARY KEY)"
_ALL = 2**62  # as the highest id of a space: whatever is stored, and whatever will be

_LEAVE = "UPDATE workers SET ended_at = ?, last_seen = ? WHERE id = ? AND ended_at IS NULL"
_REGISTER = """
INSERT INTO workers (id, host, pid, machine, start, lease, started_at, last_seen)
VALUES (:id, :host, :pid, :machine, :start, :lease, :now, :now)
"""

_ENDED_SINCE = f"""
SELECT {FINAL_COLUMNS}
FROM attempts AS a LEFT JOIN evaluations AS e ON e.id = a.evaluation LEFT JOIN workers AS w ON w.id = a.worker
WHERE a.seq > :cursor AND a.final AND a.evaluation <= :last AND a.evaluation NOT IN unlisted ORDER BY a.seq
"""
_SEQ = 9  # the place of the attempt's number in it

# A range counts as a whole, less what is not of the space.
_OF_RANGE = """
total(min(last, :last) - first + 1 - (SELECT count(*) FROM unlisted WHERE id BETWEEN first AND min(last, :last)))
"""
_COUNTS = f"""
SELECT (SELECT {_OF_RANGE} FROM fresh WHERE first <= :last)
        + (SELECT count(*) FROM queue WHERE id <= :last AND id NOT IN unlisted)
        + (SELECT total(held) FROM running WHERE id <= :last AND id NOT IN unlisted),
    (SELECT {_OF_RANGE} FROM claimed WHERE first <= :last)
        + (SELECT total(NOT held) FROM running WHERE id <= :last AND id NOT IN unlisted),
    (SELECT count(*) FROM attempts INDEXED BY attempts_final
        WHERE final AND evaluation <= :last AND evaluation NOT IN unlisted)
"""
_CAUSES = """
SELECT coalesce(CAST(outcome AS TEXT), ''), count(*) FROM attempts INDEXED BY attempts_failed
WHERE final AND outcome <> 'completed' AND evaluation <= :last AND evaluation NOT IN unlisted GROUP BY 1
"""


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
        self._connection: TransactionThread | None = None
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

        try:
            connection = TransactionThread(connect)
        except RuntimeError as error:
            raise SystemLimitError("the database's thread") from error
        try:
            await connection.open()
        except BaseException as error:
            self._given_up.set()
            if isinstance(error, RuntimeError) and not connection.has_begun:
                raise SystemLimitError("the database's thread") from error
            # A cancelled connect would leave its thread and its file behind, and the thread may be waiting for a lock.
            connection.join()
            if self._file is not None:  # cancelled when it was open already
                self._file.close()
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

    def _opened(self) -> tuple[TransactionThread, SqliteFile]:
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
        if space.count <= seeding.SMALL:
            seeded, self._last = await self._write(seeding.at_once, self._shown, space, on_changed, self._clock.wall())
            return seeded
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
        """Seed a database without evaluations, which needs no comparison; False if another worker does the same."""
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
            is_any, recorded = await self._read(recording.look, self._part, record.count_failures)
            if not is_any or not (record.idle or record.ahead):
                return recorded
        return await self._write(recording.record, self._shown, self._part, record, self._clock.wall())

    @property
    def _part(self) -> Part:
        return Part(self._last, self._since)

    async def take_in(self, ended: Sequence[Ended]) -> TakenIn:
        return await self._write(take_in, ended, self._clock.wall())

    async def leave(self, worker: int) -> None:
        def leave(c: sqlite3.Connection) -> None:
            now = self._clock.wall()
            put_back_all(c, worker, now)
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
            newest = recording.newest(c)
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
            pending, running, ended = (int(count) for count in c.execute(_COUNTS, {"last": self._last}).fetchone())
            causes: dict[Cause, int] = dict(c.execute(_CAUSES, {"last": self._last}).fetchall())
            failed = sum(causes.values())
            return Summary(pending, running, ended - failed, failed, causes)

        return await self._read(count)
