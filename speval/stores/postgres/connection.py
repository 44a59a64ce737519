"""One connection to a PostgreSQL database, and its error handling.

Owns connecting, reconnecting, waiting for an answer, and the settings of a transaction. Invariant: each call is one
transaction, which has ended when the call returns. With any settings of the server, the database or the role, a transaction
resolves names only in pg_catalog, has the isolation we rely on, and is only ended by our own time limits. A call never waits
longer than its patience, and no message contains a password.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Concatenate, ParamSpec, TypeVar

from ...errors import (
    DatabaseError,
    DatabaseUnavailableError,
    MissingExtraError,
    NewerSchemaError,
    SpevalError,
    StoreClosedError,
)
from ...pauses import pauses
from ...url import PostgresUrl

try:
    import psycopg
    from psycopg.conninfo import make_conninfo
    from psycopg.pq import TransactionStatus
except ImportError as error:
    raise MissingExtraError("a PostgreSQL database", "psycopg", "postgres") from error

from .errors import BEFORE_READY, NEWER_SCHEMA, SCHEMA, Failure, Verdict, first_line, sqlstate, verdict, why_not_connected

__all__ = ["Connection", "PostgresConnection", "numbers", "texts"]

logger = logging.getLogger("speval.store")

P = ParamSpec("P")
T = TypeVar("T")

_PATIENCE = 60.0  # seconds that a reader waits for an unreachable server
_LONG_PATIENCE = 3600.0  # seconds that a worker waits for an unreachable server
_CONNECT = 5  # seconds for one attempt to connect; there may be many attempts
_GLANCE = 0.1  # seconds between two checks for cancellation while waiting for the connection
_LONGEST_PAUSE = 1.0  # seconds between attempts to connect

# These detect a host that has vanished without closing the connection; libpq's defaults take two hours.
_DEFAULTS = {
    "application_name": ("PGAPPNAME", "speval"),
    "connect_timeout": ("PGCONNECT_TIMEOUT", str(_CONNECT)),
    "tcp_user_timeout": ("", "10000"),
    "keepalives_idle": ("", "5"),
    "keepalives_interval": ("", "3"),
    "keepalives_count": ("", "3"),
    "client_encoding": ("", "UTF8"),
}
# Seconds after which such an error counts as permanent.
_LIMITS = {Verdict.MAY_PASS: 60.0, Verdict.UNREACHABLE: 30.0}
# SET LOCAL, because behind a pooler the next transaction of the session may belong to another client. pg_temp is last because
# PostgreSQL otherwise searches it first. A row policy is an error, because it executes code of its owner.
_OPENING = """
BEGIN ISOLATION LEVEL READ COMMITTED {};
SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL row_security = off;
SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0;
SET LOCAL extra_float_digits = 1; SET LOCAL array_nulls = on; SET LOCAL standard_conforming_strings = on; SET LOCAL jit = off
"""
_OPENING_SINCE_17 = "; SET LOCAL transaction_timeout = 0"
_DONE_NOTHING = "40"  # serialization failure, deadlock: the server rolled back, so retry at once
_STATEMENT_MODE = "statement pooling"  # part of a pgbouncer message; pgbouncer does not translate messages


class _Unanswered(psycopg.OperationalError):
    """The call stopped waiting for the answer."""


class Connection(psycopg.Connection[tuple[Any, ...]]):
    """A psycopg connection that stops waiting at a deadline or on request."""

    deadline = float("inf")
    unwanted: Callable[[], bool] = staticmethod(lambda: False)
    opening = ""  # the SQL that starts a transaction
    is_bare = True  # whether our SQL functions may run with the settings of the session

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        return super().wait(self._watched(gen), *args, **kwargs)

    def _watched(self, gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        try:
            awaited = next(gen)
            while True:
                ready = yield awaited
                # A server that hangs sends nothing, so only time shows it.
                if not ready and (time.monotonic() > self.deadline or self.unwanted()):
                    raise _Unanswered("no answer")
                awaited = gen.send(ready)
        except StopIteration as end:
            result: T = end.value
            return result

    @contextmanager
    def block(self) -> Iterator[None]:
        """Run the body as one transaction with our settings; inside a transaction, as a part of it."""
        if self.info.transaction_status != TransactionStatus.IDLE:
            yield
            return
        self.execute(self.opening.encode())
        try:
            yield
        except BaseException:
            with suppress(psycopg.Error):
                if self.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
                    self.execute("ROLLBACK")
            if self.info.transaction_status != TransactionStatus.IDLE:
                self.close()
            raise
        self.commit()

    def commit(self) -> None:
        """Commit the transaction of a block."""
        self.execute("COMMIT")


class PostgresConnection:
    """A connection for one thread at a time, which reconnects when it breaks.

    Args:
        url: The database.
        works: Whether it belongs to a worker: it listens for notifications and has a long patience.
        writes: Whether it may change the database.
        given_up: Other threads set it to end all waiting. By default only ``give_up`` ends it.
    """

    def __init__(
        self, url: PostgresUrl, *, works: bool = False, writes: bool = True, given_up: threading.Event | None = None
    ) -> None:
        self.url = url
        self.shown = url.shown
        self._patience = _LONG_PATIENCE if works else _PATIENCE
        self.connected = 0  # the number of connects; a new value means that the connection was interrupted
        self._listens = works
        self._writes = writes
        self._trouble: tuple[Verdict, float] | None = None  # the repeated error, and since when, monotonic
        self._connection: Connection | None = None
        self._was_open = False
        self._closed = False
        self._lock = threading.Lock()
        self._given_up = given_up or threading.Event()

    def __repr__(self) -> str:
        return f"<PostgresConnection {self.shown!r}{' closed' if self._closed else ''}>"

    def run(
        self,
        work: Callable[Concatenate[Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run ``work(connection, ...)``; run it again on a new connection if the connection breaks."""
        return self.run_within(self._patience, True, None, lambda c: work(c, *args, **kwargs))

    def run_once(self, patience: float, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work(connection, ...)`` once; if this raises, the transaction may still have been committed."""
        return self.run_within(patience, False, None, lambda c: work(c, *args, **kwargs))

    def call(self, patience: float, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work(connection, ...)`` once; it must be a single call of one of our SQL functions by qualified name."""
        return self.run_within(patience, False, None, lambda c: work(c, *args, **kwargs), bare=True)

    def run_within(
        self,
        patience: float,
        again: bool,
        given_up: threading.Event | None,
        work: Callable[[Connection], T],
        *,
        bare: bool = False,
    ) -> T:
        """Run ``work(connection)`` as one transaction.

        Args:
            patience: The maximum time to wait, seconds.
            again: Whether to try again after the connection has broken.
            given_up: An event that stops the waiting.
            work: A function that executes statements.
            bare: Whether it is a single call of one of our SQL functions. Such a function checks its settings itself, and
                raises an error if it needs a transaction with our settings.

        Raises:
            DatabaseUnavailableError: no answer arrived; the transaction may have been committed.
        """
        deadline = time.monotonic() + patience

        def unwanted() -> bool:
            return self._given_up.is_set() or (given_up is not None and given_up.is_set())

        waits, has_warned, is_bare = pauses(0.05, _LONGEST_PAUSE), False, False
        while True:
            pause = next(waits)
            self._acquire(deadline, unwanted)
            try:
                connection = self._connected(deadline)
                connection.deadline, connection.unwanted = deadline, unwanted
                is_bare = bare and connection.is_bare
                with nullcontext() if is_bare else connection.block():
                    result = work(connection)
                self._trouble = None
                return result
            except psycopg.Error as error:
                state = sqlstate(error)
                if self._connection is not None and is_bare and state in BEFORE_READY:
                    self._connection.is_bare = False
                    continue
                ours = self._translated(error)
                undone = state.startswith(_DONE_NOTHING)
                passing = undone or (again and isinstance(ours, DatabaseUnavailableError))
                if not passing or unwanted() or self._closed or time.monotonic() + pause >= deadline:
                    raise ours from error
                if not has_warned and not undone:
                    logger.warning("%s; retrying for up to %.0f s", ours, deadline - time.monotonic())
                    has_warned = True
            except UnicodeDecodeError as error:
                raise DatabaseError(self.shown, f"a text value is not valid UTF-8 ({error})") from error
            finally:
                if self._connection is not None and self._connection.closed:
                    self._connection = None
                self._lock.release()
            (given_up or self._given_up).wait(pause)

    def open(self) -> None:
        """Connect for the first time; wait for a server that is starting or has no free connection.

        Raises:
            DatabaseError: the server is unreachable or rejected the login.
        """
        self.run_within(self._patience, True, None, lambda c: None, bare=True)

    def heard(self) -> bool:
        """Return whether a notification has arrived since the last call; this sends no query."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            connection = self._connection
            if connection is None or connection.closed:
                return False
            connection.deadline = time.monotonic() + _CONNECT
            pids = {notify.pid for notify in connection.notifies(timeout=0)}
            return bool(pids - {connection.info.backend_pid})
        except psycopg.Error:
            return False  # the next query reports the error
        finally:
            self._lock.release()

    def give_up(self) -> None:
        """Make calls that wait for an answer fail soon; callable from any thread."""
        self._given_up.set()

    def close(self) -> None:
        """Close the connection; calling it again does nothing."""
        self._closed = True
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    def _acquire(self, deadline: float, unwanted: Callable[[], bool]) -> None:
        while not self._lock.acquire(timeout=_GLANCE):
            if unwanted() or time.monotonic() > deadline:
                raise DatabaseUnavailableError(self.shown, "the server has not answered the previous query")

    def _connected(self, deadline: float) -> Connection:
        if self._closed:
            raise StoreClosedError(self.shown)
        if self._connection is None:
            connection = self._connect(deadline)
            try:
                connection.deadline = deadline
                if self._listens:
                    connection.execute(f'LISTEN "{self.url.schema}.news"')
            except BaseException:
                connection.close()
                raise
            connection.opening = _OPENING.strip().format("READ WRITE" if self._writes else "READ ONLY")
            if connection.info.server_version >= 170000:
                connection.opening += _OPENING_SINCE_17
            self._connection = connection
            self._was_open = True
            self.connected += 1
        return self._connection

    def _connect(self, deadline: float) -> Connection:
        defaults = {key: value for key, (variable, value) in _DEFAULTS.items() if not variable or variable not in os.environ}
        parameters = defaults | self.url.parameters | {"client_encoding": "UTF8"}
        left = max(2, int(min(deadline - time.monotonic(), _PATIENCE)))
        with suppress(ValueError):
            parameters["connect_timeout"] = str(min(left, int(parameters.get("connect_timeout", _CONNECT))))
        # No prepared statements: behind a pooler the next transaction may use a connection without them.
        try:
            return Connection.connect(autocommit=True, prepare_threshold=None, **parameters)  # type: ignore[arg-type]
        except psycopg.OperationalError as error:
            raise why_not_connected(error, make_conninfo("", **parameters), _CONNECT) from error

    def _translated(self, error: psycopg.Error) -> SpevalError:
        """Return our error for an error of psycopg; a connection in an unknown state is closed."""
        connection = self._connection
        broken = connection is None or connection.closed or connection.broken
        if connection is not None and (isinstance(error, _Unanswered) or connection.broken):
            with suppress(Exception):
                connection.close()
            broken = True
        if self._closed:
            return StoreClosedError(self.shown)
        if isinstance(error, _Unanswered):
            return DatabaseUnavailableError(self.shown, "the server does not answer")
        state, text = sqlstate(error), first_line(error)
        if state == NEWER_SCHEMA:
            version, release = text.split()
            return NewerSchemaError(self.shown, int(version), SCHEMA, release)
        if _STATEMENT_MODE in text:
            return DatabaseError(
                self.shown, "pgbouncer runs in statement mode; set pool_mode = transaction in its configuration"
            )
        passes = self._judged(error, state, broken)
        if not passes:
            return DatabaseError(self.shown, _with_fix(state, text, isinstance(error, Failure)))
        if state == "53100":
            return DatabaseUnavailableError(self.shown, "the disk of the server is full; free some space, no result is lost")
        return DatabaseUnavailableError(self.shown, f"the server is unavailable ({text})")

    def _judged(self, error: psycopg.Error, state: str, broken: bool) -> bool:
        """Tell whether to retry; an error that may be transient is retried for a limited time."""
        if isinstance(error, Failure):
            found = error.verdict
            if self._was_open and found is not Verdict.PASSES:
                # A login succeeded before: this may be a failover, or the login service is down.
                found = Verdict.PASSES if found is Verdict.UNREACHABLE else Verdict.MAY_PASS
        elif isinstance(error, psycopg.ProgrammingError) and not state:
            found = Verdict.STAYS  # libpq does not know an option
        else:
            found = verdict(state) if state else Verdict.PASSES if broken else Verdict.STAYS
            found = Verdict.PASSES if broken and found is Verdict.STAYS and self._was_open else found
        now = time.monotonic()
        if self._trouble is None or self._trouble[0] is not found:
            self._trouble = found, now
        return found is not Verdict.STAYS and now - self._trouble[1] < _LIMITS.get(found, float("inf"))


def _with_fix(state: str, text: str, connecting: bool) -> str:
    """Return the text of a permanent error, with a fix."""
    if state == "42501":
        return f"{text}; docs/postgres.md lists the required privileges"
    if state == "3F000" or (state.startswith("42") and not connecting):
        return f"the schema was changed or dropped while in use ({text})"
    if state == "25006":
        return f"the server is read-only ({text}); name the primary, or several hosts and target_session_attrs=read-write"
    return f"can't connect: {text}" if connecting else text


def numbers(values: Iterable[float | bool | None]) -> str:
    """Return an array of numbers in PostgreSQL's text format; the driver takes ten times as long."""
    return "{" + ",".join(["NULL" if value is None else str(value) for value in values]) + "}"


def texts(values: Iterable[str | None]) -> str:
    """Return an array of texts in PostgreSQL's text format."""
    quoted = ["NULL" if t is None else '"' + t.replace("\\", "\\\\").replace('"', '\\"') + '"' for t in values]
    return "{" + ",".join(quoted) + "}"
