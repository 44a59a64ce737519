"""A whole database as a stream, for copying.

Owns the contract of copying. Invariant: reading yields a snapshot of the source, and writing is all or nothing.
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
    """An evaluation with its status: ``pending``, ``completed`` or ``failed``; a copied database has no claims."""

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
    """A worker that made an attempt; in the copied database it has left."""

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
    """The number of copied evaluations and attempts."""

    evaluations: int
    attempts: int


@dataclass(frozen=True, slots=True)
class Content:
    """The content of a database; each iterator is read once, to its end, in this order.

    Attributes:
        settings: The settings for all workers.
        workers: In any order.
        attempts: In the order of their numbers.
        evaluations: In the order of their ids.
    """

    settings: Settings
    workers: Iterator[StoredWorker]
    attempts: Iterator[StoredAttempt]
    evaluations: Iterator[StoredEvaluation]


def pieces(rows: Iterable[R]) -> Iterator[list[R]]:
    """Yield rows in lists; the number of rows and the size of their text are bounded."""
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
    """A database that is read or filled as a whole. Methods block; the constructor opens it.

    Attributes:
        damaged: Damaged evaluations, which reading skips; if only the result is damaged, the evaluation is read as pending.
            Closing the archive logs a warning about them.
    """

    damaged: Damaged

    @abstractmethod
    def read(self, work: Callable[[Content], T]) -> T:
        """Call ``work`` with a snapshot of the database, and return its result."""

    @abstractmethod
    def fill(self, content: Content) -> Counts:
        """Store the whole content in one transaction.

        Raises:
            DatabaseNotEmptyError: the database already has evaluations; nothing was changed.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""
