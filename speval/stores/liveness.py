"""Which workers are dead, and taking back what they hold, as far as it is the same in every store.

Owns the verdict, from rows and the time alone. Invariant: nobody is declared dead by comparing two clocks.
"""

from __future__ import annotations

import logging
import random
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from ..host import Process, is_gone
from ..model import LONGEST_LEASE
from .base import LeaseKeeping, Reclaimed
from .rows import worker_label

__all__ = ["Reclaiming", "Taken", "Watch", "WorkerRow", "gone_here", "pause", "unknown_label"]

logger = logging.getLogger("speval.lease")

_SILENCE = 60.0  # seconds of standing still before that is said
_BOUND = 1000  # evaluations taken back in one transaction
_LOOKS = 10.0  # looks per second of all workers together
_FEW = 16  # workers that may all look at each beat


class WorkerRow(NamedTuple):
    """Another worker, as its row says."""

    id: int
    process: Process
    lease: float
    beat: int
    dead: bool  # somebody has declared it dead and was perhaps interrupted in taking back what it held


@dataclass(slots=True)
class _Sight:
    beat: int
    since: float  # monotonic seconds
    is_told: bool = False  # that it stands still for long


class Watch:
    """Decides which workers are dead, from rows and the time alone.

    Args:
        machine: The machine we are on, as ``Process.machine`` says.
    """

    def __init__(self, machine: str) -> None:
        self._machine = machine
        self._sights: dict[int, _Sight] = {}
        self._living: list[WorkerRow] = []  # as they were at the last look
        self._next_look = 0.0  # monotonic

    def is_due(self, me: int, now: float) -> bool:
        """Tell whether to read the rows of the others again.

        Each worker looks the less often, the more there are, but as soon as a beat can have stood still for a lease: at most
        once a lease for each, which is a third of the renewals. Meanwhile a process gone on this machine makes a look due.
        """
        return now >= self._next_look or bool(gone_here(self._living, me, self._machine))

    def dead(self, rows: list[WorkerRow], me: int, now: float) -> list[WorkerRow]:
        """Return those of the rows that are certainly dead.

        Args:
            rows: All other workers that have not ended, ordered by id.
            me: Our own id.
            now: Monotonic seconds.
        """
        dead = [row for row in rows if row.dead or self._stands_still(row, now)]
        self._sights = {row.id: self._sights[row.id] for row in rows if row.id in self._sights}
        told = {row.id for row in dead}
        living = [row for row in rows if row.id not in told]
        dead += gone_here(living, me, self._machine)
        told = {row.id for row in dead}
        self._living = [row for row in living if row.id not in told]
        expiries = (self._sights[row.id].since + row.lease for row in self._living)
        # What a dead one holds may be refused to us for a lock; then the next beat tries again.
        self._next_look = now if dead else min(now + pause(len(self._living)), min(expiries, default=now))
        return dead

    def _stands_still(self, row: WorkerRow, now: float) -> bool:
        sight = self._sights.get(row.id)
        if sight is None or sight.beat != row.beat:
            self._sights[row.id] = _Sight(row.beat, now)
            return False
        # Not min(): a NaN has to be bounded too.
        bounded = row.lease if row.lease <= LONGEST_LEASE else LONGEST_LEASE
        waited = now - sight.since
        if waited >= bounded:
            return True
        if not sight.is_told and waited >= (max(_SILENCE, bounded / 2) if bounded == row.lease else _SILENCE):
            sight.is_told = True
            text = (
                "worker %s shows no sign of life for %.0f s; what it may hold is waited for until its lease of %.0f s is over"
            )
            logger.warning(text, worker_label(row.id, row.process.host, row.process.pid), waited, bounded)
        return False

    def forget(self) -> None:
        """Start all windows anew."""
        self._sights.clear()
        self._next_look = 0.0


def pause(living: int) -> float:
    """Return the seconds until one of so many workers looks again."""
    return living / _LOOKS * random.uniform(0.5, 1.5) if living > _FEW else 0.0


def gone_here(rows: Iterable[WorkerRow], me: int, machine: str) -> list[WorkerRow]:
    """Return those next to us, in the order of ids, whose process on this machine is gone."""
    # Asking the kernel about every process from every process would grow with the square of their number. So each one
    # looks after the next alive one only; whoever is dead in between is found on the way.
    dead = []
    for row in sorted((row for row in rows if row.process.machine == machine), key=lambda row: (row.id < me, row.id)):
        if not is_gone(row.process, machine):
            break
        dead.append(row)
    return dead


def unknown_label(holder: object) -> str:
    """Return how a worker is shown of which there is no row."""
    return f"?:?:{holder:012x}" if isinstance(holder, int) else f"?:?:{holder!r}"


class Taken(NamedTuple):
    """What one transaction has taken back."""

    more: bool  # there is more to take back from the same holder
    pending: int
    failed: list[str]  # names


class Reclaiming(LeaseKeeping):
    """Takes back in several transactions, so that none stops the others for long."""

    def reclaim(self, worker: int, max_attempts: int) -> Reclaimed:
        dead, orphaned = self.look(worker)
        reclaimed = Reclaimed()
        pending = 0
        for row in dead:
            label = worker_label(row.id, row.process.host, row.process.pid)
            pending += _take_all_back(reclaimed, label, partial(self.take_back, row, max_attempts, _BOUND))
        for holder in orphaned:
            label = unknown_label(holder)
            pending += _take_all_back(reclaimed, label, partial(self.take_back_orphaned, holder, max_attempts, _BOUND))
        return Reclaimed(reclaimed.workers, pending, reclaimed.failed)

    @abstractmethod
    def look(self, worker: int) -> tuple[list[WorkerRow], list[object]]:
        """Return who is dead, and who is said to hold something and is none of the workers that have not ended."""

    @abstractmethod
    def take_back(self, row: WorkerRow, max_attempts: int, bound: int) -> Taken | None:
        """Declare a worker dead and take back some of what it holds; None if it has renewed, or left, since we looked."""

    @abstractmethod
    def take_back_orphaned(self, holder: object, max_attempts: int, bound: int) -> Taken | None:
        """Take back some of what is held by nobody; None if there is such a worker after all."""


def _take_all_back(reclaimed: Reclaimed, label: str, take_back: Callable[[], Taken | None]) -> int:
    """Take back all that a holder holds; return how many are pending again."""
    taken = take_back()
    if taken is None:
        return 0
    reclaimed.workers.append(label)
    pending = 0
    while taken is not None:
        pending += taken.pending
        reclaimed.failed.extend(taken.failed)
        taken = take_back() if taken.more else None
    return pending
