"""A database as people use it from Python: ``speval.Database``.

Owns the public names of everything that is done with a database besides evaluating. Invariant: reading changes nothing and
keeps no worker waiting; a connection that may write is opened only by the first method that writes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from os import PathLike
from types import TracebackType
from typing import Literal, Self

from .errors import OptionError, StoreClosedError
from .model import Attempt, Cause, Compacted, Evaluation, Health, Overview, Status
from .options import Location, checked_database
from .stores import make_control
from .stores.archive import Counts
from .stores.control import Control
from .stores.copying import copy

__all__ = ["Database"]

_parents: list[Control | None] = []  # connections that a forked child has dropped: closing one would disturb its parent


class Database:
    """A database of evaluations, to read and to change, also while workers use it.

    A context manager: leaving it closes its connections. One thread at a time may use it. All its methods block; in async code
    use ``asyncio.to_thread``.

    Args:
        db: A file name, also of a database of speval 0.1.1, or the URL of a PostgreSQL database. It must exist; it is opened
            at once, and only to read. The first method that writes opens it to write.

    Raises:
        DatabaseMissingError: the database does not exist.
        DatabaseError: the database does not belong to speval, or can't be read.
    """

    _reading: Control | None = None
    _writing: Control | None = None

    def __init__(self, db: str | PathLike[str]) -> None:
        self._location: Location = checked_database(db)
        self._pid = os.getpid()
        self._reading = make_control(self._location)
        self._shown = self._reading.shown

    def __repr__(self) -> str:
        state = "closed" if self._reading is None else "open to write" if self._writing else "open to read"
        return f"<Database {self._shown!r} {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._reading is None:
            return
        if self._pid != os.getpid():
            _parents.extend((self._reading, self._writing))
            return
        warnings.warn(f"unclosed {self!r}; use it in a with statement, or close() it", ResourceWarning, 2, source=self)
        self.close()

    def close(self) -> None:
        """Close its connections; calling it again does nothing."""
        reading, self._reading = self._reading, None
        writing, self._writing = self._writing, None
        for control in (reading, writing):
            if control is not None:
                control.close()

    @property
    def _control(self) -> Control:
        if self._reading is None:
            raise StoreClosedError(self._shown)
        return self._reading

    @property
    def _steering(self) -> Control:
        if self._reading is None:
            raise StoreClosedError(self._shown)
        if self._writing is None:
            self._writing = make_control(self._location, "write")
        return self._writing

    # Looking

    def status(self, *, failures: int = 5, runs: int = 5) -> Overview:
        """Count the evaluations by status, and tell which workers there are, what they run and what is set for them.

        It is a snapshot of the whole database, and costs little more than counting the rows.

        Args:
            failures: How many of the last failed evaluations to name.
            runs: How many of the evaluations that each worker runs to name.

        Returns:
            The counts, the rate, the settings, the workers that have not ended, and the last failures.
        """
        return self._control.overview(failures=failures, runs=runs)

    def evaluations(
        self,
        *,
        status: Status | None = None,
        cause: Cause | None = None,
        pattern: str | None = None,
        limit: int | None = None,
    ) -> Iterator[Evaluation]:
        """Iterate over evaluations in eval-space order.

        It reads pages of at most 500 evaluations or some megabytes, each in a short transaction, so that results of any total
        size fit into memory. Others may write meanwhile: each page shows what is stored when it is read. It may be left half
        way, and several may be open at once. Damaged evaluations are skipped, and a log line names them.

        Args:
            status: Only those of this status. None: all.
            cause: Only those that failed for this cause.
            pattern: Only those whose whole name fits: ``*`` stands for any text and ``?`` for any one character.
            limit: How many at most. None: all.

        Returns:
            An iterator; what later calls added follows what was there.

        Raises:
            OptionError: an argument can't be used; raised at once.
            DatabaseError: the database can't be read; raised by the iterator.
        """
        return self._control.evaluations(status=status, cause=cause, pattern=pattern, limit=limit)

    def evaluation(self, name: str) -> Evaluation:
        """Return one evaluation.

        Raises:
            UnknownNameError: it is not in the database.
            DatabaseError: it is damaged, or can't be read.
        """
        return self._control.evaluation(name)

    def attempts(self, name: str) -> list[Attempt]:
        """Return every attempt at an evaluation, with its worker, times, outcome, result or error.

        Args:
            name: The name of the evaluation.

        Returns:
            In the order of their numbers; a running one is the last. Released attempts are not among them.

        Raises:
            UnknownNameError: it is not in the database.
        """
        return self._control.attempts(name)

    def check(self, *, integrity: bool = True) -> Health:
        """Look for problems: damage, dead workers, a slow or unsafe filesystem.

        Args:
            integrity: Whether to read the whole database for damage, which may take a while.

        Returns:
            Facts by name, and findings, errors first, each with its fix.
        """
        return self._control.check(integrity=integrity)

    # Steering

    def retry(
        self,
        names: Iterable[str] | None = None,
        *,
        status: Literal["failed", "completed"] = "failed",
        cause: Cause | None = None,
        pattern: str | None = None,
    ) -> int:
        """Make evaluations pending again with a new attempt budget.

        The earlier attempts remain stored, and ``attempts`` returns them.

        Args:
            names: Which ones. None: all of that status.
            status: ``"failed"``, or ``"completed"`` to evaluate again what has a result. Those of another status stay as
                they are.
            cause: Only those that failed for this cause; not together with names.
            pattern: Only those whose whole name fits, as for ``evaluations``; not together with names.

        Returns:
            How many evaluations are pending again.

        Raises:
            UnknownNameError: a name is not in the database; nothing was changed.
            DatabaseError: the database can't be written to; nothing was changed.
        """
        return self._steering.retry(names, status=status, cause=cause, pattern=pattern)

    def pause(self) -> None:
        """Let all workers, present and future, claim nothing more; running evaluations continue."""
        self._steering.set_paused(True)

    def resume(self) -> None:
        """End the pause; all workers claim again."""
        self._steering.set_paused(False)

    def set(self, *, concurrency: int) -> None:
        """Set an option for all workers, present and future; it overrides the option of their calls.

        Args:
            concurrency: Evaluations that each worker runs at once.

        Raises:
            OptionError: the value is not a whole number from 1 to 1,000,000.
        """
        if concurrency is None:  # which would take it back
            raise OptionError("concurrency", "None", "a whole number; unset('concurrency') takes it back")
        self._steering.set_concurrency(concurrency)

    def unset(self, setting: Literal["concurrency"]) -> None:
        """Delete a setting; each worker uses the option of its call again."""
        if setting != "concurrency":
            raise OptionError("setting", repr(setting)[:60], "'concurrency'")
        self._steering.set_concurrency(None)

    def drop(
        self,
        names: Iterable[str] | None = None,
        *,
        status: Status | None = None,
        cause: Cause | None = None,
        pattern: str | None = None,
    ) -> int:
        """Delete evaluations with all their attempts and results.

        A later run whose space still has them adds them as new ones. Give names, or else at least one of the filters.

        Args:
            names: Which ones.
            status: All of this status; what is in progress can't be dropped.
            cause: All that failed for this cause.
            pattern: All whose whole name fits, as for ``evaluations``.

        Returns:
            How many were dropped.

        Raises:
            UnknownNameError: a name is not in the database; nothing was changed.
            InProgressError: a worker runs one of them; nothing was changed.
            OptionError: both names and filters are given, or neither.
        """
        return self._steering.drop(names, status=status, cause=cause, pattern=pattern)

    def copy(self, target: str | PathLike[str]) -> Counts:
        """Copy the whole database to an empty one, from a file to a server or back.

        Workers may use it meanwhile: the copy is a snapshot. Evaluations in progress are pending in it, and no attempt is
        charged for them.

        Args:
            target: A file name or a URL; made if it is missing.

        Returns:
            How many evaluations and attempts were copied; they are durable.

        Raises:
            DatabaseNotEmptyError: the target has evaluations; it was not changed.
            DatabaseError: one of the two can't be used; the target has no evaluations then.
        """
        if self._reading is None:
            raise StoreClosedError(self._shown)
        return copy(self._location, target)

    def compact(self) -> Compacted:
        """Free the space of dropped evaluations, and delete workers that ended and that no attempt refers to.

        Returns:
            Bytes before and after, and how many workers were deleted.

        Raises:
            DatabaseError: workers are active, which would have to wait for long; nothing was changed.
        """
        return self._steering.compact()
