"""One database for a test, of whichever kind, seen past the store: what is stored, what is set, what the time is."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psycopg

from speval.model import Finding, Health
from speval.options import Location, checked_database
from speval.stores import make_control, make_store
from speval.stores.base import Store
from speval.stores.control import Control
from speval.stores.postgres.trust import sources
from speval.url import PostgresUrl

from .conftest import MovableClock, rows
from .postgres_server import Server


def findings(health: Health) -> list[Finding]:
    """Return what a check finds, but for the server of the tests, which runs without fsync."""
    return [finding for finding in health.findings if "fsync off" not in finding.problem]


class Place(ABC):
    """Where a test keeps its evaluations."""

    argument: str | Path  # as a user gives it
    control_module: str
    state_tables: tuple[str, ...]  # what a record may change
    clock: MovableClock

    @property
    def checked(self) -> Location:
        return checked_database(self.argument)

    def store(self, mode="create", clock: MovableClock | None = None) -> Store:
        return make_store(self.checked, mode, clock=clock or self.clock)

    def control(self, mode="read") -> Control:
        return make_control(self.checked, mode, self.clock)

    @abstractmethod
    def query(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Return what a query brings; tables go by the names that both kinds have."""

    @abstractmethod
    def execute(self, sql: str, *parameters: object) -> None:
        """Execute a statement."""

    def set(self, key: str, value: int | None) -> None:
        """Set what holds for all workers; None takes it back."""
        self.execute(f"DELETE FROM meta WHERE key = '{key}'")
        if value is not None:
            self.execute(f"INSERT INTO meta VALUES ('{key}', '{value}')")

    @abstractmethod
    def overtaken(self, monkeypatch, store: Store, other: Callable[[], Awaitable[None]]) -> list[bool]:
        """Let another copy act once when the store has compared a space and written nothing; tell whether it has."""

    def missing(self) -> None:
        """Make it one that is not there."""

    def as_made(self) -> None:
        """Make it as speval makes it, for other processes, which know nothing of the test's clock."""

    def close(self) -> None:
        pass


class SqlitePlace(Place):
    control_module = "speval.stores.sqlite.control"
    state_tables = ("fresh", "claimed", "queue", "running", "attempts")

    def __init__(self, path: Path, clock: MovableClock) -> None:
        self.argument = self.path = path
        self.clock = clock

    def query(self, sql, *parameters):
        return rows(self.path, sql, *parameters)

    def execute(self, sql, *parameters):
        connection = sqlite3.connect(self.path, timeout=10)
        with connection:
            connection.execute(sql, parameters)
        connection.close()

    def overtaken(self, monkeypatch, store, other):
        read, done = store._read, []

        async def read_and_be_overtaken(work, *args):
            result = await read(work, *args)
            if work.__name__ == "compare" and not done:
                done.append(True)
                await other()
            return result

        monkeypatch.setattr("speval.stores.sqlite.seed.SMALL", -1)  # a small space is stored at once
        monkeypatch.setattr(store, "_read", read_and_be_overtaken)
        return done


class ServerClock(MovableClock):
    """A clock that the server goes by as well."""

    def __init__(self) -> None:
        self.tell: Callable[[float], None] = lambda now: None
        super().__init__()
        self.now = 3e9  # the server has been up for a long time

    @property
    def now(self) -> float:
        return self._now

    @now.setter
    def now(self, value: float) -> None:
        self._now = value
        self.tell(value)


class PostgresPlace(Place):
    """A namespace in the PostgreSQL database that all tests share."""

    control_module = "speval.stores.postgres.control"
    state_tables = ("queue", "running", "attempts")

    def __init__(self, server: Server, namespace: str, clock: ServerClock | None = None) -> None:
        self.argument = server.url(namespace=namespace)
        self.url = PostgresUrl.parse(self.argument)
        self.clock = clock or MovableClock()
        self._connection = psycopg.connect(server.url(), autocommit=True)
        # A test may look before there is anything to see.
        self._connection.execute(f"SELECT set_config('search_path', '{self.url.schema}', false)")
        if isinstance(clock, ServerClock):
            self._go_by(clock)

    def _go_by(self, clock: ServerClock) -> None:
        """Make the server's clock one that the test moves."""
        asyncio.run(self._create())
        self.execute("CREATE TABLE test_clock AS SELECT 0::double precision AS now")
        self._own_clock = self.query(f"SELECT pg_get_functiondef('{self.url.schema}.clock()'::regprocedure)")[0][0]
        body = f"SELECT now FROM {self.url.schema}.test_clock"
        sources(self.url.schema)["clock"].add(hashlib.sha256(body.encode()).hexdigest())
        self.execute(f"CREATE OR REPLACE FUNCTION {self.url.schema}.clock() RETURNS double precision LANGUAGE sql AS '{body}'")
        clock.tell = lambda now: self.execute("UPDATE test_clock SET now = %s", now)
        clock.tell(clock.now)

    def as_made(self) -> None:
        self.execute(self._own_clock)

    async def _create(self) -> None:
        store = self.store()
        await store.open()
        await store.close()

    def query(self, sql, *parameters):
        return self._connection.execute(sql.replace("?", "%s"), parameters or None).fetchall()

    def execute(self, sql, *parameters):
        self._connection.execute(sql.replace("?", "%s"), parameters or None)

    def overtaken(self, monkeypatch, store, other):
        known, done, loop = store._seeding._known, [], asyncio.get_running_loop()

        def be_overtaken(c, space):
            found = known(c, space)
            if found is None and not done:
                done.append(True)
                asyncio.run_coroutine_threadsafe(other(), loop).result()
            return found

        monkeypatch.setattr(store._seeding, "_known", be_overtaken)
        return done

    def missing(self):
        """Make it one that is not there."""
        self.execute(f"DROP SCHEMA {self.url.schema} CASCADE")

    def close(self):
        self._connection.execute("SET client_min_messages = error")
        self._connection.execute(f"DROP SCHEMA IF EXISTS {self.url.schema} CASCADE")
        self._connection.close()
