"""Detecting dead workers and reclaiming their evaluations: the part that all stores share.

Owns the decision, from rows and the time alone. Invariant: a worker is never declared dead by comparing two clocks.
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

_SILENCE = 60.0  # seconds without a new beat before a warning
_BOUND = 1000  # evaluations reclaimed in one transaction
_LOOKS = 10.0  # checks per second of all workers together
_FEW = 16  # up to this many workers, each checks with every beat


class WorkerRow(NamedTuple):
    """The row of another worker."""

    id: int
    process: Process
    lease: float
    beat: int
    dead: bool  # it was declared dead, and reclaiming its evaluations may be unfinished


@dataclass(slots=True)
class _Sight:
    beat: int
    since: float  # monotonic seconds
    is_told: bool = False  # whether the warning was logged


class Watch:
    """Decides which workers are dead, from rows and the time alone.

    Args:
        machine: This machine, as in ``Process.machine``.
    """

    def __init__(self, machine: str) -> None:
        self._machine = machine
        self._sights: dict[int, _Sight] = {}
        self._living: list[WorkerRow] = []  # at the last check
        self._next_look = 0.0  # monotonic

    def is_due(self, me: int, now: float) -> bool:
        """Tell whether to read the rows of the other workers again.

        The more workers there are, the less often each one checks, but at the latest when a lease can have expired. That is
        at most one check per lease and worker, a third of the renewals. A process that has ended on this machine
        makes a check due at once.
        """
        return now >= self._next_look or bool(gone_here(self._living, me, self._machine))

    def dead(self, rows: list[WorkerRow], me: int, now: float) -> list[WorkerRow]:
        """Return those of the rows that are certainly dead.

        Args:
            rows: All other workers that have not ended, ordered by id.
            me: The id of this worker.
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
        # Reclaiming may fail because of a lock; then the next beat tries again.
        self._next_look = now if dead else min(now + pause(len(self._living)), min(expiries, default=now))
        return dead

    def _stands_still(self, row: WorkerRow, now: float) -> bool:
        sight = self._sights.get(row.id)
        if sight is None or sight.beat != row.beat:
            self._sights[row.id] = _Sight(row.beat, now)
            return False
        # min() would not limit a NaN.
        bounded = row.lease if row.lease <= LONGEST_LEASE else LONGEST_LEASE
        waited = now - sight.since
        if waited >= bounded:
            return True
        if not sight.is_told and waited >= (max(_SILENCE, bounded / 2) if bounded == row.lease else _SILENCE):
            sight.is_told = True
            text = (
                "worker %s has not renewed its lease for %.0f s; its evaluations are reclaimed when the lease of %.0f s expires"
            )
            logger.warning(text, worker_label(row.id, row.process.host, row.process.pid), waited, bounded)
        return False

    def forget(self) -> None:
        """Start watching all workers anew."""
        self._sights.clear()
        self._next_look = 0.0


def pause(living: int) -> float:
    """Return the seconds until the next check of one worker among ``living``."""
    return living / _LOOKS * random.uniform(0.5, 1.5) if living > _FEW else 0.0


def gone_here(rows: Iterable[WorkerRow], me: int, machine: str) -> list[WorkerRow]:
    """Return the workers after this one in id order, up to the first live one, whose process on this machine is gone."""
    # If every worker checked every process, the cost would grow with the square of their number. So each worker checks
    # the following ids up to the next live worker, and every dead worker is found by one of them.
    dead = []
    for row in sorted((row for row in rows if row.process.machine == machine), key=lambda row: (row.id < me, row.id)):
        if not is_gone(row.process, machine):
            break
        dead.append(row)
    return dead


def unknown_label(holder: object) -> str:
    """Return the display name of a worker without a row."""
    return f"?:?:{holder:012x}" if isinstance(holder, int) else f"?:?:{holder!r}"


class Taken(NamedTuple):
    """What one transaction has reclaimed."""

    more: bool  # whether the same holder has more evaluations to reclaim
    pending: int
    failed: list[str]  # names


class Reclaiming(LeaseKeeping):
    """Reclaims in several short transactions, so that other workers never wait long."""

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
        """Return the dead workers, and the orphaned holders: ids in claims that no active worker has."""

    @abstractmethod
    def take_back(self, row: WorkerRow, max_attempts: int, bound: int) -> Taken | None:
        """Declare a worker dead and reclaim up to ``bound`` evaluations; None if it has renewed or left in the meantime."""

    @abstractmethod
    def take_back_orphaned(self, holder: object, max_attempts: int, bound: int) -> Taken | None:
        """Reclaim up to ``bound`` evaluations of an orphaned holder; None if an active worker has this id."""


def _take_all_back(reclaimed: Reclaimed, label: str, take_back: Callable[[], Taken | None]) -> int:
    """Reclaim all evaluations of a holder; return how many are pending again."""
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
