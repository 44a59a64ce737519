"""The slots of a worker.

Owns the claims that have not started, the slots that run them, how many slots there are, and interrupting them. Invariant: a
claim that is taken in comes out once: as an outcome, among the released ones, or with the error that ends the run.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

from ..clock import Clock
from ..executors.base import Executor, NoRoomError, Work
from ..model import Claim, Outcome
from .plan import share

__all__ = ["Slots"]

logger = logging.getLogger("speval.worker")

_ROOM_AGAIN = 60.0  # seconds after which slots are tried again that the system had no room for


class Slots:
    """Runs claims, one slot for each that runs at a time; the number of slots is the limit of concurrency.

    Args:
        executor: Where the function runs.
        timeout: Seconds an evaluation may run.
        concurrency: How many may run at once.
        clock: Where the time comes from.
        on_end: Called with each outcome.
        on_change: Called when a slot becomes free, and when claims are released.

    Attributes:
        ready: Claims that have not started, in the order in which they start.
        released: Claims that are to be given back.
        mean: Seconds an evaluation takes, over the last ones.
        is_closing: The slots end instead of taking another claim.
        concurrency: How many may run at once: as many as are wanted, or fewer where the system has no room.
    """

    def __init__(
        self,
        executor: Executor,
        timeout: float | None,
        concurrency: int,
        clock: Clock,
        *,
        on_end: Callable[[Claim, Outcome], None],
        on_change: Callable[[], None],
    ) -> None:
        self.ready: deque[Claim] = deque()
        self.released: list[Claim] = []
        self.mean = 1.0
        self.concurrency = concurrency
        self._executor = executor
        self._timeout = timeout
        self._wanted = concurrency
        self._clock = clock
        self._on_end = on_end
        self._on_change = on_change
        self._group: asyncio.TaskGroup | None = None
        self._running: dict[int, _Turn] = {}  # by slot number
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._parked: deque[_Turn] = deque()  # free slots that go on at once
        self._interrupted: set[int] = set()
        self._equipped: set[int] = set()  # slots that have run something
        self._made = 0
        self._alive = 0
        self._room: int | None = None  # how many the system has room for, while that is known
        self._room_again = 0.0  # when to try more of them again, monotonic seconds
        self._has_warned = False
        self._held_back: set[str] = set()  # why no claim starts
        self.is_closing = False

    def __repr__(self) -> str:
        return f"<Slots {len(self._running)} of {self.concurrency} run, {len(self.ready)} ready>"

    @property
    def running(self) -> int:
        """Return how many slots run."""
        return len(self._running)

    @property
    def held(self) -> int:
        """Return how many claims run, are ready or are to be given back."""
        return sum(len(turn.running) for turn in self._running.values()) + len(self.ready) + len(self.released)

    def open(self, group: asyncio.TaskGroup) -> None:
        """Make slots in this group from now on; closing the slots and leaving the group ends them."""
        self._group = group

    def close(self) -> None:
        """Let slots end instead of taking another claim."""
        self.is_closing = True
        while self._parked:
            self._parked.popleft().go_on(None)
        self._wake(len(self._waiting))

    def take(self, claims: Sequence[Claim]) -> None:
        """Take claims in, and start as many as there are slots for."""
        if self._held_back:
            self.released.extend(claims)
            return
        self.ready.extend(claims)
        self._unpark()
        new = min(len(self.ready) - len(self._waiting), self.concurrency - self._alive)
        self._wake(len(self.ready))
        for _ in range(new):
            assert self._group is not None
            self._group.create_task(self._run(self._made), name=f"speval slot {self._made}")
            self._made += 1
            self._alive += 1

    def take_released(self) -> list[Claim]:
        """Return the claims to be given back since the last call."""
        released, self.released = self.released, []
        return released

    def hold_back(self, why: str) -> None:
        """Start nothing from now on, and release what has not started."""
        self._held_back.add(why)
        self.release_ready()

    def let_go(self, why: str) -> None:
        """Start claims again, unless they are held back for another reason."""
        self._held_back.discard(why)

    def release_ready(self) -> None:
        """Release what has not started."""
        self.released.extend(self.ready)
        self.ready.clear()

    def interrupt(self) -> None:
        """Stop what runs and release it."""
        for number, turn in self._running.items():
            if number not in self._interrupted:
                self._interrupted.add(number)
                turn.task.cancel()

    def resize(self, wanted: int) -> bool:
        """Run so many at once, as far as the system has room; return whether that is another number than before.

        Slots that the system had no room for are tried again after a while.
        """
        if self._room is not None and self._clock.monotonic() >= self._room_again:
            self._room = None
            logger.debug("trying again to run %d evaluations at once", wanted)
        before, self.concurrency = self.concurrency, wanted if self._room is None else min(wanted, self._room)
        if wanted != self._wanted:
            self._wanted = wanted
            logger.info("concurrency is %d now, it was %d", self.concurrency, before)
        return self.concurrency != before

    def _shrink(self, number: int, error: NoRoomError) -> None:
        """Go on with the other slots: the system has no room for this one."""
        self._equipped.discard(number)
        others = len((self._equipped | self._running.keys()) - {number})
        if not others:
            raise error.fatal from error
        if not self._has_warned:
            logger.warning("fewer evaluations run at once than the %d wanted: %s", self._wanted, error.problem)
            self._has_warned = True
        self._room, self._room_again = others, self._clock.monotonic() + _ROOM_AGAIN
        self.concurrency = min(self.concurrency, others)

    def _unpark(self) -> None:
        """Have parked slots go on."""
        while self._parked and self.ready and len(self._running) < self.concurrency:
            turn = self._parked.popleft()
            self._running[turn.number] = turn
            turn.go_on(turn.more())

    def _wake(self, count: int) -> None:
        for _ in range(min(count, len(self._waiting))):
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)

    async def _run(self, number: int) -> None:
        """Run evaluations in one slot until the slots close."""
        slot = self._executor.slot(number)
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        turn = _Turn(self, number, task, self._timeout)  # made once: with a thousand slots, garbage collections take long
        try:
            while not self.is_closing:
                # After the concurrency was lowered, there are more slots than may run.
                if not self.ready or len(self._running) >= self.concurrency:
                    waiter = loop.create_future()
                    self._waiting.append(waiter)
                    await waiter
                    continue
                turn.begin(self._next_claims())
                self._running[number] = turn
                try:
                    await slot.run(turn)
                    self._equipped.add(number)
                except NoRoomError as error:
                    self._shrink(number, error)
                    turn.give_back(list(turn.running))
                    return
                except asyncio.CancelledError:
                    if number not in self._interrupted or task.uncancel():
                        raise
                    self.released.extend(turn.running)
                else:
                    if number in self._interrupted:
                        task.uncancel()  # too late: it had ended
                finally:
                    self._running.pop(number, None)  # a parked slot does not run
                    self._interrupted.discard(number)
                    self._on_change()
                if task.cancelling():
                    raise asyncio.CancelledError
        finally:
            self._alive -= 1
            if turn in self._parked:
                self._parked.remove(turn)
            await slot.close()

    def _next_claims(self) -> list[Claim]:
        many = share(len(self.ready), self.concurrency, self.mean) if self._executor.takes_many else 1
        return [self.ready.popleft() for _ in range(many)]

    # What turns report

    def end(self, claim: Claim, outcome: Outcome) -> None:
        """Take an outcome."""
        # Believe quickly that evaluations are long, and slowly that they are short.
        self.mean += (outcome.duration - self.mean) * (0.1 if outcome.duration < self.mean else 0.3)
        self._on_end(claim, outcome)

    def put_back(self, claims: Sequence[Claim]) -> None:
        """Take claims back that have not started, to be run before all others."""
        if self._held_back:
            self.released.extend(claims)
        else:
            self.ready.extendleft(reversed(claims))
        self._unpark()
        self._wake(len(self.ready))
        self._on_change()

    def one_more(self, number: int) -> Claim | None:
        """Return the next claim for a slot that has ended what it had, if there is one for it."""
        if not self.ready or self.is_closing or number in self._interrupted or len(self._running) > self.concurrency:
            return None
        return self.ready.popleft()

    def park(self, turn: _Turn) -> bool:
        """Keep a free slot for the next claim; return False if it shall end its work instead."""
        if self.is_closing or turn.number in self._interrupted or len(self._running) > self.concurrency:
            return False
        del self._running[turn.number]
        self._parked.append(turn)
        self._on_change()
        return True


class _Turn(Work):
    """What one slot runs."""

    __slots__ = ("_slots", "claims", "go_on", "number", "running", "task", "timeout")

    def __init__(self, slots: Slots, number: int, task: asyncio.Task[None], timeout: float | None) -> None:
        self._slots = slots
        self.number = number
        self.task = task
        self.timeout = timeout
        self.claims: Sequence[Claim] = ()
        self.running: list[Claim] = []  # those that have not ended
        self.go_on: Callable[[Claim | None], None] = _nothing_to_do

    def begin(self, claims: list[Claim]) -> None:
        """Begin with these."""
        self.claims, self.running = claims, claims.copy()

    def ended(self, claim: Claim, outcome: Outcome) -> None:
        self.running.remove(claim)
        self._slots.end(claim, outcome)

    def give_back(self, claims: Sequence[Claim]) -> None:
        for claim in claims:
            self.running.remove(claim)
        self._slots.put_back(claims)

    def more(self) -> Claim | None:
        claim = self._slots.one_more(self.number)
        if claim is not None:
            self.running.append(claim)
        return claim

    def park(self, go_on: Callable[[Claim | None], None]) -> bool:
        self.go_on = go_on
        return self._slots.park(self)


def _nothing_to_do(claim: Claim | None) -> None:
    """Stand for a slot that is not parked."""
