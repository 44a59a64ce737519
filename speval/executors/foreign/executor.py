"""Functions in a pool: a ``concurrent.futures.Executor`` that the user passes.

Owns submitting calls to the pool and reading their results. Invariant: an error of the pool is a crash of the evaluation, and
is distinct from an exception of the function. The user owns the pool and closes it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import logging
import secrets
from collections.abc import Callable
from concurrent.futures import Executor as FutureExecutor
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from ...clock import Clock
from ...errors import ExecutorError
from ...model import Claim, Function, Outcome, Result, RetryOn, counted
from ...pauses import pauses
from ..base import Executor, Slot, Work, as_outcome, timed_out
from ..call import evaluate, outcome
from .beginnings import KEY_LENGTH, Channel, open_channel
from .call import NEEDS_PAYLOAD, NOT_TOLD, call_loaded

__all__ = ["ForeignExecutor"]

logger = logging.getLogger("speval.executor")

_LOOK = 2.0  # seconds between checks of the pool
_TURN = (0.001, 0.05)  # seconds between checks for the start of a call that can't report it: at first, and later
_SMALL = 100_000  # bytes; a larger function is sent only to a process that requests it
_Interpreters: Any = getattr(concurrent.futures, "InterpreterPoolExecutor", ())  # threads with separate modules


class ForeignExecutor(Executor):
    """Submits each evaluation to a pool: of threads, of processes, of loky, or of a Dask client.

    Args:
        function: The function. Threads of this process call it directly; for other pools it is pickled once.
        pool: The pool.
        retry_on: Exception types after which an evaluation may be tried again.
        clock: The clock.

    Raises:
        FunctionError: the function can't be pickled.
    """

    can_stop = False  # a pool can't stop a call that has started

    def __init__(self, function: Function, pool: FutureExecutor, retry_on: RetryOn, clock: Clock) -> None:
        self.pool = pool
        self.clock = clock
        self._function, self._retry_on = function, retry_on
        self._is_here = isinstance(pool, ThreadPoolExecutor) and not isinstance(pool, _Interpreters)
        if not self._is_here:
            from ..payload import pickled

            self._payload = pickled(function, retry_on)
            self._digest = hashlib.blake2b(self._payload, digest_size=16).digest()
        self.is_small = self._is_here or len(self._payload) < _SMALL
        # Other pools, such as Dask's, report a call as pending until it has ended, and every cancellation as successful.
        self.is_honest = isinstance(pool, ThreadPoolExecutor | ProcessPoolExecutor) or _is_loky(pool)
        self.tells_beginnings = True  # until it fails
        self._channel: Channel | None = None
        self._waiting: dict[str, Callable[[], object]] = {}
        self._has_warned = False
        self._left_behind: set[Future[Any]] = set()
        self._news = clock.monotonic()  # when a call last started or ended

    def slot(self, number: int) -> Slot:
        return _ForeignSlot(self)

    def submit(self, name: str, args: str, *, whole: bool, begun: Callable[[], object] | None) -> Future[Any]:
        """Submit a call to the pool.

        Args:
            name: The evaluation's name.
            args: Its args as JSON.
            whole: Whether to send the function too.
            begun: Called in the event loop when the call starts, if the pool reports it.

        Raises:
            ExecutorError: the pool accepts no more calls.
        """
        future: Future[Any]
        key = secrets.token_hex(KEY_LENGTH // 2)
        try:
            if self._is_here:
                future = self.pool.submit(self._call_here, begun and _told(begun), name, args)
            else:
                address = self._listen(key, begun) if begun is not None else None
                payload = self._payload if whole else None
                # Positional and never equal: Dask interprets many keywords, and computes equal calls only once, so another
                # attempt would not run.
                future = self.pool.submit(call_loaded, self._digest, payload, key, address, name, args)
        except Exception as error:
            self._waiting.pop(key, None)
            raise ExecutorError(type(self.pool).__qualname__, f"{type(error).__name__}: {error}") from error
        future.add_done_callback(_told(lambda: self._waiting.pop(key, None)))
        return future

    def _call_here(self, begun: Callable[[], object] | None, name: str, args: str) -> Result:
        """Call the function in a thread of this process."""
        if begun is not None:
            begun()
        return evaluate(self._function, name, args, self._retry_on, self.clock)

    def _listen(self, key: str, begun: Callable[[], object]) -> tuple[str, str] | None:
        """Request a report of the start of a call, and return the address for it."""
        if self._channel is None and self.tells_beginnings:
            self._channel = open_channel(self.pool, self._hear)
            self.tells_beginnings = self._channel is not None
        if self._channel is None:
            return None
        self._waiting[key] = begun
        return self._channel.address

    def _hear(self, key: str) -> None:
        begun = self._waiting.pop(key, None)
        if begun is not None:
            begun()

    def give_up_beginnings(self) -> None:
        """Stop requesting reports of starts: a process can't send them."""
        channel, self._channel, self.tells_beginnings = self._channel, None, False
        if channel is not None:
            channel.close()

    def note(self) -> None:
        """Remember the time at which a call has started or ended."""
        self._news = self.clock.monotonic()

    def look_after(self, timeout: float | None = None) -> None:
        """Check that the pool can still return results; a call that does not start is awaited no longer than the timeout.

        Raises:
            ExecutorError: the pool is broken or occupied.
        """
        # A Dask client that has lost its scheduler does not resolve its futures.
        if getattr(getattr(self.pool, "_client", None), "status", None) == "closed":
            raise ExecutorError(type(self.pool).__qualname__, "its client is closed")
        if self._left_behind and timeout is not None and self.clock.monotonic() - self._news > timeout:
            problem = f"occupied by {counted(len(self._left_behind), 'call')} that ran longer than {timeout:g} s"
            raise ExecutorError(type(self.pool).__qualname__, problem)

    def leave_behind(self, future: Future[Result], name: str, timeout: float) -> None:
        """Abandon a call that can't be stopped, and warn once what a timeout means for a pool."""
        self.note()  # other calls have a whole timeout from now on to start
        self._left_behind.add(future)
        future.add_done_callback(self._left_behind.discard)
        if not self._has_warned:
            self._has_warned = True
            pool = type(self.pool).__qualname__
            logger.warning(
                "evaluation %r ran longer than %g s in a %s, which can't stop a running call: it is abandoned, and its "
                "result will be ignored",
                name,
                timeout,
                pool,
            )

    async def close(self) -> None:
        self.give_up_beginnings()


class _ForeignSlot(Slot):
    def __init__(self, executor: ForeignExecutor) -> None:
        self._executor = executor

    async def run(self, work: Work) -> None:
        for claim in work.claims:
            work.ended(claim, await self._made(claim, work.timeout))

    async def _made(self, claim: Claim, timeout: float | None) -> Outcome:
        """Make one call and return its outcome."""
        whole = self._executor.is_small
        while True:
            ended = await self._submitted(claim.name, claim.args, timeout, whole)
            if ended == NEEDS_PAYLOAD:
                whole = True
            elif ended == NOT_TOLD:
                self._executor.give_up_beginnings()
            else:
                assert isinstance(ended, Outcome)
                return ended

    async def _submitted(self, name: str, args: str, timeout: float | None, whole: bool) -> Outcome | str:
        """Submit a call and return its outcome, or the reason why it did not start."""
        executor, clock = self._executor, self._executor.clock
        started_at, started = clock.wall(), clock.monotonic()
        begun, ended = asyncio.Event(), asyncio.Event()

        def end() -> None:
            ended.set()
            begun.set()

        future = executor.submit(name, args, whole=whole, begun=begun.set if timeout is not None else None)
        future.add_done_callback(_told(end))
        try:
            if timeout is not None:
                await self._wait_for_its_turn(future, begun, timeout)
                started_at, started = clock.wall(), clock.monotonic()
            async with asyncio.timeout(timeout):
                while not await _is_set(ended, _LOOK):
                    executor.look_after()
        except TimeoutError:
            if not future.done():
                assert timeout is not None
                if not _cancel(future) or not executor.is_honest:
                    executor.leave_behind(future, name, timeout)
                return timed_out(timeout, "", started_at, clock.monotonic() - started)
        except BaseException:  # cancelled, or the pool is broken
            if not future.done():
                _cancel(future)
                raise
        executor.note()
        try:
            result = future.result()
            return result if isinstance(result, str) else as_outcome(result)
        except BaseException as error:  # from the pool: exceptions of the function are returned as results
            executor.look_after()
            message = f"{type(error).__qualname__}: {error}"
            trouble = outcome(
                "crash", type(error).__qualname__, message, "", started_at, clock.monotonic() - started, again=True
            )
            return as_outcome(trouble)

    async def _wait_for_its_turn(self, future: Future[Any], begun: asyncio.Event, timeout: float) -> None:
        """Return when the call has started or ended, as far as the pool reports it."""
        executor = self._executor
        longest = min(_LOOK, max(timeout, 0.05))
        for pause in pauses(longest, longest) if executor.tells_beginnings else pauses(*_TURN):
            if await _is_set(begun, pause):
                break
            if not executor.tells_beginnings and (future.running() or not executor.is_honest):
                break
            executor.look_after(timeout)
        executor.note()

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


def _told(callback: Callable[[], object]) -> Callable[..., None]:
    """Return a function that calls the callback in the event loop, from any thread."""
    loop = asyncio.get_running_loop()

    def tell(*_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: the run was abandoned
            loop.call_soon_threadsafe(callback)

    return tell


def _cancel(future: Future[Any]) -> bool:
    try:
        return future.cancel()
    except Exception:  # futures of some executors raise here
        return False
