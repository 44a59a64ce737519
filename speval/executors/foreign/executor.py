"""Functions in a user's ``concurrent.futures.Executor``.

Owns handing calls to such an executor and reading what comes back. Invariant: whatever goes wrong on the way there or back is
the evaluation's crash, told apart from an exception of the function; the executor itself is the user's, who also closes it.
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
from .beginnings import TOKEN, Channel, open_channel
from .call import NEEDS_PAYLOAD, NOT_TOLD, call_loaded

__all__ = ["ForeignExecutor"]

logger = logging.getLogger("speval.executor")

_LOOK = 2.0  # seconds between looks whether the pool is still there
_TURN = (0.001, 0.05)  # seconds between looks whether a call has begun that can't tell it: at first, and in the long run
_SMALL = 100_000  # bytes; a larger function is sent to a process that asks for it only
_Interpreters: Any = getattr(concurrent.futures, "InterpreterPoolExecutor", ())  # threads, and as apart as processes


class ForeignExecutor(Executor):
    """Submits each evaluation to an executor such as a thread or process pool, loky's or the one of a Dask client.

    Args:
        function: The function. Threads of this process call it as it is; for others it is pickled once.
        pool: Where to submit.
        retry_on: Exception types after which an evaluation may be tried again.
        clock: Where the time comes from.

    Raises:
        FunctionError: the function can't be pickled.
    """

    can_stop = False  # no such executor stops a call that has begun

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
        # Others, as Dask's, say of a call that it is pending until it has ended, and that they have cancelled it in any case.
        self.is_honest = isinstance(pool, ThreadPoolExecutor | ProcessPoolExecutor) or _is_loky(pool)
        self.tells_beginnings = True  # as far as is known
        self._channel: Channel | None = None
        self._waiting: dict[str, Callable[[], object]] = {}
        self._has_warned = False
        self._left_behind: set[Future[Any]] = set()
        self._news = clock.monotonic()  # when a call began or ended for the last time

    def slot(self, number: int) -> Slot:
        return _ForeignSlot(self)

    def submit(self, name: str, args: str, *, whole: bool, begun: Callable[[], object] | None) -> Future[Any]:
        """Hand a call to the pool.

        Args:
            name: The evaluation's name.
            args: Its args as JSON.
            whole: Whether the function goes along.
            begun: Called in the event loop when the call begins, if that is told.

        Raises:
            ExecutorError: the pool takes no more.
        """
        future: Future[Any]
        token = secrets.token_hex(TOKEN // 2)
        try:
            if self._is_here:
                future = self.pool.submit(self._call_here, begun and _told(begun), name, args)
            else:
                address = self._listen(token, begun) if begun is not None else None
                payload = self._payload if whole else None
                # By position only, and never twice the same: Dask itself uses many keywords, and gives equal
                # calls one result between them, which would make another attempt none.
                future = self.pool.submit(call_loaded, self._digest, payload, token, address, name, args)
        except Exception as error:
            self._waiting.pop(token, None)
            raise ExecutorError(type(self.pool).__qualname__, f"{type(error).__name__}: {error}") from error
        future.add_done_callback(_told(lambda: self._waiting.pop(token, None)))
        return future

    def _call_here(self, begun: Callable[[], object] | None, name: str, args: str) -> Result:
        """Call the function in a thread of this process."""
        if begun is not None:
            begun()
        return evaluate(self._function, name, args, self._retry_on, self.clock)

    def _listen(self, token: str, begun: Callable[[], object]) -> tuple[str, str] | None:
        """Have the beginning of a call told, and return what it needs for that."""
        if self._channel is None and self.tells_beginnings:
            self._channel = open_channel(self.pool, self._hear)
            self.tells_beginnings = self._channel is not None
        if self._channel is None:
            return None
        self._waiting[token] = begun
        return self._channel.address

    def _hear(self, token: str) -> None:
        begun = self._waiting.pop(token, None)
        if begun is not None:
            begun()

    def give_up_beginnings(self) -> None:
        """Ask for beginnings no more: a process can't tell them."""
        channel, self._channel, self.tells_beginnings = self._channel, None, False
        if channel is not None:
            channel.close()

    def note(self) -> None:
        """Note that a call has begun or ended."""
        self._news = self.clock.monotonic()

    def look_after(self, timeout: float | None = None) -> None:
        """See that the pool can still bring what is waited for; what never begins is waited for no longer than the timeout.

        Raises:
            ExecutorError: it can't.
        """
        # A Dask client that has lost its scheduler does not tell its futures.
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
        self.give_up_beginnings()


class _ForeignSlot(Slot):
    def __init__(self, executor: ForeignExecutor) -> None:
        self._executor = executor

    async def run(self, work: Work) -> None:
        for claim in work.claims:
            work.ended(claim, await self._made(claim, work.timeout))

    async def _made(self, claim: Claim, timeout: float | None) -> Outcome:
        """Make one call and return how it ended."""
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
        """Submit a call and return how it ended, or what kept it from beginning."""
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
        except BaseException:  # cancelled, or this pool can't bring results any more
            if not future.done():
                _cancel(future)
                raise
        executor.note()
        try:
            result = future.result()
            return result if isinstance(result, str) else as_outcome(result)
        except BaseException as error:  # not the function's: those come back as results
            executor.look_after()
            message = f"{type(error).__qualname__}: {error}"
            trouble = outcome(
                "crash", type(error).__qualname__, message, "", started_at, clock.monotonic() - started, again=True
            )
            return as_outcome(trouble)

    async def _wait_for_its_turn(self, future: Future[Any], begun: asyncio.Event, timeout: float) -> None:
        """Return when the call has begun, or is over, as far as that is told."""
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
    """Return what has a callback called in the event loop, from any thread."""
    loop = asyncio.get_running_loop()

    def tell(*_: object) -> None:
        with suppress(RuntimeError):  # the loop is over: we were given up
            loop.call_soon_threadsafe(callback)

    return tell


def _cancel(future: Future[Any]) -> bool:
    try:
        return future.cancel()
    except Exception:  # there are executors whose futures raise here
        return False
