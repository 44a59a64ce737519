"""Checksums of what must never come back as something else.

Owns what goes into them. Invariant: they cover a whole row and its place, so that a value that has changed, or that stands in
another row, is noticed; what only people read of a row, as its times, is covered as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct, error
from typing import Any
from zlib import crc32

__all__ = ["of_attempt", "of_evaluation"]

_NUMBERS = Struct("<qqqqddd").pack


def of_evaluation(id: int, name: object, args: str) -> int:
    """Return the checksum of a row of ``evaluations``."""
    return crc32(f"{name}\t{args}".encode(), id & 0xFFFF_FFFF)


def of_attempt(row: Sequence[Any]) -> int:
    """Return the checksum of a row of ``attempts``, from ``seq`` to ``error_traceback``."""
    seq, evaluation, attempt, worker, started_at, duration, ended_at, outcome, result, type_, message, traceback = row
    try:
        numbers = _NUMBERS(
            seq,
            evaluation,
            attempt,
            -1 if worker is None else worker,
            -1.0 if started_at is None else started_at,
            -1.0 if duration is None else duration,
            ended_at,
        )
    except (error, OverflowError):  # in a file that somebody has tinkered with
        numbers = repr(row[:7]).encode()
    if type_ is None and message is None and traceback is None:
        return crc32(f"{outcome}\t{result}".encode(), crc32(numbers))
    return crc32(f"{outcome}\t{result}\t{type_}\t{message}\t{traceback}".encode(), crc32(numbers))
