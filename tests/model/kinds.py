"""What differs from one kind of store to the other, as the model sees it."""

from __future__ import annotations

import itertools
import os
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

from speval.stores import make_control
from speval.stores.postgres.store import PostgresStore
from speval.stores.sqlite.states import HOMES, STATES
from speval.stores.sqlite.store import SqliteStore

from ..databases import PostgresPlace, ServerClock
from ..postgres_server import Server

_STORED = """
SELECT e.id, {name}, e.args, {status}, {attempt}, {made}, {charged}, {worker}, {updated},
    (SELECT count(*) FROM attempts WHERE evaluation = e.id), {last} FROM evaluations AS e {states} ORDER BY e.id
"""
ATTEMPTS = "SELECT seq, evaluation, attempt, worker, outcome, result, started_at, duration FROM attempts ORDER BY seq"
WORKERS = "SELECT id, beat, dead, ended_at IS NOT NULL FROM workers ORDER BY id"
VIEW = "SELECT name, status, updated, result, args FROM evals"


class SqliteKind:
    """A file, in which each watches the beats of the others."""

    stored = _STORED.format(
        name="CAST(e.name AS TEXT)",
        status="s.status",
        attempt="s.attempt",
        made="s.attempt - s.released",
        charged="CASE WHEN s.status NOT IN (2, 3) THEN s.attempt - s.released - s.forgiven END",
        worker="s.worker",
        updated="s.updated_at",
        last="(SELECT max(seq) FROM attempts WHERE evaluation = e.id)",
        states=f"LEFT JOIN {STATES} AS s ON s.id = e.id",
    )
    patched = ("speval.stores.sqlite.lease.this_process", "speval.stores.sqlite.store.this_process")
    randomness = "speval.stores.sqlite.store.secrets"

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, "runs.db")
        self.reader: sqlite3.Connection | None = None

    def store(self, clock):
        return SqliteStore(self.path, clock=clock)

    def control(self, mode="read", clock=None):
        return make_control(self.path, mode, clock)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        if self.reader is None:
            self.reader = sqlite3.connect(self.path, isolation_level=None)
        return self.reader.execute(sql).fetchall()

    def states(self) -> int:
        return self.query(HOMES)[0][0]

    def pass_time(self, seconds: float) -> None:
        pass

    def reconnected(self, copy) -> None:
        pass

    def renewed(self, worker) -> None:
        pass

    def overdue(self, copy, rows, now) -> set[int]:
        """Return those whose beat has stood still for their lease, as seen by the copy."""
        due = set()
        for worker in rows:
            beat, since = copy.sights.get(worker.id, (None, now))
            if beat != worker.beat:
                copy.sights[worker.id] = (worker.beat, now)
            elif now - since >= worker.lease:
                due.add(worker.id)
        return due

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()
        self.folder.cleanup()


class PostgresKind:
    """An eval space on a server, by whose clock leases end."""

    stored = _STORED.format(
        name="e.name",
        status="CASE WHEN a.seq IS NOT NULL THEN CASE a.outcome WHEN 'completed' THEN 2 ELSE 3 END"
        " WHEN r.held THEN 4 WHEN r.id IS NOT NULL THEN 1 ELSE 0 END",
        attempt="coalesce(a.attempt, r.attempt, q.attempt)",
        made="coalesce(a.attempt - a.released, r.attempt - r.released, q.attempt - q.released)",
        charged="coalesce(r.attempt - r.released - r.forgiven, q.attempt - q.released - q.forgiven)",
        worker="r.worker",
        updated="coalesce(a.ended_at, r.updated_at, q.updated_at)",
        last="(SELECT max(seq) FROM attempts WHERE evaluation = e.id)",
        states="LEFT JOIN queue AS q ON q.id = e.id LEFT JOIN running AS r ON r.id = e.id"
        " LEFT JOIN attempts AS a ON a.evaluation = e.id AND a.final",
    )
    patched = ("speval.stores.postgres.lease.this_process", "speval.stores.postgres.store.this_process")
    randomness = "speval.stores.postgres.store.secrets"
    server: Server
    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self.clock = ServerClock()
        self.place = PostgresPlace(self.server, f"model_{os.getpid()}_{next(self._numbers)}", self.clock)

    def store(self, clock):
        return PostgresStore(self.place.url, clock=clock)

    def control(self, mode="read", clock=None):
        return make_control(self.place.url, mode, clock)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        return self.place.query(sql)

    def states(self) -> int:
        final = "SELECT evaluation FROM attempts WHERE final"
        return self.query(f"SELECT count(*) FROM (SELECT id FROM queue UNION ALL SELECT id FROM running UNION ALL {final}) s")[
            0
        ][0]

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    def reconnected(self, copy) -> None:
        copy.keeping = copy.store.lease_keeping()  # it has the connection of its store
        copy.sights.clear()

    def renewed(self, worker) -> None:
        worker.expires_at = self.clock.now + worker.lease

    def overdue(self, copy, rows, now) -> set[int]:
        """Return those whose lease is over and who have had the time to say that they live."""
        since = copy.sights.get(0)
        return {w.id for w in rows if self.clock.now > w.expires_at and (since is None or now - since >= w.lease)}

    def close(self) -> None:
        self.place.close()


Kind = SqliteKind | PostgresKind
