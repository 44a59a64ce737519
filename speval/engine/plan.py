"""What a worker does next.

Owns the numbers of the engine: how much to claim, how long to rest, how much to hand to a slot at once, when a run is over.
Invariant: pure. A state and the time come in and a decision comes out; nothing here reads, writes, waits or rolls dice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["LOOK", "Commit", "Decision", "Finish", "Rest", "State", "plan", "share", "wanted"]

LOOK = 0.5  # seconds between two polls for changed settings, when nothing else wakes the worker
_AHEAD = 0.03  # seconds of work claimed beyond what the slots can start at once
_MOST_AHEAD = 1000  # evaluations claimed ahead, to share the cost of a commit; more makes commits long, not cheaper
_STALE = 0.15  # seconds after which claims that have not started are given back
_AT_ONCE = 0.002  # seconds of work handed to a slot at once, where that spares round trips
_MOST_AT_ONCE = 64  # evaluations
_SHORTEST = 1e-6  # seconds an evaluation counts as, at least


@dataclass(frozen=True, slots=True)
class State:
    """How a worker stands.

    Attributes:
        concurrency: How many slots may run.
        running: How many slots run.
        ready: Claims that have not started.
        unwritten: Claims that have ended or are released, and are not written yet.
        due_at: When the first backoff is over, monotonic seconds; None if no claim is held.
        mean: Seconds an evaluation takes, over the last ones.
        is_slow: No evaluation has ended for a while.
        is_dry: The last claim brought less than was wanted, and nothing has changed since.
        has_news: Other workers have written.
        is_open: An evaluation of the space has not ended yet, here or elsewhere.
        waits: The run goes on while other workers hold evaluations.
        poll: Seconds until the next look for what other workers have written, while there is nothing to claim.
        draws: A lazy space may yield more.
        is_paused: The workers of the database are paused.
        in_doubt: The lease is in doubt.
        is_stopping: The worker claims nothing any more.
    """

    concurrency: int = 1
    running: int = 0
    ready: int = 0
    unwritten: int = 0
    due_at: float | None = None
    mean: float = 1.0
    is_slow: bool = False
    is_dry: bool = False
    has_news: bool = False
    is_open: bool = True
    waits: bool = True
    poll: float = LOOK
    draws: bool = False
    is_paused: bool = False
    in_doubt: bool = False
    is_stopping: bool = False


class Commit(NamedTuple):
    """Write what has ended, and claim: so many for free slots, and so many ahead."""

    idle: int
    ahead: int


class Rest(NamedTuple):
    """Wait until something happens, at most so many seconds.

    ``idle`` and ``ahead`` are what the slots would take meanwhile, for a lazy space to draw.
    """

    seconds: float
    idle: int
    ahead: int


class Finish(NamedTuple):
    """End the run."""


Decision = Commit | Rest | Finish


def plan(state: State, now: float) -> Decision:
    """Return what to do next; ``now`` is in monotonic seconds."""
    idle, ahead = wanted(state)
    is_due = state.due_at is not None and state.due_at <= now
    if state.unwritten or is_due or state.has_news or (idle and not state.is_dry):
        return Commit(idle, ahead)
    if _is_finished(state):
        return Finish()
    return Rest(_pause(state, now), idle, ahead)


def wanted(state: State) -> tuple[int, int]:
    """Return how many claims are wanted for free slots, and how many ahead."""
    if state.is_stopping or state.in_doubt:
        return 0, 0
    free = state.concurrency - state.running
    idle = max(0, free - state.ready)
    # Many evaluations that are much shorter than a commit are claimed at once; long ones only when a slot is free for them.
    # With more slots than that, more evaluations end during one commit.
    most = max(_MOST_AHEAD, 2 * state.concurrency)
    target = 0 if state.is_slow else min(most, int(_AHEAD * state.concurrency / max(state.mean, _SHORTEST)))
    return idle, max(0, target - max(0, state.ready - free))


def share(ready: int, concurrency: int, mean: float) -> int:
    """Return how many claims to hand to one slot at once.

    Args:
        ready: Claims that have not started.
        concurrency: How many slots may run.
        mean: Seconds an evaluation takes.
    """
    fair = -(-ready // concurrency)
    return max(1, min(_MOST_AT_ONCE, fair, int(_AT_ONCE / max(mean, _SHORTEST))))


def _is_finished(state: State) -> bool:
    if state.running or state.ready or state.unwritten:
        return False
    if state.is_stopping:
        return True
    if state.draws or state.due_at is not None or state.in_doubt or not state.is_dry:
        return False
    return not state.is_open or not (state.waits or state.is_paused)


def _pause(state: State, now: float) -> float:
    """Return the seconds to rest, unless something happens before."""
    pauses = [LOOK]
    if state.due_at is not None:
        pauses.append(state.due_at - now)
    if state.is_dry and state.running < state.concurrency and not state.is_stopping:
        pauses.append(state.poll)
    if state.ready:
        pauses.append(_STALE)
    return max(0.0, min(pauses))
