"""The interface that a worker uses, for every kind of database.

Owns the contract between the engine and its stores; the docstrings here are that contract. Invariant: every write about an
attempt carries its fencing token, and a write is durable when the method returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from ..model import (
    Claim,
    Evaluation,
    OnChanged,
    Outcome,
    Settings,
    Summary,
)
from ..spaces.eager import Key, Space
from .rows import Damaged

__all__ = [
    "Ended",
    "LeaseKeeping",
    "Reclaimed",
    "Record",
    "Recorded",
    "Seeded",
    "Store",
    "StoreMode",
    "TakenIn",
]

StoreMode = Literal["create", "write", "read"]  # create it if it is missing; it must exist; only read


class Ended(NamedTuple):
    """An attempt that has ended and waits to be recorded."""

    claim: Claim
    outcome: Outcome
    again: bool  # another attempt follows: hold the evaluation instead of failing it


@dataclass(frozen=True, slots=True)
class Seeded:
    """The result of seeding an eval space: counts of evaluations."""

    new: int
    unchanged: int
    changed: int
    gone: int  # stored, but not in this eval space


@dataclass(frozen=True, slots=True)
class Record:
    """What a worker writes, and how many claims it wants.

    Attributes:
        worker: Its id.
        ended: Attempts to record; their claims may belong to an earlier id of this worker.
        released: Claims to release; no attempt is charged.
        due: Claims whose backoff is over: any worker may claim them now.
        idle: The number of claims wanted for idle slots.
        ahead: The number of claims wanted ahead, to start soon. Only evaluations without an earlier attempt are claimed ahead.
            If the worker dies, such an evaluation is not charged the first time, and is not claimed ahead again: an evaluation
            that kills its worker can't use up the attempts of others that never started.
        count_failures: Whether to count the failures so far.
    """

    worker: int
    ended: Sequence[Ended] = ()
    _: KW_ONLY
    released: Sequence[Claim] = ()
    due: Sequence[Claim] = ()
    idle: int = 0
    ahead: int = 0
    count_failures: bool = False


_NOTHING_SET = Settings()


@dataclass(slots=True)
class Recorded:
    """The result of one ``record``.

    Attributes:
        refused: Ended attempts with a stale token; nothing was written about them.
        claims: The new claims, in eval-space order.
        lost: The worker has been declared dead; it must register again before it can claim.
        open: Whether an evaluation of the space is still pending or in progress; None if this was not checked, because there
            was something to claim.
        failures: Evaluations of the space that failed since ``seed``, recorded by any worker; None if not requested.
        settings: The settings for all workers; while paused, there are no claims.
    """

    refused: list[Claim] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    lost: bool = False
    open: bool | None = None
    failures: int | None = None
    settings: Settings = _NOTHING_SET


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """What was reclaimed from dead workers.

    Attributes:
        workers: The display names of the dead workers.
        pending: The number of evaluations that are pending again.
        failed: The names of evaluations that had no attempt left and failed.
    """

    workers: list[str] = field(default_factory=list)
    pending: int = 0
    failed: list[str] = field(default_factory=list)


@dataclass(slots=True)
class TakenIn:
    """What happened to the results from side files.

    Attributes:
        recorded: Attempts recorded now.
        known: Attempts that were already recorded.
        waits: Attempts that can't be recorded now but perhaps later, with the reason.
        refused: Attempts that can never be recorded, with the reason.
    """

    recorded: list[Claim] = field(default_factory=list)
    known: list[Claim] = field(default_factory=list)
    waits: list[tuple[Claim, str]] = field(default_factory=list)
    refused: list[tuple[Claim, str]] = field(default_factory=list)


class LeaseKeeping(ABC):
    """The part of a store for the lease thread of one worker. Methods block; it may have a separate connection."""

    @abstractmethod
    def renew(self, worker: int, patience: float) -> bool:
        """Renew the lease of the worker.

        Args:
            worker: Its id.
            patience: Seconds to retry while other programs lock the database.

        Returns:
            False if the worker has been declared dead; its claims are then no longer valid.
        """

    @abstractmethod
    def reclaim(self, worker: int, max_attempts: int) -> Reclaimed:
        """Reclaim the evaluations of dead workers, in transactions of bounded size.

        A worker is dead when its process on this machine has ended, or when its lease has expired: its beat has not changed for
        a whole lease on the monotonic clock of this object, or the server clock says so.
        """

    @abstractmethod
    def forget(self) -> None:
        """Start watching all workers anew, after this machine was suspended."""

    @abstractmethod
    def give_up(self) -> None:
        """Make a waiting call fail soon; callable from any thread."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""


class Store(ABC):
    """The evaluations of one database, for one worker.

    Every method may be cancelled: its transaction is then committed or rolled back, and no lock remains.

    Attributes:
        damaged: Damaged evaluations, which reading skips; closing the store logs a warning about them.
    """

    damaged: Damaged

    @property
    @abstractmethod
    def shown(self) -> str:
        """Return the display name of the database, for messages."""

    @property
    @abstractmethod
    def beside(self) -> Path:
        """Return the path from which the names of side files are made."""

    @abstractmethod
    async def open(self) -> None:
        """Open the database; call this before any other method.

        Raises:
            DatabaseError: the database can't be used; it was not changed.
        """

    @abstractmethod
    async def seed(self, space: Space, on_changed: OnChanged) -> Seeded:
        """Add the new evaluations of the space; later calls are limited to this space.

        Idempotent, also when many workers do it at once. The whole space is compared before the first write.

        Raises:
            ArgsChangedError: evaluations are stored with different args, and ``on_changed`` is "error".
        """

    @abstractmethod
    async def follow(self) -> None:
        """Make the space of this store everything that is stored, now and later; replaces ``seed`` for a lazy space."""

    @abstractmethod
    async def extend(self, rows: Sequence[tuple[Key, str]], on_changed: OnChanged) -> Seeded:
        """Add a few evaluations whose names are not stored yet, in one transaction.

        Args:
            rows: Keys and args as JSON text; keys are unique.
            on_changed: What to do with names that are stored with different args, as in ``seed``.

        Raises:
            ArgsChangedError: evaluations are stored with different args, and ``on_changed`` is "error"; nothing was added.
        """

    @abstractmethod
    async def register(self, lease: float) -> int:
        """Register a worker and return its id; its lease starts now and lasts ``lease`` seconds."""

    @abstractmethod
    def lease_keeping(self) -> LeaseKeeping:
        """Return the interface for the lease thread of the worker."""

    @abstractmethod
    async def record(self, record: Record) -> Recorded:
        """Record ended attempts, release claims and claim evaluations, all in one transaction.

        With nothing to write and no claims wanted, it only reads the settings and whether an evaluation is still open.
        """

    @abstractmethod
    async def take_in(self, ended: Sequence[Ended]) -> TakenIn:
        """Record results from side files in one transaction; each attempt is recorded once, also when it is passed again.

        An attempt is recorded when its evaluation, found by name, has the same args, is not completed, and is not held by a
        live worker with another token. An attempt number that is already used is replaced by the next one.
        """

    @abstractmethod
    async def leave(self, worker: int) -> None:
        """Release all claims of the worker without charging attempts, and end the worker."""

    @abstractmethod
    async def changed(self) -> bool:
        """Tell whether another worker may have written since the last call; cheap enough to call many times a second."""

    @abstractmethod
    async def ended_since(self, cursor: int, limit: int) -> tuple[int, list[tuple[int, Evaluation]]]:
        """Return evaluations of the space that ended after the cursor, in the order of their ends.

        Args:
            cursor: 0 for the beginning, or the cursor that the last call returned.
            limit: The maximum number.

        Returns:
            The next cursor and pairs of (id, evaluation). An evaluation that ends again after a retry is returned again.
        """

    @abstractmethod
    async def summary(self, *, at_end: bool = False) -> Summary:
        """Count the evaluations of the space by status, and the failed ones by cause.

        Args:
            at_end: Also check that ended evaluations still have their attempts, if that is cheap; an evaluation without its
                attempt is not counted.
        """

    @abstractmethod
    async def close(self) -> None:
        """Close the connection, after the transaction of a cancelled call has ended."""

    @abstractmethod
    def abandon(self) -> None:
        """Abandon all work at once without waiting, for the second Ctrl-C; callable from any thread."""
