"""Checksums of rows.

Owns what they cover. Invariant: a checksum covers the whole row and its id, so a value that has changed, or that is in
another row, is detected; also values that are only for display, such as times.
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
        start = crc32(_NUMBERS(seq, evaluation, attempt, worker, started_at, duration, ended_at))
    except (error, OverflowError):  # the worker or the times are unknown, or the file was edited
        start = crc32(repr((seq, evaluation, attempt, worker, started_at, duration, ended_at)).encode())
    if type_ is None and outcome == "completed" and type(result) is str:  # nearly every row
        return crc32(result.encode(), start)
    return crc32(f"{outcome}\t{result}\t{type_}\t{message}\t{traceback}".encode(), start)
