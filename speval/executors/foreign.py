"""Functions in somebody else's ``concurrent.futures.Executor``.

Owns handing calls to such an executor and reading what comes back. Invariant: whatever goes wrong on the way there or back is
the evaluation's crash, told apart from an exception of the function; the executor itself is the user's, who also closes it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from concurrent.futures import Executor as FutureExecutor
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from ..clock import Clock
from ..errors import ExecutorError
from ..model import Function, Outcome, Result, RetryOn, counted
from .base import Executor, Slot, as_outcome, timed_out
from .call import evaluate, outcome
from .payload import pickled

__all__ = ["ForeignExecutor"]

logger = logging.getLogger("speval.executor")

_LOOK = 2.0  # seconds between looks whether the pool is still there
_TURN = (0.001, 0.05)  # seconds between looks whether a call has begun: at first, and in the long run


class ForeignExecutor(Executor):
    """Submits each evaluation to an executor such as a process pool, loky's or the one of a Dask client.

    Args:
        function: The function; pickled once, and sent with each call.
        pool: Where to submit.
        retry_on: Exception types after which an evaluation may be tried again.
        clock: Where the time comes from.

    Raises:
        FunctionError: the function can't be pickled.
    """

    can_stop = False  # none of them stops a call that has begun

    def __init__(self, function: Function, pool: FutureExecutor, retry_on: RetryOn, clock: Clock) -> None:
        self.pool = pool
        self.clock = clock
        self.payload = pickled(function, retry_on)
        # Others, as Dask's, say of a call that it is pending until it has ended.
        self.tells_beginnings = isinstance(pool, ThreadPoolExecutor | ProcessPoolExecutor) or _is_loky(pool)
        self._has_warned = False
        self._left_behind: set[Future[Result]] = set()
        self._news = clock.monotonic()  # when a call began or ended for the last time

    def slot(self, number: int) -> Slot:
        return _ForeignSlot(self)

    def submit(self, name: str, args: str) -> Future[Result]:
        """Hand a call to the pool.

        Raises:
            ExecutorError: the pool takes no more.
        """
        # By position only, and never twice the same: Dask has uses of its own for many a keyword, and gives equal calls one
        # result between them, which would make another attempt none.
        try:
            return self.pool.submit(_call, self.payload, secrets.token_hex(8), name, args)
        except Exception as error:
            raise ExecutorError(type(self.pool).__qualname__, f"{type(error).__name__}: {error}") from error

    def note(self) -> None:
        """Note that a call has begun or ended."""
        self._news = self.clock.monotonic()

    def look_after(self, timeout: float | None = None) -> None:
        """See that the pool can still bring what is waited for; what never begins is waited for no longer than the timeout.

        Raises:
            ExecutorError: it can't.
        """
        # A Dask client that has lost its scheduler says so to none of its futures.
        if getattr(getattr(self.pool, "_client", None), "status", None) == "closed":
            raise ExecutorError(type(self.pool).__qualname__, "its client is closed")
        if self._left_behind and timeout is not None and self.clock.monotonic() - self._news > timeout:
            problem = f"still occupied by {counted(len(self._left_behind), 'call')} that ran longer than {timeout:g} s"
            raise ExecutorError(type(self.pool).__qualname__, problem)

    def leave_behind(self, future: Future[Result], name: str, timeout: float) -> None:
        """Wait no longer for a call that can't be stopped, and say once what a timeout means here."""
        self.note()  # others have a whole timeout from now on to begin
        self._left_behind.add(future)
        future.add_done_callback(self._left_behind.discard)
        if not self._has_warned:
            self._has_warned = True
            pool = type(self.pool).__qualname__
            logger.warning(
                "evaluation %r took longer than %g s in a %s, which stops nothing that has begun: it may run on, and its "
                "result is dropped",
                name,
                timeout,
                pool,
            )

    async def close(self) -> None:
        pass


class _ForeignSlot(Slot):
    def __init__(self, executor: ForeignExecutor) -> None:
        self._executor = executor

    async def call(self, name: str, args: str, timeout: float | None) -> Outcome:
        executor, clock = self._executor, self._executor.clock
        started_at, started = clock.wall(), clock.monotonic()
        future = executor.submit(name, args)
        ended = asyncio.Event()
        future.add_done_callback(_told(asyncio.get_running_loop(), ended.set))
        try:
            if timeout is not None and executor.tells_beginnings:
                await self._wait_for_its_turn(future, ended, timeout)
                started_at, started = clock.wall(), clock.monotonic()
            async with asyncio.timeout(timeout):
                while not await _is_set(ended, _LOOK):
                    executor.look_after()
        except TimeoutError:
            if not future.done():
                assert timeout is not None
                if not _cancel(future) or not executor.tells_beginnings:  # Dask's say yes in any case
                    executor.leave_behind(future, name, timeout)
                return timed_out(timeout, "", started_at, clock.monotonic() - started)
        except BaseException:  # cancelled, or nothing is to be had from this pool any more
            if not future.done():
                _cancel(future)
                raise
        executor.note()
        try:
            return as_outcome(future.result())
        except BaseException as error:  # not the function's: those come back as results
            executor.look_after()
            message = f"{type(error).__qualname__}: {error}"
            trouble = outcome(
                "crash", type(error).__qualname__, message, "", started_at, clock.monotonic() - started, again=True
            )
            return as_outcome(trouble)

    async def _wait_for_its_turn(self, future: Future[Result], ended: asyncio.Event, timeout: float) -> None:
        """Return when the call has begun, or is over."""
        pause, longest = _TURN
        while not (future.running() or future.done()):
            await _is_set(ended, pause)
            self._executor.look_after(timeout)
            pause = min(pause * 2, longest)
        self._executor.note()

    async def close(self) -> None:
        pass


async def _is_set(event: asyncio.Event, within: float) -> bool:
    try:
        async with asyncio.timeout(within):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _is_loky(pool: FutureExecutor) -> bool:
    return type(pool).__module__.partition(".")[0] == "loky"


def _told(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> Callable[[Any], None]:
    def tell(_: Any) -> None:
        with suppress(RuntimeError):  # the loop is over: we were given up
            loop.call_soon_threadsafe(callback)

    return tell


def _cancel(future: Future[Any]) -> bool:
    try:
        return future.cancel()
    except Exception:  # there are executors whose futures raise here
        return False


# What runs over there

_loaded: tuple[bytes, Any] | None = None


def _call(payload: bytes, token: str, name: str, args: str) -> Result:
    """Call the function, loading it when it is another one than last time."""
    import pickle

    global _loaded
    if _loaded is None or _loaded[0] != payload:
        _loaded = (payload, pickle.loads(payload))
    function, retry_on = _loaded[1]
    return evaluate(function, name, args, retry_on, Clock())
