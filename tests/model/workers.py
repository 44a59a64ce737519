"""What may happen to workers, for Hypothesis to choose from."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from speval.errors import UnknownNameError

from .kinds import Kind
from .values import NAMES
from .world import World

CAUSES = ["exception", "timeout", "crash", "unserializable"]
MOST_COPIES = 4

index = st.integers(0, 7)
picks = st.lists(index, min_size=1, max_size=4)
leases = st.sampled_from([5.0, 10.0, 30.0])
outcomes = st.sampled_from(["completed", "completed", "again", "again", "again", *CAUSES])
ways_to_seed = st.sampled_from(["same", "other args", "part", "longer", "first", "other args"])
bits = st.integers(1, 2 ** len(NAMES) - 1)
policies = st.sampled_from(["rerun", "keep", "error"])


class Workers(World, RuleBasedStateMachine):
    """Steps in any order."""

    # What happens

    @initialize(
        max_attempts=st.sampled_from([2, 1, 3]), at_once=st.sampled_from([1, 1, 2, 3]), lease=leases, size=st.integers(1, 9)
    )
    def begin(self, max_attempts, at_once, lease, size):
        self.at_once = at_once
        self.monkeypatch.setattr("speval.stores.liveness._BOUND", at_once)
        self.max_attempts = max_attempts
        self.first = dict.fromkeys(NAMES[:size], 0)
        self.start_copy("here", lease, 50, self.first, "error")
        self.observer = self.kind.control()

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

    @precondition(lambda self: self.copies)
    @rule(which=index)
    def renew(self, which):
        self.let_renew(self.copy(which))

    @precondition(lambda self: self.copies)
    @rule(which=index, stalls=st.booleans())
    def stall_or_go_on(self, which, stalls):
        self.copy(which).stalls = stalls

    @rule(seconds=st.sampled_from([0.5, 4.9, 5.0, 9.9, 10.1, 31.0]))
    def time_goes_by(self, seconds):
        self.kind.pass_time(seconds)
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

    @precondition(lambda self: len(self.copies) > 1)
    @rule(which=index)
    def die(self, which):
        self.let_die(self.copy(which))

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
                self.put_back(copy, names, status)
            return
        chosen = [e for e in self.evaluations.values() if e.status == status and (names is None or e.name in names)]
        assert self.put_back(copy, names, status) == len(chosen)
        for evaluation in chosen:
            self.happened[f"retried {status}"] += 1
            evaluation.put_back(copy.clock.wall(), charge=True)
            self.forgive(evaluation)

    @precondition(lambda self: self.copies)
    @rule(which=index)
    def connect_anew(self, which):
        self.reconnect(self.copy(which))

    @precondition(lambda self: self.copies)
    @rule(which=index, limit=st.integers(1, 4))
    def follow_the_feed(self, which, limit):
        self.follow(self.copy(which), limit)

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


def run_workers(kind: type[Kind], examples: int, steps: int, **options) -> None:
    """Let the workers loose so many times, for so many steps each."""
    checks = list(HealthCheck)
    run_state_machine_as_test(
        lambda: Workers(kind),  # type: ignore[arg-type]
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
