"""Plain functions in threads of this process.

Owns one daemon thread per slot. Invariant: neither the run nor the exit of the interpreter ever waits for an abandoned thread.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue

from ..clock import Clock
from ..errors import SystemLimitError
from ..model import Claim, Function, Outcome, RetryOn
from .base import Executor, NoRoomError, Slot, Work, as_outcome, timed_out
from .batch import Batch
from .call import evaluate, outcome

__all__ = ["ThreadExecutor"]

logger = logging.getLogger("speval.executor")

_LOOK = 3.0  # seconds between checks of a thread, which usually reports its end itself


class ThreadExecutor(Executor):
    """Calls a plain function in a daemon thread per slot, each call in a copy of the caller's context."""

    can_stop = False  # a thread can't be killed
    takes_many = True

    def __init__(self, function: Function, retry_on: RetryOn, clock: Clock) -> None:
        self.function = function
        self.retry_on = retry_on
        self.clock = clock
        self.context = contextvars.copy_context()
        self._has_warned = False

    def slot(self, number: int) -> Slot:
        return _ThreadSlot(self, number)

    async def close(self) -> None:
        pass

    def warn_of_abandoned(self, name: str, timeout: float) -> None:
        """Warn once what a timeout means for threads."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "evaluation %r ran longer than %g s in a thread, which can't be stopped: it is abandoned, and its result will "
                "be ignored; use executor='process' or an async function to stop it",
                name,
                timeout,
            )


class _Calls:
    """The calls of one batch, shared by the thread that runs them and the event loop that waits for them."""

    def __init__(self, claims: Sequence[Claim]) -> None:
        self._calls = deque((claim.name, claim.args) for claim in claims)
        self._done: deque[Outcome] = deque()
        self._loop = asyncio.get_running_loop()
        self._is_told = False  # whether the loop is notified
        self.batch: Batch | None = None

    # In the thread; every operation on a deque is atomic.

    def next(self) -> tuple[str, str] | None:
        """Return the next call, or None."""
        try:
            return self._calls.popleft()
        except IndexError:
            return None

    def done(self, outcome: Outcome) -> None:
        """Pass an outcome to the event loop."""
        self._done.append(outcome)
        if not self._is_told:
            self._is_told = True
            with suppress(RuntimeError):  # the loop is closed: this thread was abandoned
                self._loop.call_soon_threadsafe(self._tell)

    # In the loop

    def _tell(self) -> None:
        self._is_told = False  # first, so that later outcomes notify again
        self.receive()
        if self.batch is not None and not self.batch.pending:
            self.batch.wake()

    def receive(self) -> None:
        if self.batch is not None and self._done:
            self.batch.end(*(self._done.popleft() for _ in range(len(self._done))))

    def take_back(self, most: int) -> int:
        taken = 0
        with suppress(IndexError):
            while taken < most:
                self._calls.pop()
                taken += 1
        return taken


class _Thread:
    """A daemon thread that takes work from a queue until it gets None."""

    def __init__(self, executor: ThreadExecutor, number: int) -> None:
        self._executor = executor
        self._loop = asyncio.get_running_loop()
        self.on_end: Callable[[], None] = lambda: None  # called in the loop
        self.work: SimpleQueue[_Calls | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"speval slot {number}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the system starts no more threads
            problem = f"{error} (`ulimit -u`, or the pids limit of a container)"
            raise NoRoomError(problem, SystemLimitError(f"thread {self._thread.name!r}")) from error
        # An exception from outside can also hit the code that reports the end.
        self._timer = self._loop.call_later(_LOOK, self._look)

    @property
    def is_dead(self) -> bool:
        """Return whether the thread has ended, for example by an exception raised in it from outside."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._make_calls()
        except BaseException as error:
            # Raised in this thread from outside, in code of speval: the slot gets another thread.
            logger.warning("thread %s ended: %s was raised in it from outside", self._thread.name, type(error).__name__)
        finally:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._tell_end)

    def _tell_end(self) -> None:
        self.on_end()

    def _look(self) -> None:
        if self.is_dead:
            self.on_end()
        else:
            self._timer = self._loop.call_later(_LOOK, self._look)

    def let_go(self) -> None:
        """Let the thread end after its running call."""
        self._timer.cancel()
        self.work.put(None)

    def _make_calls(self) -> None:
        executor = self._executor
        while (calls := self.work.get()) is not None:
            while (call := calls.next()) is not None:
                run = (executor.function, *call, executor.retry_on, executor.clock)
                # No variable for the result: a large one must not stay in memory during the next call.
                calls.done(as_outcome(executor.context.copy().run(evaluate, *run)))

    def where(self) -> str:
        """Return the stack of the thread, without frames of speval."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        stack = traceback.extract_stack(frame) if frame else traceback.StackSummary()
        mine = [entry for entry in stack if entry.filename not in _OURS]
        return "Still at (most recent call last):\n" + "".join(traceback.format_list(mine))


_OURS = {__file__, evaluate.__code__.co_filename, threading.__file__}


class _ThreadSlot(Slot):
    def __init__(self, executor: ThreadExecutor, number: int) -> None:
        self._executor = executor
        self._number = number
        self._thread: _Thread | None = None

    async def run(self, work: Work) -> None:
        if self._thread is not None and self._thread.is_dead:
            self._abandon()
        if self._thread is None:
            self._thread = _Thread(self._executor, self._number)
        thread, calls = self._thread, _Calls(work.claims)
        calls.batch = batch = Batch(calls, work, self._executor.clock)
        thread.on_end = batch.wake
        thread.work.put(calls)
        try:
            while batch.pending:
                await batch.wait()
                calls.receive()  # an overdue call may have just ended
                if batch.pending and thread.is_dead:
                    self._abandon()
                    self._settle(batch, calls)
                    return
                if batch.pending and batch.pending[0] is batch.overdue:
                    assert work.timeout is not None
                    self._executor.warn_of_abandoned(batch.overdue.name, work.timeout)
                    duration, started_at = batch.running(), batch.since_wall
                    batch.end(timed_out(work.timeout, self._abandon().where(), started_at, duration))
                    batch.give_back(calls.take_back(len(batch.pending)))
        except asyncio.CancelledError:
            calls.take_back(len(batch.pending))
            calls.receive()
            if batch.pending:
                self._abandon()
                raise
        finally:
            thread.on_end = lambda: None
            calls.batch = None

    def _settle(self, batch: Batch, calls: _Calls) -> None:
        """Report the outcomes of the calls of a dead thread."""
        batch.give_back(calls.take_back(len(batch.pending)))
        if batch.pending:
            started_at, duration = batch.since_wall, batch.running()
            message = "its thread was ended by an exception raised in it from outside"
            batch.end(as_outcome(outcome("crash", "ThreadDied", message, "", started_at, duration, again=True)))
        batch.give_back(len(batch.pending))

    def _abandon(self) -> _Thread:
        """Abandon a running thread; the next call gets a new one."""
        thread, self._thread = self._thread, None
        assert thread is not None
        thread.let_go()
        return thread

    async def close(self) -> None:
        if self._thread is not None:
            self._abandon()
