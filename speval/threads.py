"""A thread for blocking work of an event loop.

Owns passing blocking work to a thread and its outcome back. Invariant: the thread never delays the exit of the interpreter,
and an outcome that the event loop no longer awaits is ignored.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from anyio import CancelScope

from .errors import SystemLimitError

__all__ = ["WorkThread", "start"]

T = TypeVar("T")

_LINGER = 2.0  # seconds that finishing waits for started work


def start(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        SystemLimitError: the system allows no more threads.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise SystemLimitError(f"thread {thread.name!r}") from error


class WorkThread:
    """A daemon thread that runs work for an event loop, one piece at a time, in a copy of the context of its creator."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[tuple[asyncio.Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        # A daemon, because the second Ctrl-C must end the process while this thread waits.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name=name, daemon=True)
        start(self._thread)

    async def run(self, work: Callable[[], T]) -> T:
        """Run the work and return its result; a cancellation does not stop it."""
        return await self._put(work)

    def end(self) -> None:
        """Let the thread end after its work, without waiting for it."""
        self._work.put(None)

    async def finish(self, last: Callable[[], object], hurry: Callable[[], object]) -> None:
        """Run the last work and end the thread; call ``hurry`` if earlier work takes long, or when this is cancelled."""
        done = self._put(last)
        self.end()
        try:
            with CancelScope(shield=True):
                await asyncio.wait({done}, timeout=_LINGER)
        finally:
            hurry()
            self._thread.join()
            done.cancel()

    def _put(self, work: Callable[[], T]) -> asyncio.Future[T]:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._work.put((future, work))
        return future

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            future, work = item
            result: Any = None
            failure: BaseException | None = None
            try:
                result = work()
            except StopIteration as error:  # which no future carries
                failure = RuntimeError(f"{error!r} came out of a thread")
                failure.__cause__ = error
            except BaseException as error:
                failure = error
            with suppress(RuntimeError):  # the loop is over
                future.get_loop().call_soon_threadsafe(_tell, future, result, failure)
            del item, future, work, result, failure


def _tell(future: asyncio.Future[Any], result: Any, failure: BaseException | None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(result)
    else:
        future.set_exception(failure)
