"""A thread that runs whole transactions on one SQLite file, by aiosqlite.

Owns the use of aiosqlite: its ``Connection``, ``execute_fetchall`` and ``stop``, all public. aiosqlite sends one statement at a
time to its thread, which is slow and leaves a transaction open when its task is cancelled. So aiosqlite gets, in place of a
``sqlite3.Connection``, an object whose statements are functions. Invariant: a function that was sent runs to its end, and the
thread does not outlive ``finish`` or ``join``.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

import aiosqlite
from anyio import CancelScope

__all__ = ["TransactionThread"]

T = TypeVar("T")


class _Answer:
    """What aiosqlite takes for the cursor of a statement: all its rows are what the function returned."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def fetchall(self) -> Any:
        return self._value


class _Functions:
    """What aiosqlite takes for its ``sqlite3.Connection``; used in its thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, label: str, functions: list[Callable[[], object]]) -> _Answer:
        return _Answer(functions[0]())

    def close(self) -> None:
        self._connection.close()


class TransactionThread:
    """A connection of aiosqlite that runs functions.

    Args:
        connect: Opens the file; called in the thread.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._thread: threading.Thread | None = None
        self._begun = threading.Event()
        self._opened: sqlite3.Connection | None = None

        def connector() -> sqlite3.Connection:
            self._thread = threading.current_thread()
            self._thread.name = "speval store"
            self._begun.set()
            self._opened = connect()
            return cast("sqlite3.Connection", _Functions(self._opened))

        self._connection = _made_by_a_daemon(connector)

    async def open(self) -> None:
        """Start the thread and connect.

        Raises:
            RuntimeError: the system allows no more threads.
        """
        await self._connection

    async def run(self, work: Callable[[], T]) -> T:
        """Run a function without parameters: aiosqlite logs what it is given, and args and results are not for logs."""
        return cast("T", await self._connection.execute_fetchall("speval", [work]))

    async def finish(self) -> None:
        """Close the connection behind whatever its thread is still doing, also when cancelled."""
        stopped = self._connection.stop()
        try:
            if stopped is not None:
                with CancelScope(shield=True):
                    await asyncio.shield(stopped)
        except asyncio.CancelledError:
            with suppress(sqlite3.ProgrammingError):  # closed by now
                if self._opened is not None:
                    self._opened.interrupt()
            raise
        finally:
            self.join()

    def join(self) -> None:
        """Wait for the thread, which has been told to end and must not outlive the loop it reports to."""
        self._begun.wait()
        if self._thread is not None:
            self._thread.join()

    @property
    def has_begun(self) -> bool:
        """Return whether the thread has begun to connect."""
        return self._begun.is_set()


def _made_by_a_daemon(connector: Callable[[], sqlite3.Connection]) -> aiosqlite.Connection:
    """Return a connection whose thread is a daemon, as those are that a daemon makes.

    The second Ctrl-C must end the process whatever the thread is waiting for.
    """
    made: list[aiosqlite.Connection] = []

    def make() -> None:
        made.append(aiosqlite.Connection(connector, iter_chunk_size=64))

    if threading.current_thread().daemon:
        make()
    else:
        maker = threading.Thread(target=make, name="speval store maker", daemon=True)
        maker.start()
        maker.join()
    return made[0]
