"""Outcomes on their way into the database.

Owns every outcome from its end to the commit that records it, and the patience with a database that is locked or unreachable.
Invariant: an outcome is recorded, refused because its token is stale, or written to a side file; the log names what gets lost.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from ..errors import DatabaseError, DatabaseLockedError, DatabaseUnavailableError
from ..model import Claim, counted
from ..pauses import pauses
from ..stores.base import Ended, Record, Recorded, Store
from .side_files import keep

__all__ = ["Recorder"]

logger = logging.getLogger("speval.worker")

T = TypeVar("T")

_PAUSES = (0.05, 5.0)  # seconds between tries: at first, and in the long run
_MOST_REFUSED = 1000  # late outcomes remembered, in case their evaluations turn out to be gone


class Recorder:
    """Takes outcomes in, and writes them with the next commit.

    Args:
        store: Where to.

    Attributes:
        ended: The outcomes for the next commit.
        is_stopping: The worker claims nothing any more.
        notes: What there is to say of outcomes in side files.
    """

    def __init__(self, store: Store) -> None:
        self.ended: list[Ended] = []
        self.is_stopping = False
        self._store = store
        self._in_flight: Sequence[Ended] = ()
        self._unrecorded: list[Ended] = []  # not to be recorded any more
        self._refused: deque[Ended] = deque(maxlen=_MOST_REFUSED)
        self._kept: set[Claim] = set()  # in a side file
        self._keeping = threading.Lock()
        self._is_hurried = False
        self.notes: list[str] = []

    def __repr__(self) -> str:
        return f"<Recorder {len(self.ended)} ended, {len(self._in_flight)} in flight, {len(self._kept)} kept>"

    @property
    def is_hurried(self) -> bool:
        """Return whether outcomes that can't be recorded at once are kept in a side file."""
        return self._is_hurried

    def hurry(self) -> None:
        """Wait for the database no longer: what waits for a lock or an answer fails at once."""
        self._is_hurried = True
        self._store.abandon()

    async def record(self, record: Record) -> tuple[Sequence[Ended], Recorded] | None:
        """Record all outcomes, with what else there is to write and to claim.

        While the database can't take it, keep everything and try again.

        Args:
            record: What to write and claim; its ``ended`` is filled in.

        Returns:
            The outcomes and what became of them; None if the database did not take them in time.
        """
        ended, self.ended = self.ended, []
        record = replace(record, ended=ended)
        self._in_flight, has_warned = ended, False
        try:
            for pause in pauses(*_PAUSES):
                try:
                    return ended, self._noted(ended, await self._store.record(record))
                except (DatabaseLockedError, DatabaseUnavailableError) as error:
                    if self._is_hurried:
                        self._unrecorded += ended
                        break
                    if not has_warned:
                        logger.warning("%s kept, to be written as soon as possible: %s", counted(len(ended), "result"), error)
                        has_warned = True
                    if self.is_stopping:
                        record = replace(record, idle=0, ahead=0)
                await asyncio.sleep(pause)
        except BaseException:
            self._unrecorded += ended
            raise
        finally:
            self._in_flight = ()
        return None

    def _noted(self, ended: Sequence[Ended], recorded: Recorded) -> Recorded:
        """Remember the refused outcomes, and log them."""
        if recorded.refused:
            stale = set(recorded.refused)
            self._refused.extend(one for one in ended if one.claim in stale)
            for claim in recorded.refused:
                logger.warning(
                    "evaluation %r: attempt %d ended after another worker had been given it; its outcome is refused",
                    claim.name,
                    claim.attempt,
                )
        return recorded

    async def patiently(self, verb: Callable[[], Awaitable[T]]) -> T | None:
        """Do something with the database as soon as it can be reached; return None if the worker stops before."""
        for pause in pauses(*_PAUSES):
            if self.is_stopping:
                break
            try:
                return await verb()
            except (DatabaseLockedError, DatabaseUnavailableError):
                await asyncio.sleep(pause)
        return None

    def reclaim_refused(self) -> None:
        """Treat refused outcomes as not recorded: their evaluations are gone."""
        self._unrecorded += self._refused

    def keep(self) -> str:
        """Write what is not recorded to a side file beside the database; return what there is to say of it."""
        # At exit another thread may be about to do the same.
        with self._keeping:
            left, self._unrecorded, self.ended = self._unrecorded + self.ended, [], []
            left = [one for one in left if one.claim not in self._kept]
            if not left:
                return ""
            path, text = keep(self._store.beside, left)
            self._kept.update(one.claim for one in left)
            self.notes.append(text)
        logger.log(logging.ERROR if path is None else logging.WARNING, "%s: %s", self._store.shown, text)
        return text

    def keep_at_exit(self) -> None:
        """Keep what is not known to be recorded."""
        self._unrecorded += self._in_flight
        self.keep()

    def explained(self, error: BaseException) -> BaseException:
        """Return an error that says where the outcomes are that it left unrecorded."""
        self.keep()  # slots may have ended some more
        note = "; ".join(self.notes)
        if note and type(error) is DatabaseError:
            return DatabaseError(error.db, f"{error.problem}; {note}").with_traceback(error.__traceback__)
        if note and not isinstance(error, asyncio.CancelledError):
            error.add_note(note)
        return error
