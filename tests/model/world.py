"""What copies do to a store, each time beside what the model says of it, and what has to be so afterwards.

Invariant: the model is changed by what was done, never by what the store has answered, except where the store may choose.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import pytest

from speval.errors import ArgsChangedError
from speval.host import Process
from speval.model import Error, Outcome
from speval.spaces.eager import Space
from speval.stores.base import Ended, Record

from ..conftest import MovableClock
from .expected import Expected
from .values import Attempt, Copy, Modelled, ModelledWorker


class Interrupted(BaseException):
    """A copy is interrupted between two transactions."""


class World(Expected):
    """Copies of a script on one database, and what they do there."""

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

    def put_back(self, copy, names, status):
        with self.kind.control("write", copy.clock) as control:
            return control.retry(names, status=status)

    def open_store(self, clock):
        store = self.kind.store(clock)
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
        self.happened["unlisted"] += bool(gone)
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
        self.kind.renewed(self.workers[id])

    def let_leave(self, copy):
        self.run(copy.store.leave(copy.worker))
        for evaluation in self.held_by(copy.worker):
            self.happened[f"left with one {evaluation.status}"] += 1
            evaluation.put_back(copy.clock.wall(), charge=False)
        self.workers[copy.worker].ended = True

    def let_renew(self, copy):
        lives = not self.has_ended(copy)
        assert copy.keeping.renew(copy.worker, 1.0) is lives
        if lives:
            self.workers[copy.worker].beat += 1
            self.kind.renewed(self.workers[copy.worker])
        self.happened["refused to renew"] += not lives

    def come_back(self, copy):
        copy.keeping.forget()
        copy.sights.clear()
        copy.sights[0] = copy.clock.monotonic()

    def let_die(self, copy):
        self.copies.remove(copy)
        self.gone.add(copy.process.pid)
        copy.keeping.close()
        self.run(copy.store.close())

    def reconnect(self, copy):
        self.run(copy.store.close())
        copy.store = self.open_store(copy.clock)
        assert self.seed(copy, copy.space, "keep")
        self.kind.reconnected(copy)

    def follow(self, copy, limit):
        ended = [e for e in self.evaluations.values() if e.id in copy.ids and not e.is_open and e.last >= copy.followed]
        ended = sorted(ended, key=lambda e: e.last)[:limit]
        copy.cursor, got = self.run(copy.store.ended_since(copy.cursor, limit))
        assert got == [(e.id, self.shown(e)) for e in ended]
        copy.followed = ended[-1].last + 1 if len(ended) == limit else len(self.attempts)

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
        cause: Any = "timeout" if how == "again" else how
        error: Error = {"cause": cause, "type": "SomeError", "message": "boom", "traceback": "Traceback: boom"}
        return Ended(claim, Outcome(cause, None, error, 5.0, 0.25), again)

    def record(self, copy, ended=(), released=(), due=(), idle=0, ahead=0, *, count_failures=False):
        wall = copy.clock.wall()
        record = Record(copy.worker, ended, released=released, due=due, idle=idle, ahead=ahead, count_failures=count_failures)
        recorded = self.run(copy.store.record(record))
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
        due = {w.id for w in rows if w.dead} | self.kind.overdue(copy, [w for w in rows if not w.dead], now)
        # Of those whose process is gone at least the next one in the order of ids has to be found, and any of them may be.
        here = [w for w in rows if w.process.machine == copy.process.machine and w.id not in due]
        gone = {w.id for w in here if w.process.pid in self.gone}
        ring = sorted(here, key=lambda w: (w.id < copy.worker, w.id))
        allowed = due | gone
        due |= {w.id for w in ring[:1]} & gone
        pending, failed, dead, transactions = 0, [], [], []

        raced: list[str | None] = []
        original = copy.keeping.take_back

        def take_back(row, max_attempts, bound):
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
            got = original(row, max_attempts, bound)
            more, back, names = self.take_back(self.workers[row.id], looked[row.id], copy.clock.wall())
            if more is None:
                return got  # it has renewed, or left: whatever says so
            assert (got[1], got[2]) == (back, names)
            if row.id not in dead:
                dead.append(row.id)
            pending += back
            failed.extend(names)
            return got

        copy.keeping.take_back = take_back
        try:
            reclaimed = copy.keeping.reclaim(copy.worker, self.max_attempts)
        except Interrupted:
            reclaimed = None
        finally:
            del copy.keeping.take_back
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

    # How it ends

    def teardown(self):
        try:
            if sys.exc_info()[0] is None and self.observer is not None:
                self.one_worker_alone_ends_everything()
        finally:
            self.monkeypatch.undo()
            for keeping in self.keepings:
                keeping.close()
            for store in self.opened:
                with suppress(Exception):
                    self.run(store.close())
            if self.observer is not None:
                self.observer.close()
            self.runner.close()
            self.kind.close()

    def one_worker_alone_ends_everything(self):
        while self.copies:
            self.follow(self.copies[0], 1000)
            self.let_die(self.copies[0])
        everything = {name: e.args for name, e in self.evaluations.items()}
        last = self.start_copy("here", 10.0, 1, everything, "error")
        self.let_reclaim(last)
        assert not [w for w in self.workers.values() if w.process.machine == "here" and not w.ended and w.id != last.worker]
        last.clock.now += 30.1
        self.kind.pass_time(30.1)
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
