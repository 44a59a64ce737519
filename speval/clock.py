"""Time, in one replaceable object.

Owns every question about the time. Invariant: decisions use ``monotonic()`` alone; ``wall()`` is for people to read.
"""

from __future__ import annotations

import time

__all__ = ["Clock"]


class Clock:
    """The system's clocks. Tests hand in one they can move."""

    def monotonic(self) -> float:
        """Return seconds that never step back; on Linux they stand still while the machine is suspended."""
        return time.monotonic()

    def wall(self) -> float:
        """Return unix seconds, for display only."""
        return time.time()

    def boottime(self) -> float:
        """Return seconds that go on while the machine is suspended, where the system has such a clock."""
        if hasattr(time, "CLOCK_BOOTTIME"):
            return time.clock_gettime(time.CLOCK_BOOTTIME)
        return time.monotonic()
