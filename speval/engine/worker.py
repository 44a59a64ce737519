"""One worker, as a call of ``speval`` sees it.

Owns opening and closing the store, seeding, and the task in which the worker runs. Invariant: however a call is left, its
worker has given back what it held, or has said that it could not; at the interpreter's exit, unrecorded outcomes are kept.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
from dataclasses import replace
from weakref import WeakSet

from anyio import CancelScope

from ..clock import Clock
from ..executors.base import Executor
from ..model import Summary, counted
from ..options import Options
from ..spaces.eager import Space
from ..spaces.lazy import Source
from ..stores.base import Store
from .run import Run
from .side_files import take_in

__all__ = ["Worker"]

logger = logging.getLogger("speval.worker")

_STOP_WITHIN = 10.0  # seconds a cancelled run may take to record and give back
_STUCK = 2.0  # seconds without a step of a cancelled run, after which it waits for the database no longer


class Worker:
    """Evaluates a space with a store and an executor; used once.

    Args:
        space: What to evaluate, encoded; or where to draw it from.
        store: Where evaluations live; opened and closed by the worker.
        executor: Where the function runs; closed by the worker.
        options: The options of the call.
        clock: Where the time comes from.

    Attributes:
        store: The store, opened while the worker runs.
        commits: Set after each commit.
    """

    def __init__(self, space: Space | Source, store: Store, executor: Executor, options: Options, clock: Clock) -> None:
        self.store = store
        self._space = space
        self._executor = executor
        self._options = options
        self._clock = clock
        self._run = Run(space, store, executor, options, clock)
        self.commits = self._run.commits
        self._task: asyncio.Task[None] | None = None
        self._started = clock.monotonic()

    def __repr__(self) -> str:
        return f"<Worker {self._run.id:012x} running {self._run.slots.running} of {self._run.slots.concurrency}>"

    async def start(self) -> None:
        """Seed the space and start claiming; the work continues in a separate task.

        Raises:
            SpevalError: the database can't be used, or holds other args; nothing was changed.
        """
        try:
            await self.store.open()
            self._executor.start()  # what it needs some time for goes on while the space is compared
            await self._seed()
            await take_in(self.store)
        except BaseException:
            with CancelScope(shield=True):
                await self._executor.close()
                await self.store.close()
            raise
        self._pid = os.getpid()
        self._task = asyncio.create_task(self._run.run(), name="speval worker")
        _running.add(self)

    async def _seed(self) -> None:
        if isinstance(self._space, Source):
            await self.store.follow()
            return
        seeded = await self.store.seed(self._space, self._options.on_changed)
        counts = (seeded.new, seeded.unchanged, seeded.changed, seeded.gone)
        logger.info("eval space: %d new, %d unchanged, %d changed, %d stored but no longer in it", *counts)
        if seeded.changed and self._options.on_changed == "keep":
            logger.warning("%s stored with other args than given now; the stored args are kept", counted(seeded.changed))

    @property
    def busy(self) -> tuple[int, int]:
        """Return how many evaluations run here right now, and how many the worker holds in all."""
        held = self._run.slots.held + len(self._run.recorder.ended)
        return min(held, self._run.slots.concurrency), held

    @property
    def is_done(self) -> bool:
        """Return whether the worker has ended."""
        return self._task is None or self._task.done()

    async def wait(self) -> None:
        """Return when the worker has ended; being cancelled does not stop it.

        Raises:
            SpevalError: the database can't be used any more.
        """
        assert self._task is not None
        await asyncio.shield(self._task)

    async def summary(self) -> Summary:
        """Count the evaluations of the space by status."""
        summary = self._run.counted or await self.store.summary()
        seconds = self._clock.monotonic() - self._started
        stopped = "; ".join(filter(None, (self._run.stopping, *self._run.recorder.notes))) or None
        return replace(summary, recorded=self._run.report.recorded, seconds=seconds, stopped=stopped)

    def tell(self, summary: Summary) -> Summary:
        """Log how the call ended."""
        if not summary.stopped:
            logger.log(logging.WARNING if summary.failed else logging.INFO, "%s", summary)
        return summary

    async def close(self) -> None:
        """Stop claiming, stop what runs, record what has ended, give back the rest, and close the store.

        Cancelled meanwhile, it abandons everything at once.
        """
        # A cancel scope of anyio cancels again and again until it is left; a shield keeps that off, but no second cancel().
        with CancelScope(shield=True):
            task = self._task
            try:
                if task is not None and not task.done():
                    self._run.stop("cancelled")
                    await self._wait_for(task)
                    if not task.done():
                        logger.warning(
                            "claims could not be given back in time; others can take them when the lease has expired"
                        )
            finally:
                if task is not None and not task.done():
                    self.store.abandon()
                    task.cancel()
                    await asyncio.wait({task}, timeout=_STOP_WITHIN)
                await self.store.close()

    async def _wait_for(self, task: asyncio.Task[None]) -> None:
        """Wait for the end of a stopped run; outcomes that the database does not take in time go to a side file."""
        loop, steps = asyncio.get_running_loop(), -1
        deadline = loop.time() + _STOP_WITHIN
        while not task.done() and (left := deadline - loop.time()) > 0:
            if steps == self._run.steps and not self._run.recorder.is_hurried and not self._run.slots.is_closing:
                self._run.recorder.hurry()
            steps = self._run.steps
            await asyncio.wait({task}, timeout=min(left, _STUCK))

    def keep_at_exit(self) -> None:
        """Keep what is not known to be recorded, when the interpreter ends without waiting for this worker."""
        if self._task is not None and not self._task.done() and self._pid == os.getpid():
            self._run.recorder.keep_at_exit()


# The second Ctrl-C waits for nothing: the threads of the call end with the interpreter.
_running: WeakSet[Worker] = WeakSet()


@atexit.register
def _keep_all() -> None:
    for _ in range(3):  # the second Ctrl-C may arrive here as well, and what was computed must not depend on that
        try:
            for worker in list(_running):
                worker.keep_at_exit()
        except KeyboardInterrupt:
            continue
        return
