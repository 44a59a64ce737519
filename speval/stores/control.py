"""What people do with a database: list, look, retry, pause, set, drop, check.

Owns all of it that does not depend on the kind of database; a store's ``control`` module has the SQL. Invariant: reading takes
no lock that a worker waits for, holds one page of text and one evaluation in memory, and keeps no snapshot between two pages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Self, get_args

from ..clock import Clock
from ..errors import DatabaseError, EvaluationDamagedError, OptionError
from ..escape import shown_number
from ..host import this_process
from ..model import (
    MOST_CONCURRENCY,
    Attempt,
    Cause,
    Compacted,
    Evaluation,
    Finding,
    Health,
    Overview,
    Status,
    WorkerView,
    counted,
)
from ..options import checked_names, checked_status
from .overview import Look, look_at
from .rows import Damaged, fits

__all__ = ["Choice", "Control", "ControlMode", "Facts", "Rows", "holds", "orphaned"]

ControlMode = Literal["write", "read"]
Facts = dict[str, str | int | float | bool | None]
Rows = deque[Sequence[Any]]

_PAGE = 500  # evaluations


class Choice(NamedTuple):
    """Which evaluations are meant: those that fit all that is given."""

    status: Status | None = None
    cause: Cause | None = None
    pattern: str | None = None

    @property
    def is_all(self) -> bool:
        """Return whether every evaluation is meant."""
        return self == _ALL


_ALL = Choice()


class Control(ABC):
    """What people do with one database: blocking, with a connection of its own, opened when it is made.

    It covers the whole database, not one eval space. With the mode "read" it changes nothing and keeps no worker waiting: it
    works while workers write, on what this user may only read, and on what an older release has written. The methods that
    change something need the mode "write". One thread at a time may use it.

    Args:
        shown: The database, as messages name it.
        clock: Where the time comes from.

    Attributes:
        damaged: What was found not to be as it was written. Reading many leaves it out and warns of it; asking for one by its
            name raises an ``EvaluationDamagedError``.
    """

    def __init__(self, shown: str, clock: Clock | None) -> None:
        self.shown = shown
        self.damaged = Damaged(shown)
        self._clock = clock or Clock()
        self._machine = this_process().machine

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.shown!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""

    # Looking

    @abstractmethod
    def overview(self, *, failures: int = 5, runs: int = 5) -> Overview:
        """Look at everything at once, in one short transaction that costs little beside a count of the rows.

        Args:
            failures: How many of the last failed evaluations to name.
            runs: How many of what each worker runs to name.
        """

    def _overview(self, look: Look, failures: int, runs: int) -> Overview:
        return look_at(look, self._clock.wall(), self._machine, failures, runs)

    def evaluations(
        self,
        *,
        status: Status | None = None,
        cause: Cause | None = None,
        pattern: str | None = None,
        limit: int | None = None,
    ) -> Iterator[Evaluation]:
        """Return an iterator over evaluations in eval-space order.

        It reads pages that are bounded in bytes, each in a short transaction, and decodes one evaluation at a time.

        Args:
            status: Only those of this status.
            cause: Only those that failed for this cause.
            pattern: Only those whose whole name fits: ``*`` stands for any text and ``?`` for any one character.
            limit: How many at most.

        Raises:
            OptionError: an argument can't be used.
        """
        choice = _checked(status, cause, pattern)
        if limit is not None and (type(limit) is not int or limit < 0):
            raise OptionError("limit", repr(limit)[:60], "a whole number, 0 or more, or None for all")
        return self._evaluations(choice, limit)

    def _evaluations(self, choice: Choice, limit: int | None) -> Iterator[Evaluation]:
        after: int | None = 0
        left = limit
        try:
            while after is not None and left != 0:
                after, rows = self._page(choice, after, _PAGE if left is None else min(_PAGE, left))
                while rows:
                    evaluation = self._readable(rows.popleft())
                    if evaluation is None or not (choice.pattern is None or fits(choice.pattern, evaluation["name"])):
                        continue
                    left = None if left is None else left - 1
                    yield evaluation
        finally:
            self.damaged.tell()

    def _readable(self, row: Sequence[Any]) -> Evaluation | None:
        """Return the evaluation that a row stands for, or note that it is damaged."""
        try:
            return self._evaluation(row)
        except EvaluationDamagedError as error:
            self.damaged.add(error)
            return None

    @abstractmethod
    def _page(self, choice: Choice, after: int, limit: int) -> tuple[int | None, Rows]:
        """Read the next evaluations of a choice, in one transaction.

        Args:
            choice: Which; rows whose name does not fit the pattern may be among them.
            after: Where the page begins: 0, or what the page before it returned.
            limit: How many rows at most; there are fewer where they hold much text.

        Returns:
            Where the next page begins, or None at the end, and rows for ``_evaluation``.
        """

    @abstractmethod
    def _evaluation(self, row: Sequence[Any]) -> Evaluation:
        """Return the evaluation that a row stands for.

        Raises:
            EvaluationDamagedError: it is not as it was written.
        """

    @abstractmethod
    def evaluation(self, name: str) -> Evaluation:
        """Return one evaluation.

        Raises:
            UnknownNameError: it is not in the database.
        """

    @abstractmethod
    def attempts(self, name: str) -> list[Attempt]:
        """Return all attempts at one evaluation in the order of their numbers, one under way included, last.

        Attempts that were given back unused are not among them.

        Raises:
            UnknownNameError: it is not in the database.
        """

    # Steering

    def set_paused(self, paused: bool) -> None:
        """Ask all workers, also those still to come, to claim nothing, or to go on; they obey with their next claim."""
        self._set("paused", 1 if paused else None)

    def set_concurrency(self, concurrency: int | None) -> None:
        """Ask every worker to run so many evaluations at once, whatever its call was given; None: as it was given."""
        if concurrency is not None:
            is_whole = type(concurrency) is int
            if not is_whole or not 1 <= concurrency <= MOST_CONCURRENCY:
                shown = shown_number(concurrency) if is_whole else repr(concurrency)[:60]
                raise OptionError("concurrency", shown, f"a whole number from 1 to {MOST_CONCURRENCY}")
        self._set("concurrency", concurrency)

    @abstractmethod
    def _set(self, key: str, value: int | None) -> None:
        """Write a setting; None takes it back."""

    def retry(
        self,
        names: Iterable[str] | None = None,
        *,
        status: Status = "failed",
        cause: Cause | None = None,
        pattern: str | None = None,
    ) -> int:
        """Put evaluations back to pending with a fresh attempt budget, in one transaction, and return how many.

        Args:
            names: Which ones; those of another status stay as they are.
            status: ``failed`` or ``completed``.
            cause: Only those that failed for this cause; without names.
            pattern: Only those whose whole name fits; without names.

        Raises:
            UnknownNameError: a name is not in the database; nothing was changed.
        """
        checked_status(status, ("failed", "completed"))
        chosen = checked_names(names)
        choice = _checked(status, cause, pattern)
        if choice != Choice(status):
            if chosen is not None:
                raise OptionError("names", repr(chosen)[:60], "name what to retry, or give a cause or a pattern, and not both")
            chosen = self._names(choice)
        return self._retry(chosen, status)

    @abstractmethod
    def _retry(self, names: list[str] | None, status: Status) -> int:
        """Put back all of a status, or those of them that are named."""

    def drop(
        self,
        names: Iterable[str] | None = None,
        *,
        status: Status | None = None,
        cause: Cause | None = None,
        pattern: str | None = None,
    ) -> int:
        """Forget evaluations with all their attempts, and return how many; a space that has them brings them back as new ones.

        Ids and sequence numbers are never reused, so late writes about a dropped evaluation are rejected. A whole status may
        take several transactions, each complete in itself; everything else is one.

        Args:
            names: Which ones.
            status: Else all of this status; not ``in_progress``.
            cause: Else all that failed for this cause.
            pattern: Else all whose whole name fits.

        Raises:
            UnknownNameError: a name is not in the database; nothing was changed.
            InProgressError: one of them is in progress; nothing was changed.
        """
        chosen = checked_names(names)
        choice = _checked(status, cause, pattern)
        if (chosen is None) == choice.is_all:
            shown = repr(chosen)[:60]
            raise OptionError("names", shown, "name what to drop, or give a status, a cause or a pattern, and not both")
        if status == "in_progress":
            raise OptionError("status", repr(status), "what a worker runs can't be dropped; stop the worker first")
        if chosen is None and status is not None and choice == Choice(status):
            return self._drop_status(status)
        return self._drop_names(self._names(choice) if chosen is None else chosen)

    def _names(self, choice: Choice) -> list[str]:
        return [evaluation["name"] for evaluation in self._evaluations(choice, None)]

    @abstractmethod
    def _drop_names(self, names: list[str]) -> int:
        """Drop what is named, all of it or nothing."""

    @abstractmethod
    def _drop_status(self, status: Status) -> int:
        """Drop all of a status, a bounded number in each transaction."""

    @abstractmethod
    def compact(self) -> Compacted:
        """Give back room that nothing needs any more, and forget workers that left and that no attempt names.

        Raises:
            DatabaseError: others are at work that would have to wait for long; nothing was changed.
        """

    # Checking

    def check(self, *, integrity: bool = True) -> Health:
        """Examine the database: how it is stored, what is damaged, which workers are dead.

        Args:
            integrity: Whether to read the whole database for it, which may take a while.
        """
        facts, around = self._outside()
        findings: list[Finding] = []
        try:
            self._inside(facts, findings)
            overview = self.overview(failures=0, runs=0)
            facts |= {"evaluations": overview.total, "workers": sum(w.state == "alive" for w in overview.workers)}
            facts |= {"paused": overview.settings.paused, "concurrency": overview.settings.concurrency}
            findings += [self._lost(worker) for worker in overview.workers if worker.state in ("dead", "silent")]
            if overview.settings.paused:
                findings.append(Finding("it is paused: workers claim nothing", "`speval resume` lets them go on", False))
            if integrity:
                fix = self._damage(facts, findings)
                after: int | None = 0
                while after is not None:
                    after, rows = self._page(_ALL, after, _PAGE)
                    while rows:
                        self._readable(rows.popleft())
                findings += self.damaged.findings(fix)
        except DatabaseError as error:  # then the rest can't be known
            findings.append(Finding(error.problem, self._way_out, True))
        return Health(facts, tuple(sorted(findings + around, key=lambda finding: not finding.is_error)))

    _way_out: str  # what helps where nothing can be read

    @abstractmethod
    def _outside(self) -> tuple[Facts, list[Finding]]:
        """Return what is known without reading the database, and what is wrong around it."""

    @abstractmethod
    def _inside(self, facts: Facts, findings: list[Finding]) -> None:
        """Add how the database is stored, and what is wrong with that."""

    @abstractmethod
    def _damage(self, facts: Facts, findings: list[Finding]) -> str:
        """Add what contradicts itself in the whole database, and return what to do about a damaged evaluation."""

    @abstractmethod
    def _lost(self, worker: WorkerView) -> Finding:
        """Return what to know about a worker that is dead or silent."""


def orphaned(count: int) -> list[Finding]:
    """Return the finding that so many evaluations have no worker, if there are any."""
    if not count:
        return []
    problem = f"{counted(count)} held by no worker"
    return [Finding(problem, "the next copy that is started takes them back", False)]


def holds(worker: WorkerView) -> str:
    """Return how much a worker holds."""
    return counted(worker.running + worker.ahead + worker.held)


def _checked(status: Status | None, cause: Cause | None, pattern: str | None) -> Choice:
    checked_status(status, (None, *get_args(Status)))
    if cause is not None and cause not in get_args(Cause):
        raise OptionError("cause", repr(cause)[:60], f"one of {', '.join(repr(c) for c in get_args(Cause))}")
    if pattern is not None and not isinstance(pattern, str):
        raise OptionError("pattern", repr(pattern)[:60], "a text, in which * stands for any text and ? for any character")
    return Choice(status, cause, pattern)
