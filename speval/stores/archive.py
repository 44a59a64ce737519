"""A whole database as a stream, on its way from one store to another.

Owns the contract of copying. Invariant: what is read is one moment of the source, and what is written is there as a whole or
not at all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from sys import getsizeof
from typing import NamedTuple, TypeVar

from ..model import Settings
from .rows import PAGE_SIZE, Damaged

__all__ = ["Archive", "Content", "Counts", "StoredAttempt", "StoredEvaluation", "StoredWorker", "pieces"]

_AT_ONCE = 1000  # rows of one piece

T = TypeVar("T")
R = TypeVar("R", bound="tuple[object, ...]")


class StoredEvaluation(NamedTuple):
    """An evaluation and how it stands; its status is ``pending``, ``completed`` or ``failed``, as nobody holds it in a copy."""

    id: int
    name: str
    args: str
    status: int  # 0, 2 or 3
    attempt: int
    released: int
    forgiven: int
    is_suspect: bool
    last: int | None  # number of the last attempt that ended
    updated_at: float


class StoredAttempt(NamedTuple):
    """An attempt that ended."""

    seq: int
    evaluation: int
    attempt: int
    worker: int | None
    started_at: float | None
    duration: float | None
    ended_at: float
    outcome: str
    result: str | None
    error_type: str | None
    error_message: str | None
    error_traceback: str | None


class StoredWorker(NamedTuple):
    """A worker, as whoever made an attempt; in a copy it has left."""

    id: int
    host: str
    pid: int
    machine: str
    start: str
    lease: float
    started_at: float
    last_seen: float
    ended_at: float


class Counts(NamedTuple):
    """How much was copied."""

    evaluations: int
    attempts: int


@dataclass(frozen=True, slots=True)
class Content:
    """All that is in a database; each of the iterators is read once, to its end, in this order.

    Attributes:
        settings: What is set for all workers.
        workers: In no order.
        attempts: In the order of their numbers.
        evaluations: In the order of their ids.
    """

    settings: Settings
    workers: Iterator[StoredWorker]
    attempts: Iterator[StoredAttempt]
    evaluations: Iterator[StoredEvaluation]


def pieces(rows: Iterable[R]) -> Iterator[list[R]]:
    """Yield rows in lists that are bounded in number and in the text that they hold."""
    piece: list[R] = []
    size = 0
    for row in rows:
        piece.append(row)
        size += sum(getsizeof(value) for value in row if type(value) is str)
        if len(piece) == _AT_ONCE or size > PAGE_SIZE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


class Archive(ABC):
    """A database that is read or filled as a whole: blocking, opened when it is made.

    Attributes:
        damaged: What was found not to be as it was written, and left out of what is read; an evaluation of which only the
            result is damaged is pending there. Closing the archive warns of it.
    """

    damaged: Damaged

    @abstractmethod
    def read(self, work: Callable[[Content], T]) -> T:
        """Run ``work`` with all that is in the database at one moment, and return what it returns."""

    @abstractmethod
    def fill(self, content: Content) -> Counts:
        """Store everything, in one transaction.

        Raises:
            DatabaseNotEmptyError: there is something in it already; nothing was changed.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""
