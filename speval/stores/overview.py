"""A whole database at one moment, put together from what a store reads.

Owns how counts, workers, failures and the rate become an ``Overview``. Invariant: everything comes from one transaction, and
its cost does not depend on how many evaluations have ended, but for counting them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..host import Process, is_gone
from ..model import Cause, Failure, Overview, Running, Settings, WorkerState, WorkerView
from .rows import label_of, worker_label

__all__ = ["Holding", "Look", "StatusCounts", "WorkerRow", "look_at"]

_WINDOW = 60.0  # seconds over which a rate is taken
_FEWEST = 10  # attempts over which a rate is taken when the window holds fewer
_BEGUN = 1.0  # seconds after which what was claimed ahead has begun or been given back


class StatusCounts(NamedTuple):
    """Evaluations by status, and how many there are in all."""

    pending: int
    in_progress: int
    failed: int
    total: int


class WorkerRow(NamedTuple):
    """A worker that has not ended, as a row has it."""

    id: int
    host: str
    pid: int
    machine: str
    start: str
    lease: float
    dead: bool
    started_at: float
    last_seen: float
    is_silent: bool  # no sign of life for its lease


class Holding(NamedTuple):
    """How many evaluations a worker runs, has claimed, and holds for their backoff."""

    running: int
    claimed: int
    held: int


_NOTHING = Holding(0, 0, 0)


class Look(ABC):
    """One transaction that reads what an overview is made of."""

    @abstractmethod
    def counts(self) -> StatusCounts:
        """Count the evaluations."""

    @abstractmethod
    def causes(self) -> dict[Cause, int]:
        """Count the failed evaluations by cause."""

    @abstractmethod
    def settings(self) -> Settings:
        """Return what is set for all workers."""

    @abstractmethod
    def workers(self, now: float) -> list[WorkerRow]:
        """Return the workers that have not ended, the oldest first.

        Args:
            now: Unix seconds, for stores whose workers are judged by this machine's clock.
        """

    @abstractmethod
    def holdings(self, begun: float) -> dict[int, Holding]:
        """Return what each worker holds, by its id.

        Args:
            begun: Unix seconds: what was claimed ahead before is running.
        """

    @abstractmethod
    def runs(self, worker: int, begun: float, limit: int) -> list[Running]:
        """Return some evaluations that a worker runs, the longest running first."""

    @abstractmethod
    def failures(self, limit: int) -> list[Sequence[Any]]:
        """Return the last failed evaluations, the newest first.

        Returns:
            Rows of name, cause, type, message, attempts, end, and id, host and pid of the worker.
        """

    @abstractmethod
    def newest(self) -> int:
        """Return the number of the last attempt that ended, or 0."""

    @abstractmethod
    def next_end(self, seq: int) -> tuple[int, float]:
        """Return the number and the end of the first attempt from a number on; there is one."""

    @abstractmethod
    def end_before(self, seq: int, count: int) -> float | None:
        """Return when the attempt ended that comes so many before one, or None if there are fewer."""


def look_at(look: Look, now: float, machine: str, failures: int, runs: int) -> Overview:
    """Return the overview of a database.

    Args:
        look: The transaction to read in.
        now: Unix seconds.
        machine: This machine, whose processes can be looked for.
        failures: How many of the last failed evaluations to name.
        runs: How many of what each worker runs to name.
    """
    counts = look.counts()
    workers = _workers(look, now, machine, runs)
    return Overview(
        at=now,
        pending=counts.pending,
        in_progress=counts.in_progress,
        completed=counts.total - counts.pending - counts.in_progress - counts.failed,
        failed=counts.failed,
        causes=look.causes(),
        rate=_rate(look, workers, now),
        settings=look.settings(),
        workers=workers,
        failures=tuple(
            Failure(str(name), cause, str(type_ or ""), str(message or ""), attempts, float(ended_at), label_of(worker))
            for name, cause, type_, message, attempts, ended_at, *worker in look.failures(failures)
        ),
    )


def _workers(look: Look, now: float, machine: str, runs: int) -> tuple[WorkerView, ...]:
    begun = now - _BEGUN
    holdings = look.holdings(begun)
    views = []
    for w in look.workers(now):
        holding = holdings.get(w.id, _NOTHING)
        state: WorkerState = "alive"
        if w.dead or is_gone(Process(w.host, w.pid, w.machine, w.start), machine):
            state = "dead"
        elif w.is_silent:
            state = "silent"
        views.append(
            WorkerView(
                worker=worker_label(w.id, w.host, w.pid),
                host=w.host,
                pid=w.pid,
                state=state,
                started_at=float(w.started_at),
                last_seen=w.last_seen,
                ended_at=None,
                lease=w.lease,
                runs=tuple(look.runs(w.id, begun, runs)) if holding.running else (),
                running=holding.running,
                ahead=holding.claimed - holding.running,
                held=holding.held,
            )
        )
    return tuple(views)


def _rate(look: Look, workers: Sequence[WorkerView], now: float) -> float | None:
    """Return how many attempts end per second; attempts are nearly in the order of their ends, so a few of them tell."""
    alive = [worker.started_at for worker in workers if worker.state == "alive"]
    newest = look.newest()
    if not alive or not newest:
        return None
    began = min(alive)
    since = max(began, now - _WINDOW)
    count = newest + 1 - _first_after(look, since, newest)
    if count < _FEWEST:
        earlier = look.end_before(newest, _FEWEST)
        since = began if earlier is None else max(began, earlier)
        count = newest + 1 - _first_after(look, since, newest)
    return count / max(now - since, 1e-3) if count else None


def _first_after(look: Look, moment: float, newest: int) -> int:
    """Return the number of the first attempt that ended after a moment."""
    low, high = 1, newest + 1
    while low < high:
        middle = (low + high) // 2
        seq, ended_at = look.next_end(middle)
        if ended_at > moment:
            high = middle
        else:
            low = seq + 1
    return low
