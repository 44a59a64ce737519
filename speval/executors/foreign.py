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
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from ..clock import Clock
from ..errors import ExecutorError
from ..model import Function, Outcome, Result, RetryOn
from .base import Executor, Slot, as_outcome, timed_out
from .call import evaluate, outcome
from .payload import pickled

__all__ = ["ForeignExecutor"]

logger = logging.getLogger("speval.executor")


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
        self._has_warned = False

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

    def warn_of_abandoned(self, name: str, timeout: float) -> None:
        """Say once what a timeout means here."""
        if not self._has_warned:
            self._has_warned = True
            pool = type(self.pool).__qualname__
            text = "evaluation %r ran longer than %g s in a %s, which can't stop it: it runs on, and its result is dropped"
            logger.warning(text, name, timeout, pool)

    async def close(self) -> None:
        pass


class _ForeignSlot(Slot):
    def __init__(self, executor: ForeignExecutor) -> None:
        self._executor = executor

    async def call(self, name: str, args: str, timeout: float | None) -> Outcome:
        clock = self._executor.clock
        started_at, started = clock.wall(), clock.monotonic()
        future = self._executor.submit(name, args)
        ended = asyncio.Event()
        future.add_done_callback(_told(asyncio.get_running_loop(), ended.set))
        try:
            async with asyncio.timeout(timeout):
                await ended.wait()
        except TimeoutError:
            if not future.done():
                assert timeout is not None
                if not _cancel(future):
                    self._executor.warn_of_abandoned(name, timeout)
                return timed_out(timeout, "", started_at, clock.monotonic() - started)
        except asyncio.CancelledError:
            if not future.done():
                _cancel(future)
                raise
        try:
            return as_outcome(future.result())
        except BaseException as error:  # not the function's: those come back as results
            message = f"{type(error).__qualname__}: {error}"
            trouble = outcome(
                "crash", type(error).__qualname__, message, "", started_at, clock.monotonic() - started, again=True
            )
            return as_outcome(trouble)

    async def close(self) -> None:
        pass


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
