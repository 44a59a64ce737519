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

__all__ = ["RECLAIMED", "Choice", "Control", "ControlMode", "Facts", "Rows", "holds", "orphaned"]

ControlMode = Literal["write", "read"]
Facts = dict[str, str | int | float | bool | None]
Rows = deque[Sequence[Any]]

RECLAIMED = "the next copy that starts reclaims them"
_PAGE = 500  # evaluations


class Choice(NamedTuple):
    """Filters of evaluations; an evaluation is chosen if it matches all of them."""

    status: Status | None = None
    cause: Cause | None = None
    pattern: str | None = None

    @property
    def is_all(self) -> bool:
        """Return whether every evaluation is chosen."""
        return self == _ALL


_ALL = Choice()


class Control(ABC):
    """The operations of users on one database. Methods block; the constructor opens a separate connection.

    It covers the whole database, not one eval space. With the mode "read" it changes nothing and keeps no worker waiting: it
    works while workers write, on what this user may only read, and on what an older release has written. The methods that
    change something need the mode "write". One thread at a time may use it.

    Args:
        shown: The database, as messages name it.
        clock: Where the time comes from.

    Attributes:
        damaged: Damaged evaluations. Reading many skips them and logs a warning; reading one by its name raises an
            ``EvaluationDamagedError``.
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
        """Return a snapshot of the whole database, in one short transaction that costs little more than counting the rows.

        Args:
            failures: The maximum number of the last failed evaluations in it.
            runs: The maximum number of running evaluations per worker.
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
        """Return the evaluation of a row, or None for a damaged one, which is noted."""
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
        """Return the evaluation of a row.

        Raises:
            EvaluationDamagedError: it is damaged.
        """

    @abstractmethod
    def evaluation(self, name: str) -> Evaluation:
        """Return one evaluation.

        Raises:
            UnknownNameError: it is not in the database.
        """

    @abstractmethod
    def attempts(self, name: str) -> list[Attempt]:
        """Return all attempts at one evaluation in the order of their numbers; a running one is the last.

        Released attempts are not among them.

        Raises:
            UnknownNameError: it is not in the database.
        """

    # Steering

    def set_paused(self, paused: bool) -> None:
        """Let all workers, present and future, claim nothing or claim again; they follow with their next claim."""
        self._set("paused", 1 if paused else None)

    def set_concurrency(self, concurrency: int | None) -> None:
        """Set the concurrency of all workers, which overrides that of their calls; None: use that of each call."""
        if concurrency is not None:
            is_whole = type(concurrency) is int
            if not is_whole or not 1 <= concurrency <= MOST_CONCURRENCY:
                shown = shown_number(concurrency) if is_whole else repr(concurrency)[:60]
                raise OptionError("concurrency", shown, f"a whole number from 1 to {MOST_CONCURRENCY}")
        self._set("concurrency", concurrency)

    @abstractmethod
    def _set(self, key: str, value: int | None) -> None:
        """Write a setting; None deletes it."""

    def retry(
        self,
        names: Iterable[str] | None = None,
        *,
        status: Status = "failed",
        cause: Cause | None = None,
        pattern: str | None = None,
    ) -> int:
        """Make evaluations pending again with a new attempt budget, in one transaction, and return their number.

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
        """Make all evaluations of a status pending, or those of them that are named."""

    def drop(
        self,
        names: Iterable[str] | None = None,
        *,
        status: Status | None = None,
        cause: Cause | None = None,
        pattern: str | None = None,
    ) -> int:
        """Delete evaluations with all their attempts, and return their number; a later run adds them as new ones.

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
            raise OptionError("status", repr(status), "evaluations in progress can't be dropped; stop their worker first")
        if chosen is None and status is not None and choice == Choice(status):
            return self._drop_status(status)
        return self._drop_names(self._names(choice) if chosen is None else chosen)

    def _names(self, choice: Choice) -> list[str]:
        return [evaluation["name"] for evaluation in self._evaluations(choice, None)]

    @abstractmethod
    def _drop_names(self, names: list[str]) -> int:
        """Drop the named evaluations, all or none."""

    @abstractmethod
    def _drop_status(self, status: Status) -> int:
        """Drop all evaluations of a status, a limited number in each transaction."""

    @abstractmethod
    def compact(self) -> Compacted:
        """Free unused space, and delete workers that ended and that no attempt refers to.

        Raises:
            DatabaseError: workers are active, which would have to wait for long; nothing was changed.
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
                findings.append(Finding("it is paused: workers claim nothing", "`speval resume` ends the pause", False))
            if integrity:
                fix = self._damage(facts, findings)
                after: int | None = 0
                while after is not None:
                    after, rows = self._page(_ALL, after, _PAGE)
                    while rows:
                        self._readable(rows.popleft())
                findings += self.damaged.findings(fix)
        except DatabaseError as error:  # nothing more can be read
            findings.append(Finding(error.problem, self._fix, True))
        return Health(facts, tuple(sorted(findings + around, key=lambda finding: not finding.is_error)))

    _fix: str  # what to do if the database can't be read

    @abstractmethod
    def _outside(self) -> tuple[Facts, list[Finding]]:
        """Return facts and findings that need no reading of the database."""

    @abstractmethod
    def _inside(self, facts: Facts, findings: list[Finding]) -> None:
        """Add facts and findings from inside the database."""

    @abstractmethod
    def _damage(self, facts: Facts, findings: list[Finding]) -> str:
        """Read the whole database, add the contradictions in it, and return the fix for a damaged evaluation."""

    @abstractmethod
    def _lost(self, worker: WorkerView) -> Finding:
        """Return the finding for a dead or silent worker."""


def orphaned(count: int) -> list[Finding]:
    """Return the finding for so many evaluations without an active worker; none for 0."""
    if not count:
        return []
    return [Finding(f"{counted(count)} held by no worker", RECLAIMED, False)]


def holds(worker: WorkerView) -> str:
    """Return the number of evaluations that a worker holds, as text."""
    return counted(worker.running + worker.ahead + worker.held)


def _checked(status: Status | None, cause: Cause | None, pattern: str | None) -> Choice:
    checked_status(status, (None, *get_args(Status)))
    if cause is not None and cause not in get_args(Cause):
        raise OptionError("cause", repr(cause)[:60], f"one of {', '.join(repr(c) for c in get_args(Cause))}")
    if pattern is not None and not isinstance(pattern, str):
        raise OptionError("pattern", repr(pattern)[:60], "a text, in which * stands for any text and ? for any character")
    return Choice(status, cause, pattern)
