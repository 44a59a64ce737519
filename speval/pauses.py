"""Pauses between one try and the next.

Owns how long to wait before something is tried again that others may be in the way of. Invariant: no pause is longer than the
longest one asked for, and each is random, so callers that fail together do not try again together.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

__all__ = ["pauses"]


def pauses(first: float, longest: float, *, growth: float = 2.0, spread: float = 0.5) -> Iterator[float]:
    """Yield the seconds to wait, without end.

    Args:
        first: The longest that the first pause may be.
        longest: The longest that any pause may be.
        growth: Each pause may be so many times as long as the one before it.
        spread: The part of each pause that is random.
    """
    most = min(first, longest)
    while True:
        yield most * random.uniform(1 - spread, 1)
        most = min(most * growth, longest)
