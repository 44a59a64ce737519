"""The clocks, in one object that tests can replace.

Owns all reading of clocks. Invariant: decisions use only ``monotonic()``; ``wall()`` is for display.
"""

from __future__ import annotations

import time

__all__ = ["Clock"]


class Clock:
    """The clocks of the system. Tests pass a clock that they can move."""

    def monotonic(self) -> float:
        """Return seconds that never go back; on Linux they stop while the machine is suspended."""
        return time.monotonic()

    def wall(self) -> float:
        """Return unix seconds, for display only."""
        return time.time()

    def boottime(self) -> float:
        """Return seconds that continue while the machine is suspended, if the system has such a clock."""
        if hasattr(time, "CLOCK_BOOTTIME"):
            return time.clock_gettime(time.CLOCK_BOOTTIME)
        return time.monotonic()
