"""Claims that wait for their backoff.

Owns how long an evaluation waits for its next attempt, and when the wait is over. Invariant: a claim held stays this worker's
until it is taken as due, or forgotten because the worker has lost it.
"""

from __future__ import annotations

import heapq
import random

from ..clock import Clock
from ..model import Claim

__all__ = ["Held"]

_LONGEST = 60.0  # seconds


class Held:
    """Holds claims until they are due.

    Args:
        backoff: Seconds before the second attempt, doubling with each further one, give or take a fifth.
        clock: Where the time comes from.
    """

    def __init__(self, backoff: float, clock: Clock) -> None:
        self._backoff = backoff
        self._clock = clock
        self._heap: list[tuple[float, int, Claim]] = []  # by the time the backoff is over, monotonic seconds

    def __repr__(self) -> str:
        return f"<Held {len(self._heap)}>"

    @property
    def due_at(self) -> float | None:
        """Return when the first one is due, in monotonic seconds; None if there is none."""
        return self._heap[0][0] if self._heap else None

    def hold(self, claim: Claim) -> float:
        """Hold a claim, and return for how many seconds."""
        doubled = self._backoff * 2.0 ** min(claim.charged - 1, 30)
        seconds = min(_LONGEST, doubled * random.uniform(0.8, 1.2))
        heapq.heappush(self._heap, (self._clock.monotonic() + seconds, claim.id, claim))
        return seconds

    def take_due(self) -> list[Claim]:
        """Return the claims that are due, and hold them no longer."""
        due, now = [], self._clock.monotonic()
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        return due

    def clear(self) -> None:
        """Forget all."""
        self._heap.clear()
