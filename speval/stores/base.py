"""What a store does for a worker, whatever it keeps its evaluations in.

Owns the contract between the engine and its stores; the docstrings here are that contract. Invariant: every write
about an attempt carries its fencing token, and what a method has returned is durable.
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

StoreMode = Literal["create", "write", "read"]  # make it if it is missing; it must be there; change nothing


class Ended(NamedTuple):
    """An attempt that has ended and waits to be recorded."""

    claim: Claim
    outcome: Outcome
    again: bool  # hold it for another attempt instead of failing it


@dataclass(frozen=True, slots=True)
class Seeded:
    """What seeding an eval space found; counts of evaluations."""

    new: int
    unchanged: int
    changed: int
    gone: int  # stored, but not in this eval space


@dataclass(frozen=True, slots=True)
class Record:
    """What a worker has to write, and what it wants.

    Attributes:
        worker: Its id.
        ended: Attempts to record, whatever the worker id of their claim.
        released: Claims to give back unused; no attempt is charged.
        due: Claims whose backoff is over: any worker may claim them now.
        idle: Claims wanted for slots that are free.
        ahead: Claims wanted besides, to be started soon. Only evaluations without an earlier attempt are given for it. One that
            its worker dies with is not charged the first time, and not claimed ahead again: an evaluation that kills its
            worker can't use up the attempts of others that never started.
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
    """What one ``record`` did.

    Attributes:
        refused: The attempts among the ended ones whose token was stale; nothing was written about them.
        claims: The new claims, in eval-space order.
        lost: The worker has been declared dead; it must register anew before it can claim.
        open: Whether an evaluation of the space is still neither completed nor failed; None when not looked up,
            which is so as long as there was something to claim.
        failures: Evaluations of the space that failed since ``seed``, whoever recorded them; None when not asked for.
        settings: What is set for all workers; while they are paused, there are no claims.
    """

    refused: list[Claim] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    lost: bool = False
    open: bool | None = None
    failures: int | None = None
    settings: Settings = _NOTHING_SET


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """What was taken back from dead workers.

    Attributes:
        workers: The dead ones, as people read them.
        pending: Evaluations that are pending again.
        failed: Names of those that had no attempt left and failed.
    """

    workers: list[str] = field(default_factory=list)
    pending: int = 0
    failed: list[str] = field(default_factory=list)


@dataclass(slots=True)
class TakenIn:
    """What became of results that an earlier run could not record.

    Attributes:
        recorded: The attempts recorded now.
        known: Those that were recorded already.
        waits: Those that can't be recorded now and may be later, with the reason.
        refused: Those that never can, with the reason.
    """

    recorded: list[Claim] = field(default_factory=list)
    known: list[Claim] = field(default_factory=list)
    waits: list[tuple[Claim, str]] = field(default_factory=list)
    refused: list[tuple[Claim, str]] = field(default_factory=list)


class LeaseKeeping(ABC):
    """The part of a store that one worker's lease thread uses: blocking, with a connection of its own."""

    @abstractmethod
    def renew(self, worker: int, patience: float) -> bool:
        """Prove that the worker lives.

        Args:
            worker: Its id.
            patience: Seconds to keep trying while others hold the database.

        Returns:
            False if the worker has been declared dead; its claims are no longer its own then.
        """

    @abstractmethod
    def reclaim(self, worker: int, max_attempts: int) -> Reclaimed:
        """Take back what dead workers hold, a bounded number at a time.

        A worker is dead when its process on this machine is gone, or when its beat has stood still for its whole lease
        as watched by this object on its own monotonic clock.
        """

    @abstractmethod
    def forget(self) -> None:
        """Start all watching anew, after a time in which this machine itself stood still."""

    @abstractmethod
    def give_up(self) -> None:
        """Make a call that waits for others fail soon; callable from any thread."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""


class Store(ABC):
    """Evaluations of one database, used by one worker or reader.

    Every method may be cancelled: what it had begun is then either done or undone, and no lock stays behind.

    Attributes:
        damaged: What was found not to be as it was written, and left out; closing the store warns of it.
    """

    damaged: Damaged

    @property
    @abstractmethod
    def shown(self) -> str:
        """Return the database as messages name it."""

    @property
    @abstractmethod
    def beside(self) -> Path:
        """Return the path that files are named after which belong to the database and lie outside of it."""

    @abstractmethod
    async def open(self) -> None:
        """Open the database; nothing else may be called before.

        Raises:
            DatabaseError: it can't be used; it is as it was.
        """

    @abstractmethod
    async def seed(self, space: Space, on_changed: OnChanged) -> Seeded:
        """Add what is new in the space; later calls speak of the evaluations of this space only.

        Idempotent, also when many do it at once. Nothing is written before the whole space has been compared.

        Raises:
            ArgsChangedError: evaluations are stored with other args and ``on_changed`` is "error".
        """

    @abstractmethod
    async def follow(self) -> None:
        """Make the space all that is stored, now and later; in place of ``seed`` for a space that is drawn bit by bit."""

    @abstractmethod
    async def extend(self, rows: Sequence[tuple[Key, str]], on_changed: OnChanged) -> Seeded:
        """Add those of a few evaluations whose names are not stored yet, in one transaction.

        Args:
            rows: Keys and args as JSON text; no key comes twice.
            on_changed: What to do about names that are stored with other args, as ``seed`` does it.

        Raises:
            ArgsChangedError: evaluations are stored with other args and ``on_changed`` is "error"; none was added.
        """

    @abstractmethod
    async def register(self, lease: float) -> int:
        """Enter a worker and return its id; its lease runs from now, for ``lease`` seconds."""

    @abstractmethod
    def lease_keeping(self) -> LeaseKeeping:
        """Return what the worker's lease thread needs."""

    @abstractmethod
    async def record(self, record: Record) -> Recorded:
        """Record attempts that ended, give claims back and take new ones, all in one transaction.

        With nothing to write and nothing wanted, it only looks: at the settings, and whether an evaluation is still open.
        """

    @abstractmethod
    async def take_in(self, ended: Sequence[Ended]) -> TakenIn:
        """Record what an earlier run could not, in one transaction; each attempt once, however often it is handed in.

        An attempt is recorded when its evaluation, found by its name, has the same args, is not completed, and no living worker
        holds it under another token. A number that is taken by now is replaced by the next one.
        """

    @abstractmethod
    async def leave(self, worker: int) -> None:
        """Give back all the worker still holds, charging nothing, and end it."""

    @abstractmethod
    async def changed(self) -> bool:
        """Tell whether anybody else has written since the last call; cheap enough to ask many times a second."""

    @abstractmethod
    async def ended_since(self, cursor: int, limit: int) -> tuple[int, list[tuple[int, Evaluation]]]:
        """Return evaluations of the space that ended after the cursor, in the order they ended.

        Args:
            cursor: 0 for the beginning, else what the last call returned.
            limit: How many at most.

        Returns:
            The next cursor and pairs of (id, evaluation). An evaluation that ended, was put back and ended again comes
            again.
        """

    @abstractmethod
    async def summary(self, *, at_end: bool = False) -> Summary:
        """Count the evaluations of the space by status, and the failed ones by cause.

        Args:
            at_end: Look for the attempts of the ended ones as well, as far as that is cheap: an evaluation without its attempt
                is not counted then.
        """

    @abstractmethod
    async def close(self) -> None:
        """Close the connection; whatever a cancelled call had begun is ended first."""

    @abstractmethod
    def abandon(self) -> None:
        """Let go at once without waiting for anything, for the second Ctrl-C; callable from any thread."""
