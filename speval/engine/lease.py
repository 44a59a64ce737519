"""A worker's lease.

Owns the thread that proves, from its own connection, that the worker lives, and that takes back what dead ones hold.
Invariant: renewing never waits for the event loop, so no evaluation that blocks it costs the lease; and the worker is told
before its lease can have run out unproven.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable

from .. import threads
from ..clock import Clock
from ..errors import DatabaseError, DatabaseLockedError, DatabaseUnavailableError, SpevalError
from ..model import counted
from ..stores.base import LeaseKeeping

__all__ = ["Lease"]

logger = logging.getLogger("speval.lease")

_LONGEST_TICK = 0.4  # seconds between two looks at the other workers: one whose process died is noticed within a second
_SUSPENDED = 1.0  # seconds by which the two clocks must have drifted apart to call it a suspend


class Lease:
    """Keeps one worker's lease from ``start`` to ``stop``.

    Args:
        keeping: The store's side of it.
        worker: The worker's id, registered just now.
        seconds: The lease.
        max_attempts: Attempts after which a dead worker's evaluation fails.
        clock: Where the time comes from.
        on_doubt: Called when the lease can't be proven any more, and with False when it can again.
        on_lost: Called when the worker has been declared dead.
        on_broken: Called with the error when the database has been unusable for most of a lease, and not for others' locks,
            a full disk or the like, which pass.

    The callbacks are called in the lease's thread.
    """

    def __init__(
        self,
        keeping: LeaseKeeping,
        worker: int,
        seconds: float,
        max_attempts: int,
        clock: Clock,
        on_doubt: Callable[[bool], object],
        on_lost: Callable[[int], object],
        on_broken: Callable[[SpevalError], object],
    ) -> None:
        self._keeping = keeping
        self._worker = worker
        self._seconds = seconds
        self._max_attempts = max_attempts
        self._clock = clock
        self._on_doubt = on_doubt
        self._on_lost = on_lost
        self._on_broken = on_broken
        self._tick = min(seconds / 6, _LONGEST_TICK)
        # Work must have stopped when others may begin to take it, so doubt begins a little earlier.
        self._doubt_after = seconds * 0.8
        self._proven = clock.monotonic()
        self._suspended = self._drift()
        self._in_doubt = False
        self._lost: int | None = None
        self._retiring = False
        self._trouble: str | None = None
        self._broken_since: float | None = None  # when nothing could be taken back for the first time, for good as it seems
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="speval lease", daemon=True)

    def __repr__(self) -> str:
        return f"<Lease of {self._worker:012x}{' in doubt' if self._in_doubt else ''}>"

    def start(self) -> None:
        """Start renewing."""
        threads.start(self._thread)

    def adopt(self, worker: int) -> None:
        """Go on for a worker that was registered anew just now."""
        self._proven = self._clock.monotonic()
        self._worker = worker

    def retire(self) -> None:
        """Go on renewing, and take it for no loss when there is nothing to renew: the worker ends its row now."""
        self._retiring = True

    def stop(self) -> None:
        """Stop renewing; returns when the thread has closed its connection, within about a second."""
        self._stopping.set()
        self._keeping.give_up()
        if self._thread.ident is not None:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            while not self._stopping.wait(self._tick * random.uniform(0.7, 1.0)):
                try:
                    self._beat()
                except Exception:
                    # Without this thread the worker would be lost without a word; the next beat may well succeed.
                    logger.exception("the lease thread goes on after an unexpected error")
        finally:
            self._keeping.close()

    def _beat(self) -> None:
        drift = self._drift()
        if drift - self._suspended > _SUSPENDED:
            # The others may have been suspended with us, so what was watched before says nothing about them.
            logger.info("this machine was suspended for %.0f s", drift - self._suspended)
            self._keeping.forget()
            self._renew()
        elif self._clock.monotonic() - self._proven >= self._seconds / 3:
            self._renew()
        self._suspended = drift
        if not self._in_doubt and self._lost != self._worker:
            self._reclaim()

    def _renew(self) -> None:
        worker = self._worker
        if self._lost == worker:
            return  # nothing to renew before the engine has registered anew
        left = self._proven + self._doubt_after - self._clock.monotonic()
        try:
            alive = self._keeping.renew(worker, patience=max(left, self._tick))
        except SpevalError as error:
            # To wait is not to be dead: there is time to try again until the lease has nearly expired.
            self._note(error)
            if self._clock.monotonic() - self._proven >= self._doubt_after:
                self._doubt(True, error)
                if not _passes(error):
                    self._on_broken(error)
            return
        self._trouble = None
        if alive:
            self._proven = self._clock.monotonic()
            self._doubt(False)
        elif worker == self._worker and not self._retiring:
            self._lost = worker
            self._doubt(False)
            self._on_lost(worker)

    def _doubt(self, in_doubt: bool, error: SpevalError | None = None) -> None:
        if in_doubt != self._in_doubt:
            self._in_doubt = in_doubt
            if in_doubt:
                text = "the lease could not be renewed for %.1f s, what can be stopped is stopped: %s"
                logger.warning(text, self._doubt_after, error)
            self._on_doubt(in_doubt)

    def _reclaim(self) -> None:
        try:
            reclaimed = self._keeping.reclaim(self._worker, self._max_attempts)
        except SpevalError as error:
            self._note(error)
            if _passes(error):
                return
            now = self._clock.monotonic()
            self._broken_since = now if self._broken_since is None else self._broken_since
            if now - self._broken_since >= self._doubt_after:
                self._on_broken(error)
            return
        self._broken_since = None
        for worker in reclaimed.workers:
            logger.warning("worker %s is dead", worker)
        if reclaimed.pending:
            logger.warning("%s of dead workers pending again", counted(reclaimed.pending))
        for name in reclaimed.failed:
            logger.error("evaluation %r failed: its worker died in its last attempt, number %d", name, self._max_attempts)

    def _note(self, error: SpevalError) -> None:
        """Log the same trouble once; the engine's own writes say more about it."""
        if self._stopping.is_set() or type(error).__name__ == self._trouble:
            return
        self._trouble = type(error).__name__
        logger.log(logging.INFO if isinstance(error, DatabaseError) else logging.ERROR, "the lease thread: %s", error)

    def _drift(self) -> float:
        """Return how long the machine has been suspended in all."""
        return self._clock.boottime() - self._clock.monotonic()


def _passes(error: SpevalError) -> bool:
    """Tell whether an error is one that passes: a lock of others, a full disk, a server out of reach."""
    return not isinstance(error, DatabaseError) or isinstance(error, DatabaseLockedError | DatabaseUnavailableError)
