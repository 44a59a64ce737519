"""One run of a worker, from its registration until it has left.

Owns the loop that claims evaluations, hands them to slots and records what comes back; what to do next is for ``plan`` to say.
Invariant: an outcome is reported only after the commit that records it, and everything claimed is either recorded or given back
at the end.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from ..clock import Clock
from ..errors import DatabaseError, DatabaseLockedError, DatabaseUnavailableError, SpevalError
from ..executors.base import Executor
from ..executors.call import OUTPUT_CLOSED
from ..model import Claim, Outcome, Settings, Summary, counted
from ..options import Options
from ..pauses import pauses
from ..spaces.eager import Key, Space
from ..spaces.lazy import Source
from ..stores.base import Ended, Record, Recorded, Store
from .feeder import Feeder
from .held import Held
from .lease import Lease
from .plan import Commit, Finish, Rest, State, plan
from .recorder import Recorder
from .report import Report
from .slots import Slots

__all__ = ["Run"]

logger = logging.getLogger("speval.worker")

T = TypeVar("T")

_POLL = (0.02, 0.25)  # seconds between looks for new work while others hold all of it: at first, and in the long run


class Run:
    """Evaluates what a store holds; used once.

    Args:
        space: What to evaluate, stored by now; or where to draw it from.
        store: Where evaluations live; open.
        executor: Where the function runs; closed at the end.
        options: The options of the call.
        clock: Where the time comes from.

    Attributes:
        id: The worker's id.
        commits: Set after each commit, and at the end.
        stopping: Why nothing is claimed any more, or None.
        steps: How many steps the loop has made.
        slots: Where evaluations run.
        recorder: Where outcomes go.
        report: What was said of recorded outcomes.
        counted: The evaluations by status as counted at the end, or None.
    """

    def __init__(self, space: Space | Source, store: Store, executor: Executor, options: Options, clock: Clock) -> None:
        self.id = 0
        self.commits = asyncio.Event()
        self.stopping: str | None = None
        self.steps = 0
        self.counted: Summary | None = None
        self._space = space
        self._store = store
        self._executor = executor
        self._options = options
        self._clock = clock
        self._failure_limit = options.failure_limit(space.count)
        self._wake = asyncio.Event()
        concurrency, timeout = options.concurrency, options.timeout
        self.slots = Slots(executor, timeout, concurrency, clock, on_end=self._on_end, on_change=self._wake.set)
        self.recorder = Recorder(store)
        self._held = Held(options.backoff, clock)
        self.report = Report(self._held)
        self._feeder: Feeder | None = None
        self._lease: Lease | None = None
        self._settings = Settings()
        self._failure: Exception | None = None  # raised when all that has ended is recorded
        self._is_slow = False  # no evaluation has ended for a while: no claims ahead until one does
        self._is_dry = False  # the last claim brought less than was wanted
        self._has_news = False  # other workers have written since
        self._is_open = True  # an evaluation of the space has not ended yet, here or elsewhere
        self._in_doubt = False
        self._lost = False
        self._poll_anew()

    def __repr__(self) -> str:
        return f"<Run of {self.id:012x} running {self.slots.running} of {self.slots.concurrency}>"

    async def run(self) -> None:
        """Evaluate until nothing is left to do, or until stopped.

        Raises:
            SpevalError: the database or the executor can't be used any more.
        """
        try:
            self.id = await self._store.register(self._options.lease)
            self._begin_lease()
            if isinstance(self._space, Source):
                self._feeder = Feeder(self._space, self._store, on_drawn=self._look_again, on_failure=self._fail)
            async with asyncio.TaskGroup() as group:
                self.slots.open(group)
                try:
                    await self._drive()
                finally:
                    self.slots.close()
                    self.recorder.keep()  # before slots are waited for, which may take long
            if self._failure is not None:
                raise self._failure
        except BaseExceptionGroup as group:
            # Unwrap the group and raise the first error.
            error = group.exceptions[0]
            raise self.recorder.explained(error) from error.__cause__
        finally:
            self.recorder.keep()
            self.report.sum_up()
            try:
                if self._feeder is not None:
                    await self._feeder.stop()
                await self._executor.close()
            finally:
                await self._leave()
                self.commits.set()

    def stop(self, why: str) -> None:
        """Stop claiming and end what runs; the worker's task ends soon after."""
        self._finish_up(self.stopping or why)
        self.slots.interrupt()
        self._wake.set()

    def _finish_up(self, why: str) -> None:
        """Claim and start nothing any more; what runs goes on."""
        self.stopping = why
        self.recorder.is_stopping = True
        self.slots.hold_back("stopping")

    def _fail(self, error: Exception) -> None:
        """Stop because of an error, which is raised when all that has ended is recorded."""
        self._failure = self._failure or error
        self.stop(f"{type(error).__name__}: {error}")

    def _look_again(self) -> None:
        """Have the worker's task look at what there is to do."""
        self._is_dry = False
        self._wake.set()

    def _begin_lease(self) -> None:
        loop = asyncio.get_running_loop()
        self._lease = Lease(
            self._store.lease_keeping(),
            self.id,
            self._options.lease,
            self._options.max_attempts,
            self._clock,
            on_doubt=partial(_tell, loop, self._on_doubt),
            on_lost=partial(_tell, loop, self._on_lost),
            on_broken=partial(_tell, loop, self._fail),
        )
        self._lease.start()

    async def _leave(self) -> None:
        if self._lease is None:
            return
        self._lease.retire()
        try:
            await self._store.leave(self.id)
        except SpevalError as error:
            logger.warning("claims could not be given back; others can take them when the lease has expired: %s", error)
        finally:
            self._lease.stop()

    async def _drive(self) -> None:
        """Claim, record and wait until nothing is left to do."""
        while True:
            self.steps += 1
            if self._lost:
                await self._register_anew()
            if self._feeder is not None and (drawn := self._feeder.take()):
                await self._extend(drawn)
            self._resize()  # a minute may have gone by since there was no room for more slots
            match plan(self._state(), self._clock.monotonic()):
                case Commit(idle, ahead):
                    await self._commit(idle, ahead)
                case Rest(seconds, idle, ahead):
                    if self._feeder is not None and not self._settings.paused:
                        self._feeder.ask(idle, ahead)
                    await self._rest(seconds)
                case Finish():
                    return await self._check_end()

    def _state(self) -> State:
        slots = self.slots
        return State(
            concurrency=slots.concurrency,
            running=slots.running,
            ready=len(slots.ready),
            unwritten=len(self.recorder.ended) + len(slots.released),
            due_at=self._held.due_at,
            mean=slots.mean,
            is_slow=self._is_slow,
            is_dry=self._is_dry,
            has_news=self._has_news,
            is_open=self._is_open,
            waits=self._options.wait,
            poll=self._poll,
            draws=self._feeder is not None and not self._feeder.is_over,
            is_paused=self._settings.paused,
            in_doubt=self._in_doubt,
            is_stopping=self.stopping is not None,
        )

    async def _commit(self, idle: int, ahead: int) -> None:
        """Write what there is to write, and claim so many for free slots and so many ahead."""
        self._has_news = False
        released, due = self.slots.take_released(), self._held.take_due()
        if due:
            self._is_dry = False
        count = self._failure_limit is not None
        record = Record(self.id, released=released, due=due, idle=idle, ahead=ahead, count_failures=count)
        done = await self.recorder.record(record)
        if done is not None:
            ended, recorded = done
            self._take(recorded, idle)
            self.report.outcomes(ended, recorded.refused)
            self.commits.set()

    async def _rest(self, seconds: float) -> None:
        """Wait for whatever comes first: a slot, a backoff that is over, others' writes, something gone stale."""
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
            await asyncio.sleep(0)  # slots that ended something become free, and the same commit claims for them
            self._wake.clear()
            self._poll_anew()
        except TimeoutError:
            if self.slots.ready:
                # A slow one among quick ones: others can start now what stands behind it.
                self._is_slow = True
                self.slots.release_ready()
                self._is_dry = False
            elif await self._changed():
                self._is_dry = False
                self._has_news = True
            self._poll = next(self._polls)

    def _poll_anew(self) -> None:
        """Look for others' writes soon again."""
        self._polls = pauses(*_POLL, growth=1.3, spread=0.3)
        self._poll = next(self._polls)

    async def _changed(self) -> bool:
        try:
            return await self._store.changed()
        except (DatabaseLockedError, DatabaseUnavailableError):
            return False

    async def _register_anew(self) -> None:
        """Register anew after the lease was lost."""
        assert self._lease is not None
        id = await self.recorder.patiently(lambda: self._store.register(self._options.lease))
        if id is not None:
            self.id = id
            self._lease.adopt(id)
            self._lost = False  # only now: meanwhile the lease's thread may have told of the same loss
            self._is_dry = False

    async def _extend(self, drawn: Sequence[tuple[Key, str]]) -> None:
        """Store what was drawn."""
        try:
            await self.recorder.patiently(lambda: self._store.extend(drawn, self._options.on_changed))
        except SpevalError as error:
            self._fail(error)
        else:
            self._is_dry = False

    async def _check_end(self) -> None:
        """See that all of the space is there at the end.

        Raises:
            DatabaseError: others have taken some of it away.
        """
        if self.stopping or self._space.count is None:
            return
        self.counted = await self.recorder.patiently(lambda: self._store.summary(at_end=True))
        if self.counted is not None and self.counted.total < (count := self._space.count):
            self.recorder.reclaim_refused()
            problem = f"holds {self.counted.total} of the {counted(count)} of the eval space at the end of the run"
            cause = "others have dropped, deleted or replaced evaluations (`speval drop`, `.restore`, DELETE, TRUNCATE)"
            raise DatabaseError(self._store.shown, f"{problem}: {cause}; start again to evaluate what is missing")

    def _take(self, recorded: Recorded, idle: int) -> None:
        """Hand new claims to the slots and note what else the commit has told."""
        self._obey(recorded.settings)
        if recorded.lost:
            self._on_lost(self.id)
        if recorded.open is not None:
            self._is_open = recorded.open
        if idle:
            self._is_dry = len(recorded.claims) < idle and not recorded.lost
        if self._failure_limit is not None and recorded.failures is not None and recorded.failures >= self._failure_limit:
            if not self.stopping:
                logger.error("max_failures is reached, no more are started: %s failed", counted(recorded.failures))
            self._finish_up(f"{recorded.failures} failed, max_failures={self._options.max_failures}")
        if recorded.claims:
            self._poll_anew()
        self.slots.take(recorded.claims)

    def _obey(self, settings: Settings) -> None:
        """Do as people have set it for all workers."""
        if settings.paused and not self._settings.paused:
            resume = f"speval resume {shlex.quote(self._store.shown)}"
            logger.warning("paused: this call starts nothing new until `%s`; what runs goes on", resume)
            self.slots.hold_back("paused")
        elif self._settings.paused and not settings.paused:
            logger.info("resumed")
            self.slots.let_go("paused")
        self._settings = settings
        self._resize()

    def _resize(self) -> None:
        """Run as many slots as are wanted, as far as there is room for them."""
        if self.slots.resize(self._settings.concurrency or self._options.concurrency):
            self._is_dry = False

    # What the slots and the lease's thread tell, in the event loop

    def _on_end(self, claim: Claim, outcome: Outcome) -> None:
        if outcome.cause == OUTPUT_CLOSED:
            self.slots.released.append(claim)
            text = "standard output is closed: the evaluations under way are given back, what is recorded stays"
            self._fail(BrokenPipeError(errno.EPIPE, text))
            return
        self.recorder.ended.append(Ended(claim, outcome, outcome.again and claim.charged < self._options.max_attempts))
        self._is_slow = False
        self._wake.set()

    def _on_doubt(self, in_doubt: bool) -> None:
        self._in_doubt = in_doubt
        if in_doubt:
            self.slots.hold_back("in doubt")
            if self._executor.can_stop:
                self.slots.interrupt()
        else:
            self.slots.let_go("in doubt")
            self._is_dry = False
        self._wake.set()

    def _on_lost(self, worker: int) -> None:
        if worker != self.id or self._lost:
            return
        logger.warning("this worker did not renew its lease in time and was declared dead; it starts anew as another one")
        self._lost = True
        self.slots.ready.clear()  # other workers may have them by now
        self._held.clear()
        if self._executor.can_stop:
            self.slots.interrupt()
        self._wake.set()


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[[T], None], value: T) -> None:
    """Call back in the event loop, unless it is over."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(partial(callback, value))
