"""Failures that are alike: logged a few times, then counted.

Owns what the log says of evaluations that fail. Invariant: every failure is either logged in one line or counted in one.
"""

from __future__ import annotations

import logging
import re
from collections import Counter

from ..escape import visible

__all__ = ["Told"]

_FIRST = 10  # lines of one kind
_MOST = 200  # kinds; what comes after them is counted together
_KIND = 200  # characters that tell one kind from another
_NUMBER = re.compile(r"[0-9]+")


class Told:
    """Logs failures; two are alike when their errors differ in numbers only.

    Args:
        logger: Where to.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._counts: Counter[tuple[int, str]] = Counter()

    def say(self, level: int, error: str, text: str, *values: object) -> None:
        """Log one failure, with its error at the end, unless enough of its kind were logged."""
        kind = level, _NUMBER.sub("N", error[:_KIND])
        if kind not in self._counts and len(self._counts) >= _MOST:
            kind = level, "other errors"
        self._counts[kind] += 1
        if self._counts[kind] <= _FIRST:
            self._logger.log(level, text, *values, visible(error))
        elif self._counts[kind] == _FIRST + 1:
            self._logger.log(level, "more errors like this one are counted, and logged at the end: %s", visible(kind[1]))

    def sum_up(self) -> None:
        """Log how many were not told."""
        for (level, kind), number in self._counts.items():
            if number > _FIRST:
                what = "failed alike" if level == logging.ERROR else "were tried again alike"
                self._logger.log(level, "and %d more %s: %s", number - _FIRST, what, visible(kind))
        self._counts.clear()
