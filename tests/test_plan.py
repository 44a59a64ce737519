"""What a worker does next, as a table."""

from dataclasses import replace
from itertools import islice

import pytest

from speval.engine.plan import LOOK, Commit, Finish, Rest, State, plan, share
from speval.pauses import pauses

NOW = 1000.0
DONE = State(is_dry=True, is_open=False)  # all there is has ended
WAITS = State(concurrency=4, is_dry=True, poll=0.02)  # others hold the rest

TABLE = {
    # Claiming: for free slots, and ahead as much as is worth 30 ms of all slots' work.
    "at the start": (State(concurrency=4), Commit(4, 0)),
    "one slot is free": (State(concurrency=4, running=3), Commit(1, 0)),
    "no slot is free": (State(concurrency=4, running=4), Rest(LOOK, 0, 0)),
    "claims are ready for all free slots": (State(concurrency=4, running=2, ready=2), Rest(0.15, 0, 0)),
    "more slots run than may": (State(concurrency=2, running=5), Rest(LOOK, 0, 0)),
    "evaluations of 31 ms": (State(concurrency=1, mean=0.031), Commit(1, 0)),
    "evaluations of 30 ms": (State(concurrency=1, mean=0.03), Commit(1, 1)),
    "evaluations of 1 ms": (State(concurrency=4, mean=0.001), Commit(4, 120)),
    "some are ahead already": (State(concurrency=4, running=4, ready=50, mean=0.001, unwritten=1), Commit(0, 70)),
    "enough are ahead": (State(concurrency=4, running=4, ready=120, mean=0.001, unwritten=1), Commit(0, 0)),
    "ready ones that free slots take are not ahead": (State(concurrency=4, running=1, ready=3, mean=0.001), Rest(0.15, 0, 120)),
    "evaluations of no time": (State(concurrency=1, mean=0.0), Commit(1, 1000)),
    "no time, more slots": (State(concurrency=1000, mean=0.0), Commit(1000, 2000)),
    "nothing has ended for a while": (State(concurrency=4, mean=0.001, is_slow=True), Commit(4, 0)),
    # Writing: what there is goes out at once, whatever is claimed with it.
    "an outcome": (State(running=1, unwritten=1), Commit(0, 0)),
    "an outcome, and the slot is free": (State(unwritten=1), Commit(1, 0)),
    "an outcome, and nothing to claim": (State(unwritten=1, is_dry=True), Commit(1, 0)),
    "an outcome of a worker that stops": (State(unwritten=1, is_stopping=True), Commit(0, 0)),
    "an outcome while the lease is in doubt": (State(unwritten=1, in_doubt=True), Commit(0, 0)),
    "others have written": (replace(WAITS, has_news=True), Commit(4, 0)),
    "others have written, and no slot is free": (State(running=1, has_news=True), Commit(0, 0)),
    # Backoffs.
    "a backoff is over": (State(running=1, due_at=NOW), Commit(0, 0)),
    "a backoff is soon over": (State(running=1, due_at=NOW + 0.25), Rest(0.25, 0, 0)),
    "a backoff is long": (State(running=1, due_at=NOW + 60), Rest(LOOK, 0, 0)),
    "only held ones are left": (replace(DONE, due_at=NOW + 0.25, poll=0.3), Rest(0.25, 1, 0)),
    # Resting.
    "nothing to claim": (WAITS, Rest(0.02, 4, 0)),
    "nothing to claim for a long time": (replace(WAITS, poll=0.25), Rest(0.25, 4, 0)),
    "nothing to claim, and no slot free": (replace(WAITS, running=4), Rest(LOOK, 0, 0)),
    "ready ones go stale": (State(running=1, ready=5), Rest(0.15, 0, 0)),
    "ready ones, and a backoff that is over before": (State(running=1, ready=5, due_at=NOW + 0.125), Rest(0.125, 0, 0)),
    "a lazy space is asked": (State(concurrency=4, mean=0.001, is_dry=True, draws=True), Rest(LOOK, 4, 120)),
    "in doubt": (State(in_doubt=True), Rest(LOOK, 0, 0)),
    "in doubt, and nothing was left": (replace(DONE, in_doubt=True, poll=0.3), Rest(0.3, 0, 0)),
    "it stops, and something runs": (State(running=1, is_stopping=True), Rest(LOOK, 0, 0)),
    # The end.
    "all has ended": (DONE, Finish()),
    "all has ended, as far as is known": (replace(DONE, is_dry=False), Commit(1, 0)),
    "the last one runs": (replace(DONE, running=1), Rest(LOOK, 0, 0)),
    "others hold the rest": (replace(DONE, is_open=True, poll=0.02), Rest(0.02, 1, 0)),
    "others hold the rest, and it does not wait": (replace(DONE, is_open=True, waits=False), Finish()),
    "the same while paused": (replace(DONE, is_open=True, waits=False, is_paused=True, poll=0.1), Rest(0.1, 1, 0)),
    "a lazy space may yield more": (replace(DONE, draws=True, poll=0.1), Rest(0.1, 1, 0)),
    "it stops": (State(is_stopping=True), Finish()),
    "it stops, and holds one for its backoff": (State(is_stopping=True, due_at=NOW + 9), Finish()),
    "it stops with all of the space open": (State(is_stopping=True, draws=True, in_doubt=True), Finish()),
}


@pytest.mark.parametrize(("state", "decision"), TABLE.values(), ids=TABLE)
def test_a_worker_decides(state, decision):
    assert plan(state, NOW) == decision


def test_a_rest_is_never_negative_and_never_longer_than_a_look():
    for state, decision in TABLE.values():
        if isinstance(decision, Rest):
            assert 0 < decision.seconds <= LOOK
            assert plan(replace(state, unwritten=1), NOW) == Commit(decision.idle, decision.ahead)


@pytest.mark.parametrize(
    ("ready", "concurrency", "mean", "many"),
    [
        (1, 1, 1e-6, 1),
        (64, 1, 1e-6, 64),
        (1000, 1, 0.0, 64),  # never more than 64
        (1000, 1, 0.0001, 20),  # 2 ms of work
        (1000, 1, 0.0011, 1),
        (1000, 1, 60.0, 1),  # always one
        (10, 4, 1e-6, 3),  # a fair share, rounded up
        (3, 4, 1e-6, 1),
    ],
)
def test_a_slot_gets_a_share(ready, concurrency, mean, many):
    assert share(ready, concurrency, mean) == many


def test_pauses_grow_to_the_longest_and_are_random():
    bounds = [0.05, 0.1, 0.2, 0.4, 0.5, 0.5]
    for _ in range(100):
        found = list(islice(pauses(0.05, 0.5), 6))
        assert all(bound / 2 <= pause <= bound for pause, bound in zip(found, bounds, strict=True))
    assert len({next(pauses(0.05, 0.5)) for _ in range(100)}) > 1


def test_pauses_of_hours_stay_at_the_longest():
    for pause in islice(pauses(0.02, 0.25, growth=1.3, spread=0.3), 100_000, 100_100):
        assert 0.25 * 0.7 <= pause <= 0.25


def test_the_first_pause_is_no_longer_than_the_longest():
    assert next(pauses(2.0, 0.1, spread=0.0)) == 0.1
