"""A thread beside the event loop.

Owns the way of a piece of blocking work to a thread and of its outcome back. Invariant: nothing that happens there keeps the
interpreter from exiting, and a result that is not awaited any more is dropped.
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

_LINGER = 2.0  # seconds that finishing waits for what was begun


def start(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        SystemLimitError: the system has no room for one.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise SystemLimitError(f"thread {thread.name!r}") from error


class WorkThread:
    """A daemon thread that does one piece of work after the other for an event loop, in a copy of its maker's context."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[tuple[asyncio.Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        # The second Ctrl-C must end the process whatever this thread is waiting for.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name=name, daemon=True)
        start(self._thread)

    async def run(self, work: Callable[[], T]) -> T:
        """Return what the work returns; it goes on when this is cancelled."""
        return await self._put(work)

    def end(self) -> None:
        """Let the thread end once it has done what it was given; return at once."""
        self._work.put(None)

    async def finish(self, last: Callable[[], object], hurry: Callable[[], object]) -> None:
        """Do the last work and end the thread; what is in its way is hurried up after a while, or when this is cancelled."""
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
