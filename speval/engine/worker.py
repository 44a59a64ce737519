"""The engine: one worker, from its first claim to its last record.

Owns the loop that claims evaluations, hands them to slots and records what comes back. Invariant: an outcome is reported
only after the commit that records it, and everything claimed is either recorded or given back when the worker ends.
"""

from __future__ import annotations

import asyncio
import atexit
import errno
import heapq
import logging
import os
import random
import shlex
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar
from weakref import WeakSet

from anyio import CancelScope

from ..clock import Clock
from ..errors import DatabaseError, DatabaseLockedError, DatabaseUnavailableError, SpevalError
from ..executors.base import Executor, NoRoomError
from ..executors.call import OUTPUT_CLOSED
from ..model import Claim, Outcome, Settings, Summary, counted
from ..options import Options
from ..spaces.eager import Key, Space
from ..spaces.lazy import Source
from ..stores.base import Ended, Record, Recorded, Store
from .failures import Told
from .feeder import Feeder
from .lease import Lease
from .side_files import keep, take_in

__all__ = ["Worker"]

logger = logging.getLogger("speval.worker")

T = TypeVar("T")

_AHEAD = 0.03  # seconds of work claimed beyond what the slots can start at once
_MOST_AHEAD = 1000  # evaluations claimed ahead for each commit's sake; more makes the commits long, not cheaper
_AT_ONCE = 0.002  # seconds of work handed to a slot at once, where that spares round trips
_MOST_AT_ONCE = 64  # evaluations
_STALE = 0.15  # seconds after which what was claimed ahead and not started is given back
_LOOK = 0.5  # seconds between looks for what people have set while there is no other reason to look
_POLL = (0.02, 0.25)  # seconds between looks for new work while others hold all of it: at first, and in the long run
_LONGEST_BACKOFF = 60.0  # seconds
_STOP_WITHIN = 10.0  # seconds a cancelled run may take to record and give back
_STUCK = 2.0  # seconds without a step of a cancelled run, after which it waits for the database no longer
_MOST_REFUSED = 1000  # late results remembered, in case their evaluations turn out to be gone


class Worker:
    """Evaluates a space with a store and an executor; used once.

    Args:
        space: What to evaluate, encoded; or where to draw it from.
        store: Where evaluations live; opened and closed by the worker.
        executor: Where the function runs; closed by the worker.
        options: The options of the call.
        clock: Where the time comes from.
    """

    def __init__(self, space: Space | Source, store: Store, executor: Executor, options: Options, clock: Clock) -> None:
        self._space = space
        self._store = store
        self._executor = executor
        self._options = options
        self._clock = clock
        self._failure_limit = options.failure_limit(space.count)
        self._concurrency = options.concurrency
        self._paused = False
        self._task: asyncio.Task[None] | None = None
        self._lease: Lease | None = None
        self._id = 0
        self._wake = asyncio.Event()
        # What is claimed and not started, what runs by slot number, and what waits for the next commit.
        self._ready: deque[Claim] = deque()
        self._running: dict[int, tuple[list[Claim], asyncio.Task[None]]] = {}
        self._ended: list[Ended] = []
        self._in_flight: Sequence[Ended] = ()  # on their way to the database
        self._unrecorded: list[Ended] = []  # ended, and not to be recorded any more
        self._kept: set[Claim] = set()  # written elsewhere
        self._keeping = threading.Lock()
        self._refused: deque[Ended] = deque(maxlen=_MOST_REFUSED)
        self._final: Summary | None = None  # as counted at the end
        self._told = Told(logger)
        self._steps = 0
        self._note = ""  # what is said of results that are kept elsewhere
        self._is_hurried = False  # what can't be recorded at once is kept outside of the database
        self._released: list[Claim] = []
        self._held: list[tuple[float, int, Claim]] = []  # a heap by the time the backoff is over
        self._feeder: Feeder | None = None
        self._failure: Exception | None = None  # raised when all that has ended is recorded
        self._slots = 0
        self._equipped: set[int] = set()  # the slots that have run something
        self._room: int | None = None  # as many slots as the system has room for, where that is known
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._interrupted: set[int] = set()  # slots
        self._mean = 1.0  # seconds an evaluation takes, over the last ones
        self._is_slow = False  # nothing has ended for a while: nothing is claimed ahead until something does
        self._dry = False  # the last claim brought less than was wanted
        self._news = False  # others have written since
        self._is_open = True  # an evaluation of the space is still to end, here or elsewhere
        self._stopping: str | None = None
        self._closing = False
        self._in_doubt = False
        self._lost = False
        self._polls = 0
        self._recorded = 0
        self._started = clock.monotonic()
        self.commits = asyncio.Event()  # set after each commit, for those who wait for ended evaluations

    def __repr__(self) -> str:
        return f"<Worker {self._id:012x} running {len(self._running)} of {self._concurrency}>"

    @property
    def store(self) -> Store:
        """Return the store, opened while the worker runs."""
        return self._store

    async def start(self) -> None:
        """Seed the space and start claiming; the work goes on in a task of its own.

        Raises:
            SpevalError: the database can't be used, or holds other args; nothing was changed.
        """
        try:
            await self._store.open()
            self._executor.start()  # what it needs some time for goes on while the space is compared
            await self._seed()
            await take_in(self._store)
        except BaseException:
            with CancelScope(shield=True):
                await self._executor.close()
                await self._store.close()
            raise
        self._pid = os.getpid()
        self._task = asyncio.create_task(self._run(), name="speval worker")
        _running.add(self)

    async def _seed(self) -> None:
        if isinstance(self._space, Source):
            await self._store.follow()
            return
        seeded = await self._store.seed(self._space, self._options.on_changed)
        counts = (seeded.new, seeded.unchanged, seeded.changed, seeded.gone)
        logger.info("eval space: %d new, %d unchanged, %d changed, %d stored but no longer in it", *counts)
        if seeded.changed and self._options.on_changed == "keep":
            logger.warning("stored with other args than given now, and kept: %s", counted(seeded.changed))

    @property
    def busy(self) -> tuple[int, int]:
        """Return how many evaluations run here right now, and how many the worker holds in all."""
        held = sum(len(claims) for claims, _ in self._running.values())
        held += len(self._ready) + len(self._ended) + len(self._released)
        return min(held, self._concurrency), held

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
        """Count how the evaluations of the space stand."""
        summary = self._final or await self._store.summary()
        seconds = self._clock.monotonic() - self._started
        return replace(summary, recorded=self._recorded, seconds=seconds, stopped=self._stopping)

    def tell(self, summary: Summary) -> Summary:
        """Log how the call ended."""
        if not self._stopping:
            logger.log(logging.WARNING if summary.failed else logging.INFO, "%s", summary)
        return summary

    async def close(self) -> None:
        """Stop claiming, stop what runs, record what has ended, give back the rest, and close the store.

        Being cancelled in the meantime lets go of everything at once.
        """
        # A cancel scope of anyio cancels again and again until it is left; a shield keeps that off, but no second cancel().
        with CancelScope(shield=True):
            task = self._task
            try:
                if task is not None and not task.done():
                    self.stop("cancelled")
                    await self._wait_for(task)
                    if not task.done():
                        logger.warning("what was claimed could not be given back in time; the lease will run out")
            finally:
                if task is not None and not task.done():
                    self._store.abandon()
                    task.cancel()
                    await asyncio.wait({task}, timeout=_STOP_WITHIN)
                await self._store.close()

    async def _wait_for(self, task: asyncio.Task[None]) -> None:
        """Wait for the end of a stopped run; where the database keeps it waiting, what it can't record is kept elsewhere."""
        loop, steps = asyncio.get_running_loop(), -1
        deadline = loop.time() + _STOP_WITHIN
        while not task.done() and (left := deadline - loop.time()) > 0:
            if steps == self._steps and not self._is_hurried and not self._closing:
                self._is_hurried = True
                self._store.abandon()  # what waits for a lock or an answer fails at once
            steps = self._steps
            await asyncio.wait({task}, timeout=min(left, _STUCK))

    def stop(self, why: str) -> None:
        """Stop claiming and end what runs; the worker's task ends soon after."""
        self._stopping = self._stopping or why
        self._give_back_ready()
        self._interrupt()
        self._wake.set()

    def _fail(self, error: Exception) -> None:
        """Stop because of an error, which is raised when all that has ended is recorded."""
        self._failure = self._failure or error
        self.stop(f"{type(error).__name__}: {error}")

    def _look_again(self) -> None:
        """Have the worker's task look at what there is to do."""
        self._dry = False
        self._wake.set()

    # The worker's own task

    async def _run(self) -> None:
        try:
            self._id = await self._store.register(self._options.lease)
            loop = asyncio.get_running_loop()
            self._lease = Lease(
                self._store.lease_keeping(),
                self._id,
                self._options.lease,
                self._options.max_attempts,
                self._clock,
                on_doubt=partial(_tell, loop, self._on_doubt),
                on_lost=partial(_tell, loop, self._on_lost),
                on_broken=partial(_tell, loop, self._fail),
            )
            self._lease.start()
            if isinstance(self._space, Source):
                self._feeder = Feeder(self._space, self._store, on_drawn=self._look_again, on_failure=self._fail)
            async with asyncio.TaskGroup() as slots:
                try:
                    await self._drive(slots)
                finally:
                    self._closing = True
                    self._note = self._keep() or self._note  # before slots are waited for, which may take long
                self._wake_slots(len(self._waiting))
            if self._failure is not None:
                raise self._failure
        except BaseExceptionGroup as group:
            # Unwrap the group and raise the first error.
            raise self._explained(group.exceptions[0]) from group.exceptions[0].__cause__
        finally:
            self._keep()
            self._told.sum_up()
            try:
                if self._feeder is not None:
                    await self._feeder.stop()
                await self._executor.close()
            finally:
                await self._leave()
                self.commits.set()

    def _keep(self) -> str:
        """Write what ended and is not recorded to a file beside the database; return what there is to say of it."""
        # At exit it is another thread than the loop's, which may be about to do the same.
        with self._keeping:
            left, self._unrecorded, self._ended = self._unrecorded + self._ended, [], []
            left = [one for one in left if one.claim not in self._kept]
            if not left:
                return ""
            path, text = keep(self._store.beside, left)
            self._kept.update(one.claim for one in left)
        logger.log(logging.ERROR if path is None else logging.WARNING, "%s: %s", self._store.shown, text)
        self._stopping = f"{self._stopping}; {text}" if self._stopping else text
        return text

    def keep_at_exit(self) -> None:
        """Keep what is not known to be recorded, when the interpreter ends without waiting for this worker."""
        if self._task is not None and not self._task.done() and self._pid == os.getpid():
            self._unrecorded += self._in_flight
            self._keep()

    def _explained(self, error: BaseException) -> BaseException:
        """Return an error that says where results are kept that it left unrecorded."""
        note = "; ".join(filter(None, (self._note, self._keep())))  # slots may have ended some more
        if note and type(error) is DatabaseError:
            return DatabaseError(error.db, f"{error.problem}; {note}").with_traceback(error.__traceback__)
        if note and not isinstance(error, asyncio.CancelledError):
            error.add_note(note)
        return error

    async def _leave(self) -> None:
        if self._lease is None:
            return
        self._lease.retire()
        try:
            await self._store.leave(self._id)
        except SpevalError as error:
            logger.warning("what was claimed could not be given back, the lease will run out: %s", error)
        finally:
            self._lease.stop()

    async def _drive(self, slots: asyncio.TaskGroup) -> None:
        """Claim, record and wait until nothing is left to do."""
        while True:
            self._steps += 1
            ended, self._ended = self._ended, []
            released, self._released = self._released, []
            due = self._take_due()
            if self._lost:
                await self._patiently_register()
            if self._feeder is not None and (drawn := self._feeder.take()):
                await self._extend(drawn)
            idle, ahead = self._wanted()
            if ended or released or due or (idle and not self._dry) or self._news:
                self._news = False
                recorded = await self._record(ended, released, due, idle, ahead)
                if recorded is None:
                    continue
                self._take(recorded, idle, slots)
                self._report(ended, recorded.refused)
                self.commits.set()
            elif self._is_finished():
                return await self._check_end()
            else:
                if self._feeder is not None and not self._paused:
                    self._feeder.ask(idle, ahead)
                await self._rest()

    async def _check_end(self) -> None:
        """See that all of the space is there at the end.

        Raises:
            DatabaseError: others have taken some of it away.
        """
        if self._stopping or self._space.count is None:
            return
        self._final = await self._patiently_count()
        if self._final is not None and self._final.total < (count := self._space.count):
            self._unrecorded += self._refused  # by evaluations that are gone
            problem = f"holds {self._final.total} of the {counted(count)} of the eval space at the end of the run"
            cause = "others have dropped, deleted or replaced what was there (`speval drop`, `.restore`, DELETE, TRUNCATE)"
            raise DatabaseError(self._store.shown, f"{problem}: {cause}; start again to evaluate what is missing")

    async def _patiently_count(self) -> Summary | None:
        while not self._stopping:
            try:
                return await self._store.summary(at_end=True)
            except (DatabaseLockedError, DatabaseUnavailableError):
                await asyncio.sleep(_LOOK)
        return None

    def _wanted(self) -> tuple[int, int]:
        """Return how many claims are wanted at once, and how many ahead."""
        if self._stopping or self._in_doubt:
            return 0, 0
        free = self._concurrency - len(self._running)
        idle = max(0, free - len(self._ready))
        # Evaluations much shorter than a commit are claimed many at a time; long ones never before a slot is free for them.
        # Where more than that run at once, what ends during one commit is more than that too.
        most = max(_MOST_AHEAD, 2 * self._concurrency)
        target = 0 if self._is_slow else min(most, int(_AHEAD * self._concurrency / max(self._mean, 1e-6)))
        return idle, max(0, target - max(0, len(self._ready) - free))

    def _is_finished(self) -> bool:
        if self._running or self._ended or self._released or self._ready:
            return False
        if self._stopping:
            return True
        if self._feeder is not None and not self._feeder.is_over:
            return False
        if self._held or self._in_doubt or not self._dry:
            return False
        return not self._is_open or not (self._options.wait or self._paused)

    async def _rest(self) -> None:
        """Wait for whatever comes first: a slot, a backoff that is over, others' writes, something gone stale."""
        free = len(self._running) < self._concurrency
        polling = self._dry and free and not self._stopping
        pauses = [_LOOK]
        if self._held:
            pauses.append(self._held[0][0] - self._clock.monotonic())
        if polling:
            short, long = _POLL
            pauses.append(min(long, short * 1.3 ** min(self._polls, 30)) * random.uniform(0.7, 1.0))
        if self._ready:
            pauses.append(_STALE)
        try:
            async with asyncio.timeout(max(0.0, min(pauses))):
                await self._wake.wait()
            self._wake.clear()
            self._polls = 0
        except TimeoutError:
            if self._ready:
                # A slow one among quick ones: what stands behind it, others can start now.
                self._is_slow = True
                self._give_back_ready()
                self._dry = False
            elif await self._changed():
                self._dry = False
                self._news = True
            self._polls += 1

    async def _changed(self) -> bool:
        try:
            return await self._store.changed()
        except (DatabaseLockedError, DatabaseUnavailableError):
            return False

    async def _record(
        self, ended: Sequence[Ended], released: Sequence[Claim], due: Sequence[Claim], idle: int, ahead: int
    ) -> Recorded | None:
        """Record, and where that can't be done just now, keep everything and try again; None if it can't be done in time."""
        count_failures = self._failure_limit is not None
        record = Record(self._id, ended, released=released, due=due, idle=idle, ahead=ahead, count_failures=count_failures)
        pause, has_warned = 0.05, False
        self._in_flight = ended
        try:
            while True:
                try:
                    return await self._store.record(record)
                except (DatabaseLockedError, DatabaseUnavailableError) as error:
                    if self._is_hurried:
                        self._unrecorded += ended
                        return None
                    if not has_warned:
                        logger.warning("%s kept, to be written as soon as possible: %s", counted(len(ended), "result"), error)
                        has_warned = True
                    if self._stopping:
                        record = replace(record, idle=0, ahead=0)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 2, 5.0)
        except BaseException:
            self._unrecorded += ended
            raise
        finally:
            self._in_flight = ()

    async def _patiently_register(self) -> None:
        """Register anew after the lease was lost."""
        assert self._lease is not None
        while not self._stopping:
            try:
                self._id = await self._store.register(self._options.lease)
            except (DatabaseLockedError, DatabaseUnavailableError):
                await asyncio.sleep(self._options.lease / 10)
            else:
                self._lease.adopt(self._id)
                self._lost = False  # only now: meanwhile the lease's thread may have told of the same loss
                self._dry = False
                return

    async def _extend(self, drawn: Sequence[tuple[Key, str]]) -> None:
        """Store what was drawn, with the patience of ``_record``."""
        pause = 0.05
        while not self._stopping:
            try:
                await self._store.extend(drawn, self._options.on_changed)
            except (DatabaseLockedError, DatabaseUnavailableError):
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 2, 5.0)
            except SpevalError as error:
                self._fail(error)
            else:
                self._dry = False
                return

    def _take(self, recorded: Recorded, idle: int, slots: asyncio.TaskGroup) -> None:
        """Hand new claims to the slots and note what else the commit has told."""
        self._obey(recorded.settings)
        if recorded.lost:
            self._on_lost(self._id)
        if recorded.open is not None:
            self._is_open = recorded.open
        if idle:
            self._dry = len(recorded.claims) < idle and not recorded.lost
        if self._failure_limit is not None and recorded.failures is not None and recorded.failures >= self._failure_limit:
            if not self._stopping:
                logger.error("max_failures is reached, no more are started: %s failed", counted(recorded.failures))
            self._stopping = f"{recorded.failures} failed, max_failures={self._options.max_failures}"
            self._give_back_ready()
        if self._stopping or self._in_doubt:
            self._released.extend(recorded.claims)
            return
        self._ready.extend(recorded.claims)
        if recorded.claims:
            self._polls = 0
        new = min(len(self._ready) - len(self._waiting), self._concurrency - self._slots)
        self._wake_slots(len(self._ready))
        for _ in range(new):
            slots.create_task(self._slot(self._slots), name=f"speval slot {self._slots}")
            self._slots += 1

    def _obey(self, settings: Settings) -> None:
        """Do as people have set it for all workers."""
        if settings.paused != self._paused:
            self._paused = settings.paused
            if not self._paused:
                logger.info("resumed")
            else:
                resume = f"speval resume {shlex.quote(self._store.shown)}"
                logger.warning("paused: this call starts nothing new until `%s`; what runs goes on", resume)
                self._give_back_ready()
        concurrency = settings.concurrency or self._options.concurrency
        if self._room is not None:
            concurrency = min(concurrency, self._room)
        if concurrency != self._concurrency:
            logger.info("concurrency is %d now, it was %d", concurrency, self._concurrency)
            self._concurrency = concurrency
            self._dry = False

    def _give_back_ready(self) -> None:
        """Give back what is claimed and has not started."""
        self._released.extend(self._ready)
        self._ready.clear()

    def _report(self, ended: Sequence[Ended], refused: Sequence[Claim]) -> None:
        """Log what was recorded, and note the backoff of what is to be tried again."""
        stale, is_shown = set(refused), logger.isEnabledFor(logging.DEBUG)
        for claim, outcome, again in ended:
            if claim in stale:
                logger.warning(
                    "evaluation %r: attempt %d came to an end after it had been given to another worker; refused",
                    claim.name,
                    claim.attempt,
                )
                self._refused.append(Ended(claim, outcome, again))
                continue
            self._recorded += not again
            if outcome.error is None:
                if is_shown:
                    logger.debug("evaluation %r completed in %.3f s", claim.name, outcome.duration)
                continue
            what = f"{outcome.error['type']}: {outcome.error['message']}".partition("\n")[0]
            if again:
                pause = self._backoff(claim)
                heapq.heappush(self._held, (self._clock.monotonic() + pause, claim.id, claim))
                text = "evaluation %r will be tried again in %.1f s, after attempt %d: %s"
                self._told.say(logging.WARNING, what, text, claim.name, pause, claim.charged)
            else:
                self._told.say(logging.ERROR, what, "evaluation %r failed in attempt %d: %s", claim.name, claim.charged)

    def _backoff(self, claim: Claim) -> float:
        doubled = self._options.backoff * 2.0 ** min(claim.charged - 1, 30)
        return min(_LONGEST_BACKOFF, doubled * random.uniform(0.8, 1.2))

    def _take_due(self) -> list[Claim]:
        """Return the claims whose backoff is over."""
        due = []
        now = self._clock.monotonic()
        while self._held and self._held[0][0] <= now:
            due.append(heapq.heappop(self._held)[2])
        if due:
            self._dry = False
        return due

    # Slots

    def _wake_slots(self, count: int) -> None:
        for _ in range(min(count, len(self._waiting))):
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)

    async def _slot(self, number: int) -> None:
        """Run one evaluation after the other until the worker ends."""
        slot = self._executor.slot(number)
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        # Made once: with a thousand slots, the garbage collector takes its time for whatever there is of each.
        running: list[Claim] = []
        entry, timeout, takes_many = (running, task), self._options.timeout, self._executor.takes_many
        take, take_unstarted = partial(self._take_outcome, running), partial(self._take_unstarted, running)
        one_more = partial(self._one_more, running, number)
        try:
            while not self._closing:
                # Those already made are too many when the concurrency has been lowered since.
                if not self._ready or len(self._running) >= self._concurrency:
                    waiter = loop.create_future()
                    self._waiting.append(waiter)
                    await waiter
                    continue
                claims = [self._ready.popleft()]
                if takes_many:
                    claims += [self._ready.popleft() for _ in range(self._batch() - 1)]
                running[:] = claims
                self._running[number] = entry
                try:
                    await slot.run(claims, timeout, take, take_unstarted, one_more)
                    self._equipped.add(number)
                except NoRoomError as error:
                    self._do_without(number, error)
                    take_unstarted(list(running))
                    return
                except asyncio.CancelledError:
                    if number not in self._interrupted or task.uncancel():
                        raise
                    self._released.extend(running)
                else:
                    if number in self._interrupted:
                        task.uncancel()  # too late: it had ended
                finally:
                    del self._running[number]
                    self._interrupted.discard(number)
                    self._wake.set()
                if task.cancelling():
                    raise asyncio.CancelledError
        finally:
            await slot.close()

    def _do_without(self, number: int, error: NoRoomError) -> None:
        """Go on with the other slots; the system has no room for this one."""
        self._equipped.discard(number)
        others = len((self._equipped | self._running.keys()) - {number})
        if not others:
            raise error.fatal from error
        if self._room is None:
            logger.warning("fewer evaluations run at once than the %d wanted: %s", self._concurrency, error.problem)
        self._room = others
        self._concurrency = min(self._concurrency, others)

    def _batch(self) -> int:
        """Return how many evaluations to hand to a slot at once."""
        share = -(-(len(self._ready) + 1) // self._concurrency)
        return max(1, min(_MOST_AT_ONCE, share, int(_AT_ONCE / max(self._mean, 1e-6))))

    def _one_more(self, running: list[Claim], number: int) -> Claim | None:
        """Return the next evaluation for a slot that has ended what it had, if there is one for it."""
        if not self._ready or self._closing or number in self._interrupted or len(self._running) > self._concurrency:
            return None
        claim = self._ready.popleft()
        running.append(claim)
        return claim

    def _take_outcome(self, running: list[Claim], claim: Claim, outcome: Outcome) -> None:
        running.remove(claim)
        if outcome.cause == OUTPUT_CLOSED:
            self._released.append(claim)
            text = "standard output is closed: the evaluations under way are given back, what is recorded stays"
            self._fail(BrokenPipeError(errno.EPIPE, text))
            return
        again = outcome.again and claim.charged < self._options.max_attempts
        self._ended.append(Ended(claim, outcome, again))
        self._is_slow = False
        # Quick to believe that evaluations are long, slow to believe that they are short.
        self._mean += (outcome.duration - self._mean) * (0.1 if outcome.duration < self._mean else 0.3)
        self._wake.set()

    def _take_unstarted(self, running: list[Claim], claims: Sequence[Claim]) -> None:
        for claim in reversed(claims):
            running.remove(claim)
            if self._stopping or self._in_doubt or self._paused:
                self._released.append(claim)
            else:
                self._ready.appendleft(claim)
        self._wake_slots(len(self._ready))
        self._wake.set()

    def _interrupt(self) -> None:
        """End what runs and give it back."""
        for number, (_, task) in self._running.items():
            if number not in self._interrupted:
                self._interrupted.add(number)
                task.cancel()

    # What the lease's thread has found, told in the event loop

    def _on_doubt(self, in_doubt: bool) -> None:
        self._in_doubt = in_doubt
        if in_doubt:
            self._give_back_ready()
            if self._executor.can_stop:
                self._interrupt()
        else:
            self._dry = False
        self._wake.set()

    def _on_lost(self, worker: int) -> None:
        if worker != self._id or self._lost:
            return
        logger.warning("this worker was out of touch for too long and has been declared dead; it starts anew as another")
        self._lost = True
        self._ready.clear()  # they belong to whoever took them back
        self._held.clear()
        if self._executor.can_stop:
            self._interrupt()
        self._wake.set()


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[[T], None], value: T) -> None:
    """Call back in the event loop, unless it is over."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(partial(callback, value))


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
