"""One connection to a PostgreSQL database, and what its errors mean.

Owns connecting, connecting again, and waiting for an answer. Invariant: every piece of work is one transaction that is over
when the call returns; a call never waits for an answer beyond its patience; and nothing that is said of a connection holds a
password.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from typing import Any, Concatenate, ParamSpec, TypeVar

from ..errors import DatabaseError, DatabaseUnavailableError, MissingExtraError, SpevalError, StoreClosedError
from ..url import PostgresUrl

try:
    import psycopg
    from psycopg import errors as states
except ImportError as error:
    raise MissingExtraError("a PostgreSQL database", "psycopg", "postgres") from error

__all__ = ["Connection", "PostgresConnection", "numbers", "texts"]

logger = logging.getLogger("speval.store")

P = ParamSpec("P")
T = TypeVar("T")

_PATIENCE = 60.0  # seconds that a reader waits for a server to come back
_LONG_PATIENCE = 3600.0  # seconds that a worker waits for what it can't do without
_CONNECT = 5  # seconds for one attempt to connect, of which there may be many
_GLANCE = 0.1  # seconds between looks, while waiting for an answer, whether it is still wanted
_LONGEST_PAUSE = 1.0  # seconds between attempts to connect

# A host that has vanished without a word is noticed by these; libpq's own defaults take two hours.
_DEFAULTS = {
    "application_name": ("PGAPPNAME", "speval"),
    "connect_timeout": ("PGCONNECT_TIMEOUT", str(_CONNECT)),
    "tcp_user_timeout": ("", "10000"),
    "keepalives_idle": ("", "5"),
    "keepalives_interval": ("", "3"),
    "keepalives_count": ("", "3"),
    "client_encoding": ("", "UTF8"),
}
# Told while connecting, where there are no codes: the server is there and will soon take connections.
_SOON = ("starting up", "shutting down", "too many clients", "remaining connection slots", "recovery mode", "not yet accepting")
_CONFLICT = (states.SerializationFailure, states.DeadlockDetected)
# Connection lost, shut down, out of resources, cancelled from outside, input and output errors, a standby for a while.
_PASSING = ("08", "53", "57", "58", "55P03", "25006")


class _Unanswered(psycopg.OperationalError):
    """Nobody waits for the answer any more."""


class Connection(psycopg.Connection[tuple[Any, ...]]):
    """A psycopg connection that gives up waiting when it is told to."""

    deadline = float("inf")
    unwanted: Callable[[], bool] = staticmethod(lambda: False)

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        return super().wait(self._watched(gen), *args, **kwargs)

    def _watched(self, gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        try:
            awaited = next(gen)
            while True:
                ready = yield awaited
                # The server may stand still, and the connection with it, without any sign of that but silence.
                if not ready and (time.monotonic() > self.deadline or self.unwanted()):
                    raise _Unanswered("no answer")
                awaited = gen.send(ready)
        except StopIteration as end:
            result: T = end.value
            return result


class PostgresConnection:
    """A connection used by one thread at a time, made again whenever it breaks.

    Args:
        url: Where to.
        works: Whether it is a worker's: one that hears of news, and waits for long.
    """

    def __init__(self, url: PostgresUrl, *, works: bool = False) -> None:
        self.url = url
        self.shown = url.shown
        self._patience = _LONG_PATIENCE if works else _PATIENCE
        self.connected = 0  # how often; who sees another number has been out of touch
        self._listens = works
        self._connection: Connection | None = None
        self._was_open = False
        self._closed = False
        self._lock = threading.Lock()
        self._given_up = threading.Event()

    def __repr__(self) -> str:
        return f"<PostgresConnection {self.shown!r}{' closed' if self._closed else ''}>"

    def run(
        self,
        work: Callable[Concatenate[Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run ``work(connection, ...)``, which may be run again: on another connection, after a first one has broken."""
        return self.run_within(self._patience, True, None, work, *args, **kwargs)

    def run_once(self, patience: float, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work(connection, ...)``; when this raises, it may have been done all the same."""
        return self.run_within(patience, False, None, work, *args, **kwargs)

    def run_within(
        self,
        patience: float,
        again: bool,
        given_up: threading.Event | None,
        work: Callable[Concatenate[Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run ``work(connection, ...)`` as one transaction.

        Args:
            patience: Seconds to wait in all.
            again: Whether to try again when the connection has broken meanwhile.
            given_up: When set, waiting is over.
            work: It executes one statement, or opens a transaction.
            args: What it gets besides the connection.
            kwargs: The same.

        Raises:
            DatabaseUnavailableError: there was no answer; what was asked may have been done.
        """
        deadline = time.monotonic() + patience

        def unwanted() -> bool:
            return self._given_up.is_set() or (given_up is not None and given_up.is_set())

        pause, has_warned = 0.05, False
        while True:
            self._acquire(deadline, unwanted)
            try:
                connection = self._connected(deadline)
                connection.deadline, connection.unwanted = deadline, unwanted
                return work(connection, *args, **kwargs)
            except psycopg.Error as error:
                ours = self._translated(error)
                passing = isinstance(error, _CONFLICT) or (again and isinstance(ours, DatabaseUnavailableError))
                if not passing or unwanted() or self._closed or time.monotonic() + pause >= deadline:
                    raise ours from error
                if not has_warned and not isinstance(error, _CONFLICT):
                    logger.warning("%s, trying again", ours)
                    has_warned = True
            except UnicodeDecodeError as error:
                raise DatabaseError(self.shown, f"what should be text in it is none ({error})") from error
            finally:
                if self._connection is not None and self._connection.closed:
                    self._connection = None
                self._lock.release()
            (given_up or self._given_up).wait(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, _LONGEST_PAUSE)

    def open(self) -> None:
        """Connect for the first time.

        Raises:
            DatabaseError: there is no server, or it won't have us.
        """
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return self.run_once(max(0.1, deadline - time.monotonic()), lambda c: None)
            except DatabaseUnavailableError as error:
                if not any(text in error.problem for text in _SOON) or time.monotonic() > deadline:
                    raise
            if self._given_up.wait(random.uniform(0.1, 0.5)):
                raise StoreClosedError(self.shown)

    def heard(self) -> bool:
        """Return whether there was news since the last call, as far as it can be known without asking."""
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
            return False  # whoever asks next will see
        finally:
            self._lock.release()

    def give_up(self) -> None:
        """Make whoever waits for an answer fail soon; callable from any thread."""
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
                raise DatabaseUnavailableError(self.shown, "has not answered what was asked before")

    def _connected(self, deadline: float) -> Connection:
        if self._closed:
            raise StoreClosedError(self.shown)
        if self._connection is None:
            defaults = {
                key: value for key, (variable, value) in _DEFAULTS.items() if not variable or variable not in os.environ
            }
            parameters = defaults | self.url.parameters
            left = max(2, int(min(deadline - time.monotonic(), _PATIENCE)))
            with suppress(ValueError):
                parameters["connect_timeout"] = str(min(left, int(parameters.get("connect_timeout", _CONNECT))))
            # No prepared statements: behind a pooler the next transaction may be on a connection that does not know them.
            connection = Connection.connect(autocommit=True, prepare_threshold=None, **parameters)  # type: ignore[arg-type]
            try:
                connection.deadline = deadline
                if self._listens:
                    connection.execute(f'LISTEN "{self.url.schema}.news"')
            except BaseException:
                connection.close()
                raise
            self._connection = connection
            self._was_open = True
            self.connected += 1
        return self._connection

    def _translated(self, error: psycopg.Error) -> SpevalError:
        """Return ours for an error of psycopg; a connection of which nobody knows how it stands is closed."""
        connection = self._connection
        broken = connection is None or connection.closed or connection.broken
        if connection is not None and (isinstance(error, _Unanswered) or connection.broken):
            with suppress(Exception):
                connection.close()
            broken = True
        state = error.sqlstate or ""
        text = _first_line(error)
        if self._closed:
            return StoreClosedError(self.shown)
        if isinstance(error, _Unanswered):
            return DatabaseUnavailableError(self.shown, "the server does not answer")
        if state == "53100":
            return DatabaseUnavailableError(self.shown, "the server's disk is full; nothing is lost, make room")
        if state == "42501":
            return DatabaseError(self.shown, f"{text}; docs/postgres.md says which privileges are needed")
        if state == "3F000" or state.startswith("42P"):
            return DatabaseError(self.shown, f"was changed or dropped while in use ({text})")
        if connection is None and not self._was_open and not _is_unreachable(text):
            return DatabaseError(self.shown, f"can't be used: {text}")
        if broken or state.startswith(_PASSING) or (not state and isinstance(error, psycopg.OperationalError)):
            return DatabaseUnavailableError(self.shown, f"can't be reached just now ({text})")
        return DatabaseError(self.shown, text)


def numbers(values: Iterable[float | bool | None]) -> str:
    """Return an array of numbers as PostgreSQL reads it; this way it takes a tenth of the time the driver does."""
    return "{" + ",".join(["NULL" if value is None else str(value) for value in values]) + "}"


def texts(values: Iterable[str | None]) -> str:
    """Return an array of texts as PostgreSQL reads it."""
    quoted = ["NULL" if t is None else '"' + t.replace("\\", "\\\\").replace('"', '\\"') + '"' for t in values]
    return "{" + ",".join(quoted) + "}"


def _first_line(error: psycopg.Error) -> str:
    """Return what the server or libpq says, in one line."""
    text = error.diag.message_primary or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].removeprefix("connection failed: ") if lines else type(error).__name__


def _is_unreachable(text: str) -> bool:
    """Tell whether a first attempt to connect found no server, or one that will soon be there."""
    return "FATAL" not in text or any(soon in text for soon in _SOON)
