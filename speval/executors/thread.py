"""Plain functions in threads of this process.

Owns one daemon thread per slot. Invariant: nothing ever waits for a thread that was given up: neither the run, nor the
interpreter's exit.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import threading
import traceback
from dataclasses import dataclass
from queue import SimpleQueue

from ..clock import Clock
from ..model import Outcome
from .base import Executor, Function, RetryOn, Slot, as_outcome, timed_out
from .call import evaluate

__all__ = ["ThreadExecutor"]

logger = logging.getLogger("speval.executor")


class ThreadExecutor(Executor):
    """Calls a plain function in a daemon thread per slot, each call in a copy of the caller's context."""

    can_stop = False  # a thread can't be killed

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
        """Say once what a timeout means here."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "evaluation %r ran longer than %g s in a thread, which can't be stopped: it runs on, and whatever it returns "
                "is dropped. An async function can be cancelled, a process killed.",
                name,
                timeout,
            )


@dataclass(slots=True)
class _Call:
    name: str
    args: str
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]
    outcome: Outcome | None = None  # set by the thread before it says so to the loop


class _Thread:
    """A daemon thread that takes calls from a queue until it gets None or is abandoned."""

    def __init__(self, executor: ThreadExecutor, number: int) -> None:
        self._executor = executor
        self.calls: SimpleQueue[_Call | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=f"speval slot {number}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        executor = self._executor
        while (call := self.calls.get()) is not None:
            # The thread keeps nothing of a call while it waits for the next: a big result would stay in memory.
            run = (executor.function, call.name, call.args, executor.retry_on, executor.clock)
            call.outcome = as_outcome(executor.context.copy().run(evaluate, *run))
            try:
                call.loop.call_soon_threadsafe(_wake, call.future)
            except RuntimeError:  # the loop is closed: we were given up
                return
            del call, run

    def where(self) -> str:
        """Return the thread's stack, without our own frames."""
        frame = sys._current_frames().get(self.thread.ident or 0)
        stack = traceback.extract_stack(frame) if frame else traceback.StackSummary()
        mine = [entry for entry in stack if entry.filename not in _OURS]
        return "Still at (most recent call last):\n" + "".join(traceback.format_list(mine))


_OURS = {__file__, evaluate.__code__.co_filename, threading.__file__}


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _ThreadSlot(Slot):
    def __init__(self, executor: ThreadExecutor, number: int) -> None:
        self._executor = executor
        self._number = number
        self._thread: _Thread | None = None

    async def call(self, name: str, args: str, timeout: float | None) -> Outcome:
        clock = self._executor.clock
        if self._thread is None:
            self._thread = _Thread(self._executor, self._number)
        loop = asyncio.get_running_loop()
        call = _Call(name, args, loop, loop.create_future())
        started_at, started = clock.wall(), clock.monotonic()
        alarm = None if timeout is None else loop.call_later(timeout, _wake, call.future)
        self._thread.calls.put(call)
        try:
            await call.future
        except asyncio.CancelledError:
            if call.outcome is None:
                self._abandon()
                raise
        finally:
            if alarm is not None:
                alarm.cancel()
        if call.outcome is not None:
            return call.outcome
        assert timeout is not None
        self._executor.warn_of_abandoned(name, timeout)
        return timed_out(timeout, self._abandon().where(), started_at, clock.monotonic() - started)

    def _abandon(self) -> _Thread:
        """Let go of a thread that is still at work; the next call gets a new one."""
        thread, self._thread = self._thread, None
        assert thread is not None
        thread.calls.put(None)
        return thread

    async def close(self) -> None:
        if self._thread is not None:
            self._abandon()
