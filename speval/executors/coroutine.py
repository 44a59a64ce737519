"""Coroutines in the caller's event loop.

Owns running async functions. Invariant: each evaluation is a separate task with separate cancellation, context and cancel
scopes, so that one that does not end can be abandoned.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import threading
import traceback
from collections import deque
from types import CoroutineType

from ..clock import Clock
from ..codec import decode
from ..model import Claim, Function, Outcome, RetryOn
from .base import Executor, Slot, Work, as_outcome, surely, timed_out
from .call import completed, failed, leave_if_forked
from .subtasks import cause_of_death, culprit, current, fail_evaluation

__all__ = ["CoroutineExecutor", "fail_evaluation"]

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
    """Starts each evaluation when the previous one has ended, without waking the task that waits for all of them."""

    def __init__(self, executor: CoroutineExecutor) -> None:
        self._executor = executor
        self._loop = asyncio.get_running_loop()
        self._alarm: asyncio.TimerHandle | None = None

    async def run(self, work: Work) -> None:
        self._work = work
        self._left = deque(work.claims)
        self._timeout = work.timeout
        claim = self._next()
        while claim is not None:
            claim = await self._run(claim)

    def _next(self) -> Claim | None:
        return self._left.popleft() if self._left else self._work.more()

    async def _run(self, claim: Claim) -> Claim | None:
        """Run evaluations until none is left, or one must be stopped; return the next one to run."""
        # Not simply ``await task``: that would wait for ever for one that swallows its cancellation.
        self._waiter: asyncio.Future[None] = self._loop.create_future()
        self._begin(claim)
        is_cancelled = False
        try:
            await self._waiter
        except asyncio.CancelledError:
            is_cancelled = True
            if self._is_told and self._waiter.cancelled():  # parked
                raise
            await surely(self._stop_cancelled())  # a loop that ends cancels more than once
            if self._task.cancelled() or not self._task.done() or self._evaluation.is_cancelled_too:
                raise
            # Else it came too late: there is an outcome.
        finally:
            self._set_alarm(None)
        if self._is_told:
            return None
        if self._task.done():
            outcome = self._task.result()
        else:
            assert self._timeout is not None
            where, evaluation = _where(self._task), self._evaluation
            await _stop(evaluation, self._task)
            duration = self._executor.clock.monotonic() - evaluation.started
            outcome = timed_out(self._timeout, where, evaluation.started_at, duration)
        self._work.ended(self._claim, outcome)
        return None if is_cancelled else self._next()

    async def _stop_cancelled(self) -> None:
        """Stop the evaluation, and charge it if it has itself ended the event loop, one of the user's that nothing guards.

        It would end the loop again at each start, and all others are cancelled with it.
        """
        if not self._task.done():
            await _stop(self._evaluation, self._task)
        death = await cause_of_death()
        if death is not None and culprit(death) is self._evaluation and not self._is_told:
            # A Ctrl-C that arrives in its code looks the same: then the attempt is lost, and not the evaluation.
            again = isinstance(death, KeyboardInterrupt)
            self._work.ended(self._claim, self._evaluation.failed(death)._replace(again=again))
            raise asyncio.CancelledError

    def _begin(self, claim: Claim) -> None:
        self._claim = claim
        self._is_told = False
        self._evaluation = _Evaluation(self._executor, claim.name, claim.args)
        self._task = self._loop.create_task(self._evaluation.run(), name=f"speval evaluation {claim.name}")
        self._evaluation.task = self._task
        self._task.add_done_callback(self._on_end)
        if self._timeout is not None:
            self._set_alarm(self._loop.call_later(self._timeout, self._wake))

    def _on_end(self, task: asyncio.Task[Outcome]) -> None:
        if task is self._task:
            self._evaluation.task = None  # its context knows the evaluation: no circle is left for the garbage collector
        if task is not self._task or self._waiter.done():  # left behind; or overdue or cancelled, and looked after
            return
        try:
            self._work.ended(self._claim, task.result())
            self._is_told = True
            claim = self._next()
            if claim is not None or not self._work.park(self._go_on):
                self._go_on(claim)
        except BaseException as error:  # raised where the slot waits
            self._waiter.set_exception(error)

    def _go_on(self, claim: Claim | None) -> None:
        if claim is None:
            self._wake()
        else:
            self._begin(claim)

    def _set_alarm(self, alarm: asyncio.TimerHandle | None) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = alarm

    def _wake(self) -> None:
        if not self._waiter.done():
            self._waiter.set_result(None)

    async def close(self) -> None:
        pass


class _Evaluation:
    """One call of the function; a thousand may be under way, so the garbage collector has little of each to look at."""

    __slots__ = ("_args", "_executor", "error", "is_cancelled_too", "name", "started", "started_at", "stopped", "task")

    def __init__(self, executor: CoroutineExecutor, name: str, args: str) -> None:
        self._executor = executor
        self.name = name
        self._args = args
        self.started_at = executor.clock.wall()
        self.started = executor.clock.monotonic()
        self.stopped = False
        self.is_cancelled_too = False  # it ended with a cancellation that its slot has not asked for
        self.task: asyncio.Task[Outcome] | None = None
        self.error: BaseException | None = None  # SystemExit or KeyboardInterrupt, out of what it has started

    def strike(self, error: BaseException) -> None:
        """End with this error."""
        if self.task is None or self.task.done():
            logger.error("evaluation %r had ended when something that it had started raised %r", self.name, error)
        elif self.error is None:
            self.error = error
            self.task.cancel()

    async def run(self) -> Outcome:
        clock, pid = self._executor.clock, os.getpid()
        current.set(self)
        try:
            result = self._executor.function(decode(self._args))
            if type(result) is CoroutineType or inspect.isawaitable(result):
                result = await result
        except BaseException as error:
            leave_if_forked(pid, error)
            if self.error is not None:
                return self.failed(self.error)
            # The user's own second Ctrl-C arrives here only where the loop runs in the main thread. One that comes out of what
            # the function has started has ended the loop before.
            kind = type(error)  # not isinstance(), which asks the exception itself
            is_interrupt = issubclass(kind, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()
            if is_interrupt and await cause_of_death() is error:
                return self.failed(error)
            # A cancellation that we did not ask for is the function's own doing, and its failure.
            if is_interrupt or (self.stopped and issubclass(kind, asyncio.CancelledError)):
                raise
            self.is_cancelled_too = issubclass(kind, asyncio.CancelledError)
            return self.failed(error)
        leave_if_forked(pid, None)
        if self.error is not None:
            return self.failed(self.error)
        return as_outcome(completed(result, self.name, self.started_at, clock.monotonic() - self.started))

    def failed(self, error: BaseException) -> Outcome:
        """Return its failure with this error."""
        duration = self._executor.clock.monotonic() - self.started
        return as_outcome(failed(error, self._executor.retry_on, self.started_at, duration))


async def _stop(evaluation: _Evaluation, task: asyncio.Task[Outcome]) -> None:
    """Cancel the task and give it its grace."""
    evaluation.stopped = True
    task.cancel()
    await asyncio.wait({task}, timeout=GRACE)
    if not task.done():
        logger.warning(
            "evaluation %r ignores its cancellation: it is abandoned, still runs in the event loop, and its result will be "
            "ignored",
            evaluation.name,
        )
        task.add_done_callback(_retrieve)
    else:
        _retrieve(task)


def _retrieve(task: asyncio.Task[Outcome]) -> None:
    """Retrieve the exception of an abandoned task; otherwise asyncio would log that it was never retrieved."""
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
