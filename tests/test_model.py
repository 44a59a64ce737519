"""A store against a model of it in plain Python, under everything that workers do to each other.

Several copies of a script, each with connections and clocks of its own, seed, claim, record, stall, wake up late and die on
one real file, in an order that Hypothesis makes up. The model says what each step has to bring; after each step the file has to
hold what the model says, and at the end one worker alone has to bring everything to an end.
"""

import asyncio
import json
import sqlite3
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from speval.errors import ArgsChangedError, UnknownNameError
from speval.host import Process
from speval.model import Claim, Outcome
from speval.space import Space
from speval.stores.base import Ended
from speval.stores.sqlite import SqliteStore

from .conftest import MovableClock

NAMES = ["0", "1", "2", "3", "a", "07", "7", "b c", "é", "10", "9", "-1"]
STATUSES = {0: "pending", 1: "in_progress", 2: "completed", 3: "failed", 4: "held"}
CAUSES = ["exception", "timeout", "crash", "unserializable"]
MOST_COPIES = 4


class Interrupted(BaseException):
    """A copy is interrupted between two transactions."""


@dataclass
class Attempt:
    """A row that has to be in the table of attempts, in this order."""

    id: int
    attempt: int
    worker: int
    outcome: str
    result: str | None
    started_at: float
    duration: float | None


@dataclass
class Modelled:
    """What has to be stored of one evaluation."""

    id: int
    name: str
    args: int
    updated: float
    status: str = "pending"
    attempt: int = 0
    made: int = 0  # attempts that people are shown
    charged: int = 0  # attempts charged to the present budget, one under way included
    forgiven: int = 0  # rows of attempts before the present budget
    holder: int | None = None
    is_ahead: bool = False  # the claim under way was taken ahead
    is_suspect: bool = False  # a worker died with it claimed ahead
    last: int | None = None  # the place of its last attempt in the list of all

    @property
    def is_open(self) -> bool:
        return self.status not in ("completed", "failed")

    def put_back(self, wall: float, *, charge: bool) -> None:
        if self.status == "in_progress" and not charge:
            self.charged -= 1
            self.made -= 1
        self.status, self.holder, self.updated = "pending", None, wall


@dataclass
class ModelledWorker:
    id: int
    process: Process
    lease: float
    beat: int = 0
    dead: bool = False
    ended: bool = False


@dataclass
class Copy:
    """One running copy of a script."""

    process: Process
    clock: MovableClock
    store: SqliteStore
    keeping: object = None
    space: dict[str, int] = field(default_factory=dict)
    ids: set[int] = field(default_factory=set)
    worker: int = 0
    stalls: bool = False
    claims: list[Claim] = field(default_factory=list)
    since: int = 0  # attempts recorded when it seeded
    cursor: int = 0
    followed: int = 0  # attempts that the feed has passed
    sights: dict[int, tuple[int, float]] = field(default_factory=dict)


index = st.integers(0, 7)
picks = st.lists(index, min_size=1, max_size=4)
leases = st.sampled_from([5.0, 10.0, 30.0])
outcomes = st.sampled_from(["completed", "completed", "again", "again", "again", *CAUSES])
ways_to_seed = st.sampled_from(["same", "other args", "part", "longer", "first", "other args"])
bits = st.integers(1, 2 ** len(NAMES) - 1)
policies = st.sampled_from(["rerun", "keep", "error"])


class Workers(RuleBasedStateMachine):
    """Copies of a script on one database, and what has to become of it."""

    happened: ClassVar[Counter] = Counter()  # over all runs, to see that the interesting things do happen

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, "runs.db")
        self.monkeypatch = pytest.MonkeyPatch()
        self.evaluations: dict[str, Modelled] = {}
        self.attempts: list[Attempt] = []
        self.workers: dict[int, ModelledWorker] = {}
        self.copies: list[Copy] = []
        self.issued: list[Claim] = []
        self.opened: list[SqliteStore] = []
        self.keepings: list = []
        self.first: dict[str, int] = {}
        self.gone: set[int] = set()
        self.max_attempts = 2
        self.at_once = 1  # evaluations taken back in one transaction
        self.results = 0
        self.pids = 100
        self.speaking = Process("host", 1, "here", "1")
        self.reader: sqlite3.Connection | None = None
        self.observer: SqliteStore | None = None
        self.seen: dict[int, int] = {}
        self.next_id = 0
        setattr_ = self.monkeypatch.setattr
        setattr_("speval.stores.sqlite_lease.is_gone", lambda p, machine: p.machine == machine and p.pid in self.gone)
        setattr_("speval.stores.sqlite_lease.this_process", lambda: self.speaking)
        setattr_("speval.stores.sqlite.this_process", lambda: self.speaking)
        setattr_("speval.stores.sqlite.secrets", SimpleNamespace(randbits=lambda bits: self.next_id))

    def run(self, coroutine):
        return self.runner.run(coroutine)

    # What happens

    @initialize(
        max_attempts=st.sampled_from([2, 1, 3]), at_once=st.sampled_from([1, 1, 2, 3]), lease=leases, size=st.integers(1, 9)
    )
    def begin(self, max_attempts, at_once, lease, size):
        self.at_once = at_once
        self.monkeypatch.setattr("speval.stores.sqlite_lease._BOUND", at_once)
        self.max_attempts = max_attempts
        self.first = dict.fromkeys(NAMES[:size], 0)
        self.start_copy("here", lease, 50, self.first, "error")
        self.reader = sqlite3.connect(self.path, isolation_level=None)
        self.observer = SqliteStore(self.path, "read")
        self.run(self.observer.open())

    @precondition(lambda self: len(self.copies) < MOST_COPIES)
    @rule(
        machine=st.sampled_from(["here", "here", "there"]),
        lease=leases,
        id=st.integers(1, 99),
        how=ways_to_seed,
        chosen=bits,
        on_changed=policies,
        idle=st.integers(0, 3),
        ahead=st.integers(0, 3),
    )
    def start(self, machine, lease, id, how, chosen, on_changed, idle, ahead):
        names = [name for number, name in enumerate(NAMES) if chosen >> number & 1]
        stored = {name: e.args for name, e in self.evaluations.items()}
        part = {name: stored.get(name, 0) for name in names}
        other = {name: 1 - args if name in names else args for name, args in stored.items()}
        other |= {name: 0 for name in names[-1:] if name not in stored}
        space = {"same": stored, "longer": stored | part, "other args": other, "part": part, "first": self.first}[how]
        copy = self.start_copy(machine, lease, id, space, on_changed)
        if copy is not None:
            if on_changed == "keep":  # who starts the same script a second time is told the same
                self.reconnect(copy)
            self.record(copy, idle=idle, ahead=ahead)

    def start_copy(self, machine, lease, id, space, on_changed):
        self.pids += 1
        clock = MovableClock()
        clock.now += 1e6 * self.pids  # nobody's clock has anything to do with another's
        clock.wall_now += 3600.0 * (self.pids % 5)
        copy = Copy(Process("host", self.pids, machine, "1"), clock, self.open_store(clock))
        if not self.seed(copy, space, on_changed):
            self.run(copy.store.close())
            return None
        self.copies.append(copy)
        self.register(copy, lease, id)
        return copy

    def open_store(self, clock):
        store = SqliteStore(self.path, "create", clock=clock)
        self.run(store.open())
        self.opened.append(store)
        return store

    def seed(self, copy, args_by_name, on_changed):
        space = Space()
        list(space.fill(args_by_name))
        new = [name for name in args_by_name if name not in self.evaluations]
        changed = [n for n, args in args_by_name.items() if n not in new and self.evaluations[n].args != args]
        gone = [name for name in self.evaluations if name not in args_by_name]
        try:
            if changed and on_changed == "error":
                with pytest.raises(ArgsChangedError) as caught:
                    self.run(copy.store.seed(space, on_changed))
                assert caught.value.count == len(changed)
                self.happened["args changed, refused"] += 1
                return False
            seeded = self.run(copy.store.seed(space, on_changed))
        finally:
            space.close()
        unchanged = len(args_by_name) - len(new) - len(changed)
        assert (seeded.new, seeded.unchanged, seeded.changed, seeded.gone) == (len(new), unchanged, len(changed), len(gone))
        wall = copy.clock.wall()
        for name in new:
            self.evaluations[name] = Modelled(len(self.evaluations) + 1, name, args_by_name[name], wall)
        if on_changed == "rerun":
            for evaluation in (self.evaluations[name] for name in changed):
                self.happened[f"rerun while {evaluation.status}"] += 1
                evaluation.put_back(wall, charge=True)
                evaluation.args = args_by_name[evaluation.name]
                evaluation.attempt += 1
                self.forgive(evaluation)
        copy.space = dict(args_by_name)
        copy.ids = {self.evaluations[name].id for name in args_by_name}
        copy.since = len(self.attempts)
        self.happened["strangers"] += bool(gone)
        return True

    def forgive(self, evaluation):
        evaluation.charged = 0
        evaluation.forgiven = sum(a.id == evaluation.id for a in self.attempts)

    def register(self, copy, lease, id):
        while id in self.workers:
            id += 100
        self.next_id = id
        self.speaking = copy.process
        assert self.run(copy.store.register(lease)) == id
        if copy.keeping is None:
            copy.keeping = copy.store.lease_keeping()
            self.keepings.append(copy.keeping)
        copy.worker = id
        self.workers[id] = ModelledWorker(id, copy.process, lease)

    @precondition(lambda self: self.copies)
    @rule(which=index, lease=leases, id=st.integers(1, 99))
    def register_anew(self, which, lease, id):
        copy = self.copy(which)
        if self.has_ended(copy):
            self.register(copy, lease, id)
            self.happened["registered anew"] += 1

    @precondition(lambda self: self.copies)
    @rule(which=index, idle=st.integers(0, 3), ahead=st.integers(0, 3), count=st.booleans())
    def claim(self, which, idle, ahead, count):
        self.record(self.copy(which), idle=idle, ahead=ahead, count_failures=count)

    @precondition(lambda self: self.copies)
    @rule(which=index, ends=st.lists(st.tuples(index, outcomes), min_size=1, max_size=4), idle=st.integers(0, 2))
    def end(self, which, ends, idle):
        copy, held = self.holding(which, "in_progress")
        if held:
            self.record(copy, [self.ended(held[-1 - i % len(held)], how) for i, how in ends], idle=idle)

    @precondition(lambda self: self.copies)
    @rule(which=index)
    def end_all_for_another_attempt(self, which):
        copy, held = self.holding(which, "in_progress")
        if held:
            self.record(copy, [self.ended(claim, "again") for claim in held])

    @precondition(lambda self: self.issued)
    @rule(
        which=index,
        ends=st.lists(st.tuples(st.integers(0, 30), outcomes), max_size=4),
        released=st.lists(st.integers(0, 30), max_size=3),
        due=st.lists(st.integers(0, 30), max_size=3),
        idle=st.integers(0, 2),
        ahead=st.integers(0, 2),
    )
    def wake_up_late_and_record_all_one_ever_had(self, which, ends, released, due, idle, ahead):
        copy = self.copy(which)
        own = copy.claims or self.issued
        self.record(
            copy,
            [self.ended(own[-1 - i % len(own)], how) for i, how in ends],
            [own[-1 - i % len(own)] for i in released],
            [own[-1 - i % len(own)] for i in due],
            idle=idle,
            ahead=ahead,
        )

    @precondition(lambda self: self.issued)
    @rule(
        which=index,
        claimed=index,
        forged=st.sampled_from(["worker", "attempt", "both"]),
        verb=st.sampled_from(["release", "end", "due"]),
        how=outcomes,
    )
    def write_with_a_token_that_was_never_given(self, which, claimed, forged, verb, how):
        status = "held" if verb == "due" else "in_progress"
        claims = [claim for claim in self.issued if self.is_good(claim, status)] or self.issued
        claim = claims[-1 - claimed % len(claims)]
        if forged != "attempt":
            claim = claim._replace(worker=next((id for id in self.workers if id != claim.worker), 7))
        if forged != "worker":
            claim = claim._replace(attempt=claim.attempt - 1)
        if claim not in self.issued:
            self.happened["forged"] += 1
            ended, given_back, due = ([claim] if verb == v else [] for v in ("end", "release", "due"))
            self.record(self.copy(which), [self.ended(c, how) for c in ended], given_back, due)

    @precondition(lambda self: self.copies)
    @rule(which=index, which_ones=picks, idle=st.integers(0, 2))
    def release(self, which, which_ones, idle):
        copy, held = self.holding(which, "in_progress")
        if held:
            self.record(copy, released=[held[-1 - i % len(held)] for i in which_ones], idle=idle)

    @precondition(lambda self: self.copies)
    @rule(which=index, idle=st.integers(1, 3), ahead=st.integers(0, 3))
    def claim_and_give_back_for_others(self, which, idle, ahead):
        copy = self.copy(which)
        claims = self.record(copy, idle=idle, ahead=ahead).claims
        self.record(copy, released=claims, idle=1, ahead=ahead)

    @precondition(lambda self: self.copies)
    @rule(which=index, which_ones=picks, idle=st.integers(0, 2))
    def backoff_is_over(self, which, which_ones, idle):
        copy, held = self.holding(which, "held")
        if held:
            self.record(copy, due=[held[-1 - i % len(held)] for i in which_ones], idle=idle)

    @precondition(lambda self: self.copies)
    @rule(which=index)
    def leave(self, which):
        self.let_leave(self.copy(which))

    def let_leave(self, copy):
        self.run(copy.store.leave(copy.worker))
        for evaluation in self.held_by(copy.worker):
            self.happened[f"left with one {evaluation.status}"] += 1
            evaluation.put_back(copy.clock.wall(), charge=False)
        self.workers[copy.worker].ended = True

    @precondition(lambda self: self.copies)
    @rule(which=index)
    def renew(self, which):
        self.let_renew(self.copy(which))

    def let_renew(self, copy):
        lives = not self.has_ended(copy)
        assert copy.keeping.renew(copy.worker, 1.0) is lives
        self.workers[copy.worker].beat += lives
        self.happened["refused to renew"] += not lives

    @precondition(lambda self: self.copies)
    @rule(which=index, stalls=st.booleans())
    def stall_or_go_on(self, which, stalls):
        self.copy(which).stalls = stalls

    @rule(seconds=st.sampled_from([0.5, 4.9, 5.0, 9.9, 10.1, 31.0]))
    def time_goes_by(self, seconds):
        for copy in self.copies:
            copy.clock.now += seconds
            copy.clock.wall_now += seconds
        for copy in self.copies:
            if not copy.stalls:
                self.let_renew(copy)

    @rule(which=index, hours=st.sampled_from([-30, -1, 1, 700]))
    def somebody_sets_the_wall_clock(self, which, hours):
        if self.copies:
            self.copy(which).clock.wall_now += hours * 3600.0

    @precondition(lambda self: self.copies)
    @rule(
        which=index,
        other=index,
        meanwhile=st.sampled_from([None, "renew", "leave"]),
        interrupted=st.sampled_from([None, 1, 2]),
    )
    def reclaim(self, which, other, meanwhile, interrupted):
        self.let_reclaim(self.copy(which), self.copy(other), meanwhile, interrupted)

    @precondition(lambda self: len(self.copies) > 1)
    @rule(
        which=index,
        other=index,
        status=st.sampled_from(["in_progress", "held"]),
        more=st.integers(0, 3),
        stalls=st.sampled_from([True, True, True, False]),
        seconds=st.sampled_from([10.0, 5.0, 4.9, 30.0]),
        is_suspended=st.sampled_from([False, False, False, True]),
        meanwhile=st.sampled_from(["renew", None, "leave", None]),
        interrupted=st.sampled_from([1, None, 2]),
    )
    def watch_another(self, which, other, status, more, stalls, seconds, is_suspended, meanwhile, interrupted):
        watched, _ = self.holding(other, status)
        watcher = next(c for c in self.copies[which % len(self.copies) :] + self.copies if c is not watched)
        watcher.stalls, watched.stalls = False, stalls
        self.record(watched, idle=more, ahead=more // 2)
        self.let_reclaim(watcher)
        self.time_goes_by(seconds)
        if is_suspended:
            self.come_back(watcher)
        self.let_reclaim(watcher, watched, meanwhile, interrupted)
        watched.stalls = False
        if interrupted is not None and self.has_ended(watched):
            # It starts anew, and takes back from its former self what is still to be taken back.
            self.register(watched, self.workers[watched.worker].lease, 1)
            self.let_reclaim(watched)

    @precondition(lambda self: self.copies)
    @rule(which=index)
    def come_back_from_a_suspend(self, which):
        self.come_back(self.copy(which))

    def come_back(self, copy):
        copy.keeping.forget()
        copy.sights.clear()

    @precondition(lambda self: len(self.copies) > 1)
    @rule(which=index)
    def die(self, which):
        self.let_die(self.copy(which))

    def let_die(self, copy):
        self.copies.remove(copy)
        self.gone.add(copy.process.pid)
        copy.keeping.close()
        self.run(copy.store.close())

    @precondition(lambda self: self.copies)
    @rule(
        which=index,
        names=st.one_of(st.none(), st.none(), st.lists(st.sampled_from(NAMES), max_size=4)),
        status=st.sampled_from(["failed", "completed"]),
    )
    def retry(self, which, names, status):
        copy = self.copy(which)
        unknown = [name for name in names or () if name not in self.evaluations]
        if unknown:
            with pytest.raises(UnknownNameError):
                self.run(copy.store.retry(names, status))
            return
        chosen = [e for e in self.evaluations.values() if e.status == status and (names is None or e.name in names)]
        assert self.run(copy.store.retry(names, status)) == len(chosen)
        for evaluation in chosen:
            self.happened[f"retried {status}"] += 1
            evaluation.put_back(copy.clock.wall(), charge=True)
            self.forgive(evaluation)

    @precondition(lambda self: self.copies)
    @rule(which=index)
    def connect_anew(self, which):
        self.reconnect(self.copy(which))

    def reconnect(self, copy):
        self.run(copy.store.close())
        copy.store = self.open_store(copy.clock)
        assert self.seed(copy, copy.space, "keep")

    @precondition(lambda self: self.copies)
    @rule(which=index, limit=st.integers(1, 4))
    def follow_the_feed(self, which, limit):
        self.follow(self.copy(which), limit)

    def follow(self, copy, limit):
        ended = [e for e in self.evaluations.values() if e.id in copy.ids and not e.is_open and e.last >= copy.followed]
        ended = sorted(ended, key=lambda e: e.last)[:limit]
        copy.cursor, got = self.run(copy.store.ended_since(copy.cursor, limit))
        assert got == [(e.id, self.shown(e)) for e in ended]
        copy.followed = ended[-1].last + 1 if len(ended) == limit else len(self.attempts)

    @precondition(lambda self: self.copies)
    @rule(which=index)
    def sum_up(self, which):
        copy = self.copy(which)
        mine = [e for e in self.evaluations.values() if e.id in copy.ids]
        counts = Counter("pending" if e.status == "held" else e.status for e in mine)
        summary = self.run(copy.store.summary())
        for status in ("pending", "in_progress", "completed", "failed"):
            assert getattr(summary, status) == counts[status]
        assert summary.causes == Counter(self.attempts[e.last].outcome for e in mine if e.status == "failed")

    # How it happens

    def copy(self, which):
        return self.copies[which % len(self.copies)]

    def holding(self, which, status):
        """Return a copy that has claims of that status, and these."""
        held = [(copy, [claim for claim in copy.claims if self.is_good(claim, status)]) for copy in self.copies]
        held = [pair for pair in held if pair[1]] or held
        return held[which % len(held)]

    def has_ended(self, copy):
        worker = self.workers[copy.worker]
        return worker.ended or worker.dead

    def held_by(self, worker):
        return [e for e in self.evaluations.values() if e.holder == worker]

    def is_good(self, claim, status="in_progress"):
        evaluation = self.evaluations[claim.name]
        return (evaluation.status, evaluation.attempt, evaluation.holder) == (status, claim.attempt, claim.worker)

    def ended(self, claim, how):
        if how == "completed":
            self.results += 1
            return Ended(claim, Outcome(None, str(self.results), None, 5.0, 0.25), False)
        # As the engine does it: another attempt only within the budget.
        again = how == "again" and claim.charged < self.max_attempts
        cause = "timeout" if how == "again" else how
        error = {"cause": cause, "type": "SomeError", "message": "boom", "traceback": "Traceback: boom"}
        return Ended(claim, Outcome(cause, None, error, 5.0, 0.25), again)

    def record(self, copy, ended=(), released=(), due=(), idle=0, ahead=0, *, count_failures=False):
        wall = copy.clock.wall()
        recorded = self.run(
            copy.store.record(
                copy.worker, ended, released=released, due=due, idle=idle, ahead=ahead, count_failures=count_failures
            )
        )
        refused = []
        for claim, outcome, again in ended:
            if not self.is_good(claim):
                refused.append(claim)
                self.happened["a stale token refused"] += 1
                continue
            evaluation = self.evaluations[claim.name]
            evaluation.status = "held" if again else "failed" if outcome.cause else "completed"
            evaluation.holder = claim.worker if again else None
            self.add_attempt(evaluation, claim.worker, outcome.cause or "completed", outcome.result, 5.0, 0.25)
            evaluation.updated = wall
            self.happened[evaluation.status] += 1
        assert recorded.refused == refused
        for claim in released:
            if self.is_good(claim):
                self.evaluations[claim.name].put_back(wall, charge=False)
                self.happened["released"] += 1
        for claim in due:
            if self.is_good(claim, "held"):
                evaluation = self.evaluations[claim.name]
                evaluation.status, evaluation.holder = "pending", None
                self.happened["due"] += 1
        mine = [e for e in self.evaluations.values() if e.id in copy.ids]
        pending = [e for e in mine if e.status == "pending"]
        writes = bool(ended or released or due or ((idle or ahead) and pending))
        assert recorded.lost is bool(writes and (idle or ahead) and self.has_ended(copy))
        if recorded.lost:
            self.happened["found itself lost"] += 1
            assert recorded.claims == []
            return recorded
        self.take_claims(copy, recorded.claims, pending, idle, ahead, wall)
        if recorded.open is not None:
            assert recorded.open is any(e.is_open for e in mine)
        elif idle:
            assert len(recorded.claims) >= idle
        failed = [e for e in mine if e.status == "failed" and e.last >= copy.since]
        assert recorded.failures == (len(failed) if count_failures else None)
        return recorded

    def take_claims(self, copy, claims, pending, idle, ahead, wall):
        at_once = pending[:idle]
        assert [c.id for c in claims][: len(at_once)] == [e.id for e in at_once]
        later = [c.id for c in claims[len(at_once) :]]
        allowed = [e.id for e in pending[len(at_once) :] if e.charged == 0 and not e.is_suspect]
        assert later == [id for id in allowed if id in later]
        assert len(later) <= ahead
        by_id = {e.id: e for e in pending}
        for number, claim in enumerate(claims):
            evaluation = by_id[claim.id]
            evaluation.status, evaluation.holder, evaluation.updated = "in_progress", copy.worker, wall
            evaluation.is_ahead = number >= len(at_once)
            evaluation.attempt += 1
            evaluation.made += 1
            evaluation.charged += 1
            expected = (
                evaluation.id,
                evaluation.attempt,
                evaluation.charged,
                evaluation.name,
                str(evaluation.args),
                copy.worker,
            )
            assert claim == expected
            assert (claim.id, claim.attempt) not in {(c.id, c.attempt) for c in self.issued}
            copy.claims.append(claim)
            self.issued.append(claim)
            self.happened["claimed ahead" if evaluation.is_ahead else "claimed"] += 1

    def add_attempt(self, evaluation, worker, outcome, result, started_at, duration):
        evaluation.last = len(self.attempts)
        self.attempts.append(Attempt(evaluation.id, evaluation.attempt, worker, outcome, result, started_at, duration))

    def let_reclaim(self, copy, other=None, meanwhile=None, interrupted=None):
        """Reclaim, with something else happening between the look and the verdict, or an end between two transactions."""
        now = copy.clock.monotonic()
        rows = [w for _, w in sorted(self.workers.items()) if not w.ended and w.id != copy.worker]
        looked = {w.id: w.beat for w in rows}
        due = {w.id for w in rows if w.dead}
        for worker in rows:
            beat, since = copy.sights.get(worker.id, (None, now))
            if worker.dead:
                continue
            if beat != worker.beat:
                copy.sights[worker.id] = (worker.beat, now)
            elif now - since >= worker.lease:
                due.add(worker.id)
        # Of those whose process is gone at least the next one in the order of ids has to be found, and any of them may be.
        here = [w for w in rows if w.process.machine == copy.process.machine and w.id not in due]
        gone = {w.id for w in here if w.process.pid in self.gone}
        ring = sorted(here, key=lambda w: (w.id < copy.worker, w.id))
        allowed = due | gone
        due |= {w.id for w in ring[:1]} & gone
        pending, failed, dead, transactions = 0, [], [], []

        raced: list[str | None] = []
        file = copy.keeping._opened()
        original = file.write

        def write(work, row, max_attempts):
            nonlocal pending
            assert row.id in allowed, "taken back from one that nobody has reason to believe dead"
            if other is not None and row.id == other.worker and other in self.copies and not raced:
                raced.append(meanwhile)
                self.happened[f"{meanwhile or 'nothing'} between look and verdict"] += 1
                if meanwhile == "renew":
                    self.let_renew(other)
                elif meanwhile == "leave":
                    self.let_leave(other)
            if interrupted == len(transactions):
                self.happened["interrupted in taking back"] += 1
                raise Interrupted
            transactions.append(row.id)
            got = original(work, row, max_attempts)
            more, back, names = self.take_back(self.workers[row.id], looked[row.id], copy.clock.wall())
            if more is None:
                return got  # it has renewed, or left: whatever says so
            assert (got[1], got[2]) == (back, names)
            if row.id not in dead:
                dead.append(row.id)
            pending += back
            failed.extend(names)
            return got

        file.write = write
        try:
            reclaimed = copy.keeping.reclaim(copy.worker, self.max_attempts)
        except Interrupted:
            reclaimed = None
        finally:
            del file.write
        if reclaimed is None:
            for half_dead in self.copies:
                if self.workers[half_dead.worker].dead and not self.workers[half_dead.worker].ended:
                    self.let_renew(half_dead)
                    self.record(half_dead, idle=1)
            return
        assert due <= set(transactions)
        assert (reclaimed.pending, reclaimed.failed) == (pending, failed)
        said = [int(label.rpartition(":")[2], 16) for label in reclaimed.workers]
        assert said == dead, "reported as dead are others than those that were taken back from"
        assert all(self.workers[id].ended for id in dead)

    def take_back(self, worker, beat, wall):
        """Do what one transaction has to do; None if nothing, because the worker has renewed or left."""
        if worker.ended or not (worker.dead or worker.beat == beat):
            return None, 0, []
        worker.dead = True
        held = sorted(self.held_by(worker.id), key=lambda e: e.id)[: self.at_once]
        pending, failed = 0, []
        for evaluation in held:
            if evaluation.status == "held":
                evaluation.put_back(wall, charge=True)
                self.happened["taken back in its backoff"] += 1
            elif evaluation.is_ahead and not evaluation.is_suspect:
                evaluation.put_back(wall, charge=False)
                evaluation.is_suspect = True
                self.happened["taken back uncharged"] += 1
            else:
                self.add_attempt(evaluation, worker.id, "lost", None, evaluation.updated, None)
                evaluation.put_back(wall, charge=True)
                self.happened["taken back"] += 1
                if evaluation.charged >= self.max_attempts:
                    evaluation.status = "failed"
                    failed.append(evaluation.name)
                    self.happened["failed as lost"] += 1
            pending += evaluation.is_open
        worker.ended = len(held) < self.at_once
        return not worker.ended, pending, failed

    # What has to be so after each step

    def shown(self, evaluation):
        """Return the evaluation as people have to see it."""
        status = "pending" if evaluation.status == "held" else evaluation.status
        has_ended = not evaluation.is_open
        last = self.attempts[evaluation.last] if has_ended else None
        worker = last.worker if has_ended else evaluation.holder if status == "in_progress" else None
        error = None
        if status == "failed":
            text = ("SomeError", "boom", "Traceback: boom")
            if last.outcome == "lost":
                text = ("WorkerLost", f"worker {self.label(worker)} died or was out of reach", "")
            error = dict(zip(("cause", "type", "message", "traceback"), (last.outcome, *text), strict=True))
        return {
            "name": evaluation.name,
            "status": status,
            "updated": evaluation.updated,
            "result": json.loads(last.result) if status == "completed" else None,
            "args": evaluation.args,
            "attempts": evaluation.made,
            "error": error,
            "started": last.started_at if has_ended else evaluation.updated if status == "in_progress" else None,
            "duration": last.duration if has_ended else None,
            "worker": None if worker is None else self.label(worker),
        }

    def label(self, worker):
        return f"host:{self.workers[worker].process.pid}:{worker:012x}"

    @invariant()
    def the_file_holds_what_it_has_to(self):
        if self.reader is None:
            return
        Workers.happened["steps"] += 1
        by_id = sorted(self.evaluations.values(), key=lambda e: e.id)
        stored = self.reader.execute(
            "SELECT e.id, CAST(e.name AS TEXT), e.args, s.status, s.attempt, s.attempt - s.released,"
            " s.attempt - s.released - s.forgiven, s.worker, s.updated_at,"
            " (SELECT count(*) FROM attempts WHERE evaluation = e.id), s.last"
            " FROM evaluations AS e LEFT JOIN states AS s ON s.id = e.id ORDER BY e.id"
        ).fetchall()
        assert len(stored) == len(by_id), "an evaluation is lost"
        assert self.reader.execute("SELECT count(*) FROM states").fetchone() == (len(by_id),)
        attempts = self.reader.execute(
            "SELECT seq, evaluation, attempt, worker, outcome, result, started_at, duration FROM attempts ORDER BY seq"
        ).fetchall()
        assert [Attempt(*row[1:]) for row in attempts] == self.attempts
        assert len({(a.id, a.attempt) for a in self.attempts}) == len(self.attempts), "an attempt is recorded twice"
        for e, (id, name, args, code, attempt, made, charged, worker, updated, recorded, last) in zip(
            by_id, stored, strict=True
        ):
            status = STATUSES[code]
            assert (id, name, args, status, attempt, worker) == (e.id, e.name, str(e.args), e.status, e.attempt, e.holder)
            assert (made, charged, updated) == (e.made, e.charged, e.updated)
            # The budget is told by what was recorded, whatever the counters say.
            assert charged == recorded - e.forgiven + (status == "in_progress")
            assert charged <= self.max_attempts
            assert attempt >= self.seen.get(id, 0), "the number of an attempt has gone back"
            self.seen[id] = attempt
            assert (worker is not None) == (status in ("in_progress", "held"))
            assert worker is None or not self.workers[worker].ended, "held by one that has ended"
            assert last == (None if e.last is None else attempts[e.last][0])
        workers = self.reader.execute("SELECT id, beat, dead, ended_at IS NOT NULL FROM workers ORDER BY id").fetchall()
        assert workers == [(w.id, w.beat, w.dead, w.ended) for _, w in sorted(self.workers.items())]

    @invariant()
    def people_see_what_the_file_holds(self):
        if self.observer is None:
            return
        expected = [self.shown(e) for e in sorted(self.evaluations.values(), key=lambda e: e.id)]
        _, loaded = self.run(self.observer.load(None, 0, 1000))
        assert loaded == expected
        view = self.reader.execute("SELECT name, status, updated, result, args FROM evals").fetchall()
        columns = [(e["name"], e["status"], e["updated"], e["result"], e["args"]) for e in expected]
        assert [(n, s, u, None if r is None else json.loads(r), json.loads(a)) for n, s, u, r, a in view] == columns

    # How it ends

    def teardown(self):
        try:
            if sys.exc_info()[0] is None and self.reader is not None:
                self.one_worker_alone_ends_everything()
        finally:
            self.monkeypatch.undo()
            if self.reader is not None:
                self.reader.close()
            for keeping in self.keepings:
                keeping.close()
            for store in [*self.opened, self.observer]:
                if store is not None:
                    with suppress(Exception):
                        self.run(store.close())
            self.runner.close()
            self.folder.cleanup()

    def one_worker_alone_ends_everything(self):
        while self.copies:
            self.follow(self.copies[0], 1000)
            self.let_die(self.copies[0])
        everything = {name: e.args for name, e in self.evaluations.items()}
        last = self.start_copy("here", 10.0, 1, everything, "error")
        self.let_reclaim(last)
        assert not [w for w in self.workers.values() if w.process.machine == "here" and not w.ended and w.id != last.worker]
        last.clock.now += 30.0
        self.let_reclaim(last)
        for _ in self.evaluations:
            recorded = self.record(last, idle=1, ahead=2)
            self.the_file_holds_what_it_has_to()
            if not recorded.claims:
                break
            self.record(last, [self.ended(claim, "completed") for claim in recorded.claims])
        assert self.record(last, idle=1).open is False
        self.the_file_holds_what_it_has_to()
        self.people_see_what_the_file_holds()
        assert not [e for e in self.evaluations.values() if e.is_open]
        while last.followed < len(self.attempts):
            self.follow(last, 2)
        _, ended = self.run(last.store.ended_since(0, 1000))
        assert sorted(ended, key=lambda pair: pair[0]) == [(e.id, self.shown(e)) for e in self.evaluations.values()]


def run_workers(examples: int, steps: int, **options) -> None:
    """Let the workers loose so many times, for so many steps each."""
    checks = list(HealthCheck)
    run_state_machine_as_test(
        Workers,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=checks,
            print_blob=False,
            **options,
        ),
    )


@pytest.mark.timeout(600)  # of which it takes as much only to find the shortest way to a failure
def test_whatever_workers_do_to_each_other_the_store_keeps_its_promises():
    Workers.happened.clear()
    run_workers(120, 50, derandomize=True)
    rare = {"failed as lost", "taken back uncharged", "taken back in its backoff", "interrupted in taking back", "forged"}
    # A renewal between look and verdict is too rare to be found at will; tests/test_store.py has it by itself.
    rare |= {"found itself lost", "a stale token refused", "refused to renew", "strangers"}
    rare |= {"rerun while in_progress", "retried failed", "due", "released", "args changed, refused"}
    assert rare <= {what for what, count in Workers.happened.items() if count}, (
        "the steps say nothing about what never happened"
    )
