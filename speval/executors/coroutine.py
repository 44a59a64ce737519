"""Coroutines in the caller's event loop.

Owns async functions. Invariant: each evaluation is a task of its own, so that its cancellation, context and cancel scopes
are its own, and one that refuses to end can be left behind.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import threading
import traceback
from functools import partial
from types import CoroutineType

from ..clock import Clock
from ..codec import decode
from ..model import Function, Outcome, RetryOn
from .base import Executor, Slot, as_outcome, timed_out
from .call import completed, failed, leave_if_forked

__all__ = ["CoroutineExecutor"]

logger = logging.getLogger("speval.executor")

GRACE = 1.0  # seconds a cancelled coroutine has to clean up


class CoroutineExecutor(Executor):
    """Awaits an async function, or whatever awaitable a plain one returns."""

    can_stop = True

    def __init__(self, function: Function, retry_on: RetryOn, clock: Clock) -> None:
        self.function = function
        self.retry_on = retry_on
        self.clock = clock

    def slot(self, number: int) -> Slot:
        return _CoroutineSlot(self)

    async def close(self) -> None:
        pass


class _CoroutineSlot(Slot):
    def __init__(self, executor: CoroutineExecutor) -> None:
        self._executor = executor

    async def call(self, name: str, args: str, timeout: float | None) -> Outcome:
        clock = self._executor.clock
        evaluation = _Evaluation(self._executor, name, args)
        loop = asyncio.get_running_loop()
        task = loop.create_task(evaluation.run(), name=f"speval evaluation {name}")
        # Not simply ``await task``: that would wait for ever for one that swallows its cancellation.
        waiter: asyncio.Future[None] = loop.create_future()
        wake = partial(_wake, waiter)
        task.add_done_callback(wake)
        alarm = None if timeout is None else loop.call_later(timeout, wake)
        try:
            await waiter
        except asyncio.CancelledError:
            if task.done():  # it came too late: there is an outcome
                return task.result()
            await _stop(evaluation, task)
            raise
        finally:
            if alarm is not None:
                alarm.cancel()
        if not task.done():
            assert timeout is not None
            where = _where(task)
            await _stop(evaluation, task)
            return timed_out(timeout, where, evaluation.started_at, clock.monotonic() - evaluation.started)
        return task.result()

    async def close(self) -> None:
        pass


class _Evaluation:
    """One call of the function; a thousand may be under way, so the garbage collector has little of each to look at."""

    __slots__ = ("_args", "_executor", "name", "started", "started_at", "stopped")

    def __init__(self, executor: CoroutineExecutor, name: str, args: str) -> None:
        self._executor = executor
        self.name = name
        self._args = args
        self.started_at = executor.clock.wall()
        self.started = executor.clock.monotonic()
        self.stopped = False

    async def run(self) -> Outcome:
        clock, pid = self._executor.clock, os.getpid()
        try:
            result = self._executor.function(decode(self._args))
            if type(result) is CoroutineType or inspect.isawaitable(result):
                result = await result
        except BaseException as error:
            leave_if_forked(pid, error)
            # The user's own second Ctrl-C arrives here only where the loop runs in the main thread.
            kind = type(error)  # not isinstance(), which asks the exception itself
            is_interrupt = issubclass(kind, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()
            # A cancellation that we did not ask for is the function's own doing, and its failure.
            if is_interrupt or (self.stopped and issubclass(kind, asyncio.CancelledError)):
                raise
            return as_outcome(failed(error, self._executor.retry_on, self.started_at, clock.monotonic() - self.started))
        leave_if_forked(pid, None)
        return as_outcome(completed(result, self.name, self.started_at, clock.monotonic() - self.started))


def _wake(waiter: asyncio.Future[None], _: object = None) -> None:
    if not waiter.done():
        waiter.set_result(None)


async def _stop(evaluation: _Evaluation, task: asyncio.Task[Outcome]) -> None:
    """Cancel the task and give it its grace."""
    evaluation.stopped = True
    task.cancel()
    await asyncio.wait({task}, timeout=GRACE)
    if not task.done():
        logger.warning(
            "evaluation %r refuses to be cancelled: it is left behind, still running in the event loop, and whatever it "
            "returns is dropped",
            evaluation.name,
        )
        task.add_done_callback(_retrieve)
    else:
        _retrieve(task)


def _retrieve(task: asyncio.Task[Outcome]) -> None:
    """Look at the exception of a task nobody waits for any more, or asyncio complains that nobody did."""
    if not task.cancelled():
        task.exception()


def _where(task: asyncio.Task[Outcome]) -> str:
    """Return the stack of a waiting task, without our own frame."""
    frames = []
    awaited: object = task.get_coro()
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is None:
            break
        frames.append((frame, frame.f_lineno))
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    return "Stopped at (most recent call last):\n" + "".join(traceback.StackSummary.extract(iter(frames[1:])).format())
