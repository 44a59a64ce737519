"""The store in a PostgreSQL database, through psycopg.

Owns the verbs of a worker. Invariant: each verb is one transaction, run without interruption on the store's thread, so neither
a cancelled task nor a busy event loop can leave a transaction open. If no answer arrives, the store finds out what the
transaction did before it repeats anything.

It uses psycopg's blocking connections. asyncpg needs half the time per row, but psycopg uses libpq with all its login methods,
TLS, host lists and keepalives, and reports a broken connection at once and in one way.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from ...clock import Clock
from ...errors import StoreClosedError
from ...host import this_process
from ...model import Cause, Claim, Durability, Evaluation, OnChanged, Settings, Summary
from ...spaces.eager import Key, Space
from ...threads import WorkThread
from ...url import PostgresUrl
from ..base import Ended, LeaseKeeping, Record, Recorded, Seeded, Store, StoreMode, TakenIn
from ..rows import Damaged
from .connection import Connection, PostgresConnection, numbers, texts
from .feed import Feed
from .late import take_in
from .lease import PostgresLeaseKeeping
from .rows import in_space
from .schema import READY, Names, prepare, stored_name, true_name
from .seed import Extent, Seeding

__all__ = ["PostgresStore"]

logger = logging.getLogger("speval.store")

P = ParamSpec("P")
T = TypeVar("T")

_LOOK_EVERY = 0.2  # seconds between two checks of an idle worker without notifications
_ANSWER = 60.0  # seconds to wait for the answer of a record before it is repeated
_LEAVE = 8.0  # seconds that a worker tries to leave
_MOST_TEXT = 64_000_000  # the maximum number of characters of results in one statement

_RECORD = f"SELECT * FROM speval.record_1({', '.join(['%s'] * 4)}, {{}}, {', '.join(['%s'] * 7)})"
_TEXT = "pg_catalog.text"  # the other types are SQL keywords, which do not depend on search_path
_ENDED_TYPES = ("bigint", "integer", "bigint", "boolean", _TEXT, "double precision", "double precision", *[_TEXT] * 4)
_TOKEN_TYPES = ("bigint", "integer", "bigint")
_RECORD = _RECORD.format(", ".join(f"%s::{type_}[]" for type_ in (*_ENDED_TYPES, *_TOKEN_TYPES, *_TOKEN_TYPES)))
_NO_ENDED: tuple[str | None, ...] = (None,) * len(_ENDED_TYPES)
_NO_TOKENS: tuple[str | None, ...] = (None,) * len(_TOKEN_TYPES)

_REGISTER = """
INSERT INTO speval.workers (id, host, pid, machine, start, lease, expires_at, started_at, last_seen)
VALUES (%(id)s, %(host)s, %(pid)s, %(machine)s, %(start)s, %(lease)s, speval.clock() + %(lease)s, %(now)s, %(now)s)
ON CONFLICT (id) DO NOTHING
"""
_LEAVE_NOW = "SELECT speval.leave_1(%s, %s)"

_SUMMARY = f"""
SELECT (SELECT count(*) FROM speval.queue AS q WHERE {in_space("q.id")}),
    (SELECT count(*) FROM speval.running AS r WHERE r.held AND {in_space("r.id")}),
    (SELECT count(*) FROM speval.running AS r WHERE NOT r.held AND {in_space("r.id")}),
    (SELECT count(*) FROM speval.evaluations AS e WHERE {in_space("e.id")}),
    (SELECT coalesce(json_object_agg(outcome, number), '{{{{}}}}') FROM (
        SELECT a.outcome, count(*) AS number FROM speval.attempts AS a
        WHERE a.final AND {{}} AND {in_space("a.evaluation")} GROUP BY a.outcome
    ) AS causes)
"""
_SUMMARY, _SUMMARY_AT_END = _SUMMARY.format("a.outcome <> 'completed'"), _SUMMARY.format("true")


class PostgresStore(Store):
    """The evaluations of one namespace of a PostgreSQL database.

    Args:
        url: The database and the namespace.
        mode: ``create`` creates the namespace if it is missing, ``write`` requires that it exists, ``read`` changes nothing.
        durability: Ignored: the settings of the server decide whether a recorded result survives a power failure.
        clock: The clock for display times.
    """

    def __init__(
        self,
        url: PostgresUrl,
        mode: StoreMode = "create",
        durability: Durability = "process",
        clock: Clock | None = None,
    ) -> None:
        self.url = url
        self._shown = url.shown
        self.damaged = Damaged(url.shown)
        self._mode: StoreMode = mode
        self._clock = clock or Clock()
        self._beside = Path(url.file_name).absolute()  # in the current folder; the function may change it later
        self._connection = PostgresConnection(url, works=mode == "create", writes=mode != "read")
        self._thread: WorkThread | None = None
        self._names = Names(url.schema)
        self._seeding = Seeding(self._names, self._shown)
        self._feed = Feed(self._names, self._shown, self.damaged)
        self._extent = Extent()
        self._lease = 30.0
        self._after = 0  # the highest id claimed so far; the next claim starts after it
        self._calls = 0  # the number of calls of record
        self._unanswered: int | None = None  # the first record without an answer
        self._in_question: set[tuple[int, int, int]] = set()  # tokens of attempts sent with unanswered records
        self._looked = -1.0  # monotonic

    def __repr__(self) -> str:
        return f"<PostgresStore {self._shown!r}{'' if self._thread else ' closed'}>"

    @property
    def shown(self) -> str:
        return self._shown

    @property
    def beside(self) -> Path:
        return self._beside

    async def open(self) -> None:
        thread = WorkThread("speval store")

        def connect() -> None:
            self._connection.open()
            self._connection.run(prepare, self.url, self._mode)

        try:
            await thread.run(connect)
        except BaseException:
            await thread.finish(self._connection.close, self._connection.give_up)
            raise
        self._thread = thread

    async def close(self) -> None:
        self.damaged.tell()
        thread, self._thread = self._thread, None
        if thread is not None:
            await thread.finish(self._connection.close, self._connection.give_up)
        else:
            self._connection.close()

    def abandon(self) -> None:
        self._connection.give_up()

    def lease_keeping(self) -> LeaseKeeping:
        return PostgresLeaseKeeping(self._connection, self._names, self._clock, self._lease)

    async def _run(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run idempotent work; it may run twice."""
        thread = self._opened()
        return await thread.run(lambda: self._connection.run(work, *args, **kwargs))

    async def _run_once(
        self, patience: float, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        thread = self._opened()
        return await thread.run(lambda: self._connection.run_once(patience, work, *args, **kwargs))

    def _opened(self) -> WorkThread:
        if self._thread is None:
            raise StoreClosedError(self._shown)
        return self._thread

    def _execute(self, c: Connection, sql: str, values: Any = None) -> Any:
        return c.execute(self._names(sql), values)

    # The space

    async def seed(self, space: Space, on_changed: OnChanged) -> Seeded:
        try:
            seeded, self._extent = await self._run(self._seeding.seed, space, on_changed, self._clock.wall())
        except asyncio.CancelledError:
            # It may wait long for another worker that seeds, or send data for a long time.
            self._connection.give_up()
            raise
        self._after = self._extent.first - 1
        return seeded

    async def follow(self) -> None:
        self._extent = await self._run(self._seeding.follow)
        self._after = self._extent.first - 1

    async def extend(self, rows: Sequence[tuple[Key, str]], on_changed: OnChanged) -> Seeded:
        return await self._run(self._seeding.extend, rows, on_changed, self._clock.wall())

    # Claiming and recording

    async def register(self, lease: float) -> int:
        process, worker = this_process(), secrets.randbits(47)
        values = {"id": worker, "lease": lease, "now": self._clock.wall(), "machine": process.machine}
        values |= {"host": process.host, "pid": process.pid, "start": process.start}

        def enter(c: Connection) -> None:
            self._execute(c, READY)
            self._execute(c, _REGISTER, values)

        await self._run(enter)
        self._lease = lease
        self._unanswered = None  # unanswered claims belong to the previous worker id
        return worker

    async def record(self, record: Record) -> Recorded:
        thread = self._opened()

        def call_numbered() -> Recorded:
            self._calls += 1
            call = self._calls
            try:
                recorded = self._connection.call(_ANSWER, self._record, call, record)
            except BaseException:
                if self._unanswered is None:
                    self._unanswered = call
                self._in_question.update(_token(e.claim) for e in record.ended)
                raise
            self._unanswered = None
            self._in_question.clear()
            self._looked = self._clock.monotonic()
            return recorded

        return await thread.run(call_numbered)

    def _record(self, c: Connection, call: int, record: Record) -> Recorded:
        pieces, refused = _pieces(record.ended)
        if len(pieces) == 1:
            recorded = self._send(c, call, record, pieces[0], refused)
        else:
            ended_only = Record(record.worker)
            with c.block():
                for piece in pieces[:-1]:
                    self._send(c, call, ended_only, piece, refused)
                recorded = self._send(c, call, record, pieces[-1], refused)
        recorded.refused = [record.ended[place].claim for place in sorted(refused)]
        return recorded

    def _send(
        self, c: Connection, call: int, record: Record, placed: Sequence[tuple[int, Ended]], refused: set[int]
    ) -> Recorded:
        """Send one statement with the attempts in ``placed``, and add the positions of refused ones to ``refused``."""
        extent, worker = self._extent, record.worker
        since = extent.since if record.count_failures else None
        values = (
            (worker, call, self._unanswered, self._clock.wall())
            + (_ended([e for _, e in placed], worker) if placed else _NO_ENDED)
            + (_tokens(record.released) if record.released else _NO_TOKENS)
            + (_tokens(record.due) if record.due else _NO_TOKENS)
            + (record.idle, record.ahead, self._after, extent.first, extent.last, extent.space, since)
        )
        recorded = Recorded()
        rows: list[tuple[int, int, int, str, str]] = []
        for kind, number, second, third, name, text in self._execute(c, _RECORD, values).fetchall():
            if kind == 1:
                rows.append((number, second, third, name, text))
            elif kind == 2:
                place, (claim, _, _) = placed[number - 1]
                # It is already recorded: it was sent before, and the answer did not arrive.
                if not (third and _token(claim) in self._in_question):
                    refused.add(place)
            else:
                recorded.failures = number
                recorded.settings = Settings(text == "paused", second)
                recorded.open = None if third is None else bool(third)
                recorded.lost = name == "lost"
                if text == "again":
                    self._after = extent.first - 1
        rows.sort()
        recorded.claims = [
            Claim(id, attempt, charged, true_name(name), args, worker) for id, attempt, charged, name, args in rows
        ]
        if rows:
            self._after = max(self._after, rows[-1][0])
        return recorded

    async def take_in(self, ended: Sequence[Ended]) -> TakenIn:
        def end(c: Connection, adopted: Sequence[Ended]) -> Sequence[Claim]:
            again = [e.claim for e in adopted if e.again]
            return self._record(c, 0, Record(0, adopted, due=again)).refused  # no worker has id 0; it claims nothing

        return await self._run(take_in, self._names, ended, self._clock.wall(), end)

    async def leave(self, worker: int) -> None:
        thread, values = self._opened(), (worker, self._clock.wall())
        await thread.run(lambda: self._connection.call(_LEAVE, lambda c: self._execute(c, _LEAVE_NOW, values).fetchone()))

    # Reading

    async def changed(self) -> bool:
        heard = await self._opened().run(self._connection.heard)
        return heard or self._clock.monotonic() - self._looked >= _LOOK_EVERY

    async def ended_since(self, cursor: int, limit: int) -> tuple[int, list[tuple[int, Evaluation]]]:
        return await self._run(self._feed.read, self._extent, cursor, limit)

    async def summary(self, *, at_end: bool = False) -> Summary:
        extent = {"first": self._extent.first, "last": self._extent.last, "space": self._extent.space}

        def count(c: Connection) -> Summary:
            sql = _SUMMARY_AT_END if at_end else _SUMMARY
            pending, held, in_progress, total, causes = self._execute(c, sql, extent).fetchone()
            completed = causes.pop("completed", 0)
            counted: dict[Cause, int] = causes
            failed = sum(counted.values())
            pending += held
            others = total - pending - in_progress - failed
            return Summary(pending, in_progress, min(completed, others) if at_end else others, failed, counted)

        return await self._run(count)


def _token(claim: Claim) -> tuple[int, int, int]:
    return claim.id, claim.attempt, claim.worker


def _pieces(ended: Sequence[Ended]) -> tuple[list[list[tuple[int, Ended]]], set[int]]:
    """Return the attempts for each statement with their positions, and the positions of duplicates, which are stale."""
    first = {_token(e.claim): place for place, e in reversed(list(enumerate(ended)))}
    twice = set(range(len(ended))).difference(first.values()) if len(first) < len(ended) else set()
    pieces: list[list[tuple[int, Ended]]] = [[]]
    size = 0
    for place, e in enumerate(ended):
        if place in twice:
            continue
        size += len(e.outcome.result or "")
        if size > _MOST_TEXT and pieces[-1]:
            pieces.append([])
            size = len(e.outcome.result or "")
        pieces[-1].append((place, e))
    return pieces, twice


def _ended(ended: Sequence[Ended], worker: int) -> tuple[str | None, ...]:
    """Return the columns of ended attempts; None for a column with only default values."""
    claims = [e.claim for e in ended]
    outcomes = [e.outcome for e in ended]
    usual = all(outcome.cause is None for outcome in outcomes)
    errors = [outcome.error for outcome in outcomes]
    columns: tuple[str | None, ...] = (
        numbers(claim.id for claim in claims),
        numbers(claim.attempt for claim in claims),
        None if all(claim.worker == worker for claim in claims) else numbers(claim.worker for claim in claims),
        numbers(e.again for e in ended) if any(e.again for e in ended) else None,
        None if usual else texts(outcome.cause for outcome in outcomes),
        numbers(outcome.started_at for outcome in outcomes),
        numbers(outcome.duration for outcome in outcomes),
        texts(outcome.result for outcome in outcomes),
    )
    if usual:
        return (*columns, None, None, None)
    stored = [[None if e is None else stored_name(e[key]) for e in errors] for key in ("type", "message", "traceback")]
    return (*columns, *(texts(column) for column in stored))


def _tokens(claims: Sequence[Claim]) -> tuple[str | None, ...]:
    return (
        numbers(claim.id for claim in claims),
        numbers(claim.attempt for claim in claims),
        numbers(claim.worker for claim in claims),
    )
