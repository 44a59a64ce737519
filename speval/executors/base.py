"""Where the user's function runs.

Owns the shape all executors share: N slots, each with one call at a time, so the number of slots is the limit. Invariant: a
call ends within its timeout plus a short grace, whatever the function does, and its outcome is data, never an exception.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import SpevalError
from ..model import Claim, Outcome, Result
from .call import outcome

__all__ = ["Executor", "NoRoomError", "Slot", "Work", "as_outcome", "surely", "timed_out"]


class NoRoomError(Exception):
    """A slot can't run anything: the system has no room for another process or thread. Its claims have not begun.

    Args:
        problem: What limit is reached, and what raises it.
        fatal: What to raise where no other slot can run anything either.
    """

    def __init__(self, problem: str, fatal: SpevalError) -> None:
        super().__init__(problem, fatal)
        self.problem, self.fatal = problem, fatal


class Work(ABC):
    """Evaluations for a slot to run one after the other, and what becomes of them.

    Attributes:
        claims: What to run first, in this order.
        timeout: Seconds each evaluation may run from the moment its function is called.
    """

    __slots__ = ()
    claims: Sequence[Claim]
    timeout: float | None

    @abstractmethod
    def ended(self, claim: Claim, outcome: Outcome) -> None:
        """Take an outcome as soon as there is one; outcomes come in the order of the claims."""

    def give_back(self, claims: Sequence[Claim]) -> None:
        """Take claims that have not started, to be run elsewhere: a claim before them takes long."""
        raise NotImplementedError

    def more(self) -> Claim | None:
        """Return another evaluation once all before it have ended; None: there is none now."""
        return None

    def park(self, go_on: Callable[[Claim | None], None]) -> bool:
        """Return whether the slot may wait for another evaluation instead of ending the work.

        If so, ``go_on`` is called with it, or with None to end the work. This avoids waking the task that runs the slot.
        """
        return False


class _One(Work):
    """A single evaluation, for ``Slot.call``."""

    __slots__ = ("claims", "outcome", "timeout")

    def __init__(self, claim: Claim, timeout: float | None) -> None:
        self.claims, self.timeout = [claim], timeout
        self.outcome: Outcome | None = None

    def ended(self, claim: Claim, outcome: Outcome) -> None:
        self.outcome = outcome

    def give_back(self, claims: Sequence[Claim]) -> None:
        """Leave it to ``Slot.call`` to run the evaluation again."""


class Slot(ABC):
    """Runs one evaluation at a time."""

    @abstractmethod
    async def run(self, work: Work) -> None:
        """Run evaluations one after the other.

        When this is cancelled, it stops the function, or abandons it where it can't be stopped, and raises the cancellation
        within a short grace. If the function has ended by then, its outcome is taken all the same.

        Raises:
            NoRoomError: there is no room for this slot; nothing has begun.
        """

    async def call(self, name: str, args: str, timeout: float | None) -> Outcome:
        """Run the function once and return how it ended.

        Args:
            name: The evaluation's name, for messages.
            args: Its args as JSON.
            timeout: Seconds it may run.
        """
        one = _One(Claim(0, 1, 1, name, args, 0), timeout)
        while one.outcome is None:
            await self.run(one)
        return one.outcome

    @abstractmethod
    async def close(self) -> None:
        """Give back what the slot holds, within a short grace."""


class Executor(ABC):
    """Makes slots.

    Attributes:
        can_stop: Whether cancelling a call really ends the function, so that it is worth doing when a lease is in doubt.
        takes_many: Whether it pays to hand a slot several short evaluations at once.
    """

    can_stop: bool
    takes_many = False

    def start(self) -> None:
        """Get ready for the first call, which is soon to come; in the event loop."""
        return

    @abstractmethod
    def slot(self, number: int) -> Slot:
        """Return a new slot; ``number`` counts from 0 and is for names of threads and tasks."""

    @abstractmethod
    async def close(self) -> None:
        """Give back what the slots share; they are all closed by then."""


def as_outcome(result: Result) -> Outcome:
    """Return what a call brought as the engine knows it."""
    return tuple.__new__(Outcome, result)  # as Outcome(*result), in half the time


def timed_out(timeout: float, where: str, started_at: float, duration: float) -> Outcome:
    """Return the outcome of a function that ran for too long; ``where`` is the stack it was stopped in."""
    message = f"ran longer than {timeout:g} s"
    return as_outcome(outcome("timeout", "TimeoutError", message, where, started_at, duration, again=True))


async def surely(awaitable: Any) -> Any:
    """Await to the end, and only then raise a cancellation that came meanwhile."""
    task = asyncio.ensure_future(awaitable)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
    return task.result()
