"""Several calls sent to one thread or worker process at once.

Owns the state of these calls: which have ended, which one runs, since when, and which can still be taken back. Invariant: calls
never wait behind a long one, and the timeout of each call counts from its start.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from ..clock import Clock
from ..model import Claim, Outcome
from .base import Work

__all__ = ["Batch", "BatchWorker"]

_STALE = 0.01  # seconds after which calls that wait behind another one are taken back


class BatchWorker(Protocol):
    """Runs the calls, one after the other."""

    def receive(self) -> None:
        """Report calls that have ended to the batch."""

    def take_back(self, most: int) -> int:
        """Take back up to ``most`` calls that have not started, the last ones first; return how many."""


class Batch:
    """Calls sent together, and their state.

    Args:
        worker: The thread or worker process that runs them.
        work: The calls.
        clock: The clock.

    Attributes:
        pending: Calls that have not ended; the first one runs or is about to start.
        overdue: The call that has exceeded its timeout, or None.
        since: When the first pending call started, monotonic seconds.
        since_wall: The same in unix seconds.
    """

    def __init__(
        self,
        worker: BatchWorker,
        work: Work,
        clock: Clock,
    ) -> None:
        self.pending = deque(work.claims)
        self.overdue: Claim | None = None
        self._worker = worker
        self._work = work
        self._timeout = work.timeout
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._woken: asyncio.Future[None] = self._loop.create_future()
        self.begin()

    def begin(self) -> None:
        """Record that the first pending call starts now."""
        self.since, self.since_wall = self._clock.monotonic(), self._clock.wall()

    def running(self) -> float:
        """Return how long the first of the pending ones has run, in seconds."""
        return self._clock.monotonic() - self.since

    async def wait(self) -> None:
        """Return when woken, or when a call is overdue."""
        alarm = self._set_alarm()
        try:
            await self._woken
        finally:
            self._woken = self._loop.create_future()
            alarm.cancel()

    def wake(self, _: object = None) -> None:
        """Make ``wait`` return."""
        if not self._woken.done():
            self._woken.set_result(None)

    def end(self, *outcomes: Outcome) -> None:
        """Tell how the first of the pending ones ended; the next one begins."""
        for outcome in outcomes:
            self._work.ended(self.pending.popleft(), outcome)
        self.begin()

    def give_back(self, unstarted: int) -> None:
        """Give back the last so many, which have not begun."""
        if unstarted:
            self._work.give_back([self.pending.pop() for _ in range(unstarted)][::-1])

    def _set_alarm(self) -> _Alarm:
        alarm = _Alarm()
        pauses = [] if self._timeout is None else [self._timeout]
        if len(self.pending) > 1:
            pauses.append(_STALE)
        if pauses:
            left = self.since + min(pauses) - self._clock.monotonic()
            alarm.handle = self._loop.call_later(max(left, 0.0005), self._look, alarm)
        return alarm

    def _look(self, alarm: _Alarm) -> None:
        """Take back what waits behind a slow call, and notice one that has run too long."""
        self._worker.receive()  # it may have ended in time, and this loop be late
        if not self.pending or self._woken.done():
            return
        running = self.running()
        is_overdue = self._timeout is not None and running >= self._timeout
        if is_overdue:
            self.overdue = self.pending[0]
        if is_overdue or running >= _STALE:
            self.give_back(self._worker.take_back(len(self.pending) - 1))
        if is_overdue:
            self.wake()
        else:
            alarm.handle = self._set_alarm().handle


class _Alarm:
    """A timer that sets itself anew."""

    handle: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        if self.handle is not None:
            self.handle.cancel()
