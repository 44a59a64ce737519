"""The values everything else speaks in.

Owns the shapes that leave speval (``Evaluation``, ``Summary``), those that travel inside (``Claim``, ``Outcome``), and
those that people at a terminal look at (``Overview``, ``Attempt``, ``Health``).
Invariant: plain data without behaviour that could fail; the pair (evaluation, attempt) is the fencing token.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn, TypedDict

from .errors import EvaluationsFailed
from .escape import visible

__all__ = [
    "LONGEST_LEASE",
    "MOST_CONCURRENCY",
    "Attempt",
    "Cause",
    "Claim",
    "Compacted",
    "Durability",
    "Error",
    "EvalSpace",
    "Evaluation",
    "Failure",
    "Finding",
    "Function",
    "Health",
    "OnChanged",
    "Outcome",
    "Outputs",
    "Overview",
    "Pairs",
    "Result",
    "RetryOn",
    "Running",
    "Settings",
    "Status",
    "Summary",
    "WorkerState",
    "WorkerView",
    "counted",
]

Status = Literal["pending", "in_progress", "completed", "failed"]
Durability = Literal["process", "power"]
OnChanged = Literal["error", "keep", "rerun"]
Function = Callable[[Any], Any]
# What a function yields that serves as an eval space: pairs of a name and args, or None for "nothing just now".
Pairs = Iterable[tuple[str, Any] | None] | AsyncIterable[tuple[str, Any] | None]
EvalSpace = Mapping[str, Any] | Iterable[Any] | AsyncIterable[Any] | Callable[[Callable[[], Any]], Pairs]
RetryOn = tuple[type[BaseException], ...]
Outputs = tuple[int | None, int | None]  # what a worker process gets as stdout and stderr; None: what this process has
# cause, result as JSON, error, started_at, duration, again: the fields of an Outcome, as worker processes tell them.
Result = tuple[str | None, str | None, dict[str, str] | None, float, float, bool]
Cause = Literal["exception", "timeout", "crash", "lost", "unserializable"]
WorkerState = Literal["alive", "silent", "dead", "ended"]


def counted(count: int, noun: str = "evaluation") -> str:
    """Return a count as people say it: 1 evaluation, 2 evaluations."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class Error(TypedDict):
    """Why an evaluation failed."""

    cause: Cause
    type: str
    message: str
    traceback: str


class Evaluation(TypedDict):
    """One evaluation as it stands in the database.

    Attributes:
        name: Its key; evaluations of a list space are named "0", "1" and so on.
        status: ``pending``, ``in_progress``, ``completed`` or ``failed``.
        updated: When the status last changed, unix seconds.
        result: What the function returned, None while there is no result.
        args: What the function is given.
        attempts: How many attempts were made, one under way included; those given back on Ctrl-C don't count.
        error: None unless failed.
        started: When the last attempt started, unix seconds, or None.
        duration: How long the last attempt ran, seconds, or None while it runs.
        worker: Who made the last attempt, ``host:pid:id``, or None.
    """

    name: str
    status: Status
    updated: float
    result: Any
    args: Any
    attempts: int
    error: Error | None
    started: float | None
    duration: float | None
    worker: str | None


class _Causes(dict[Cause, int]):
    """Counts by cause that can't be changed; a dict, so that ``dataclasses.asdict``, ``json`` and ``copy`` take it."""

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("a Summary can't be changed")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)  # not item by item, as dicts are


@dataclass(frozen=True, slots=True)
class Summary:
    """How a call ended: the evaluations of its eval space by status.

    Attributes:
        pending: Evaluations nobody has started or that wait for another attempt.
        in_progress: Evaluations a worker holds.
        completed: Evaluations with a result.
        failed: Evaluations that ended without one.
        causes: Of the failed ones, how many by cause.
        recorded: How many of the completed and failed ones this call recorded itself.
        seconds: How long the call took.
        stopped: Why the call ended before everything was done, or None.
    """

    pending: int
    in_progress: int
    completed: int
    failed: int
    causes: Mapping[Cause, int] = field(default_factory=dict)
    recorded: int = 0
    seconds: float = 0.0
    stopped: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "causes", _Causes(self.causes))

    @property
    def total(self) -> int:
        """Return the number of evaluations in the eval space."""
        return self.pending + self.in_progress + self.completed + self.failed

    def _causes_text(self) -> str:
        return visible(", ".join(f"{count} {cause}" for cause, count in sorted(self.causes.items())))

    def raise_for_failures(self) -> None:
        """Raise ``EvaluationsFailed`` if an evaluation failed."""
        if self.failed:
            raise EvaluationsFailed(self.failed, self.total, self._causes_text())

    def __str__(self) -> str:
        parts = [f"{self.completed} completed"]
        if self.failed:
            parts.append(f"{self.failed} failed ({self._causes_text()})")
        if self.in_progress:
            parts.append(f"{self.in_progress} in progress")
        if self.pending:
            parts.append(f"{self.pending} pending")
        stopped = f"; stopped: {self.stopped}" if self.stopped else ""
        return f"{counted(self.total)}: {', '.join(parts)} in {self.seconds:.1f} s ({self.recorded} by this call){stopped}"


class Claim(NamedTuple):
    """A worker's right to make one attempt; ``(id, attempt)`` is its fencing token.

    A tuple, because a run makes one for each evaluation and a dataclass costs three times as much to make.
    """

    id: int
    attempt: int
    charged: int  # attempts charged to the budget, this one included
    name: str
    args: str
    worker: int

    def __repr__(self) -> str:
        return f"<Claim {self.name!r} attempt {self.attempt}>"


class Outcome(NamedTuple):
    """How one attempt ended, as its executor tells it."""

    cause: Cause | None  # None: completed
    result: str | None  # JSON text
    error: Error | None
    started_at: float  # unix seconds
    duration: float  # seconds
    again: bool = False  # may be tried again, if the budget allows


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at an evaluation, as people look at it.

    Attributes:
        number: Its number, half of its fencing token; those given back unused leave gaps.
        worker: Who made it, ``host:pid:id``, or None if that is not known.
        started_at: Unix seconds, or None if it never began.
        ended_at: Unix seconds, None while it runs.
        duration: Seconds, or None.
        outcome: ``completed`` or the cause of its failure, None while it runs.
        result: What the function returned.
        error: None if completed or under way.
    """

    number: int
    worker: str | None
    started_at: float | None
    ended_at: float | None
    duration: float | None
    outcome: Literal["completed"] | Cause | None
    result: Any
    error: Error | None


LONGEST_LEASE = 86_400.0  # seconds, also of one that a stranger has written into a database
MOST_CONCURRENCY = 1_000_000  # of a call or a setting; far more than any machine runs at once


class Settings(NamedTuple):
    """What people have set for all workers of a database.

    Attributes:
        paused: Nobody claims anything; what runs, runs on.
        concurrency: Evaluations each worker runs at once, whatever its call says; None: as its call says.
    """

    paused: bool = False
    concurrency: int | None = None


@dataclass(frozen=True, slots=True)
class Running:
    """An evaluation under way: its name, and since when (unix seconds)."""

    name: str
    since: float


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker, as people look at it.

    Attributes:
        worker: ``host:pid:id``, as everywhere.
        host: The machine it runs on.
        pid: The number of its process there.
        state: ``alive``; ``silent``: no sign of life for its lease, by the clocks on the wall; ``dead``: declared dead, or its
            process on this machine is gone; ``ended``: it has left.
        started_at: Unix seconds.
        last_seen: Unix seconds.
        ended_at: Unix seconds, None until it has left or all it held was taken back.
        lease: Seconds.
        runs: What it runs right now, the longest running first; not all of it if it is much.
        running: How many it runs.
        ahead: How many it has claimed ahead and, as far as can be known, not begun.
        held: How many it holds for their backoff.
    """

    worker: str
    host: str
    pid: int
    state: WorkerState
    started_at: float
    last_seen: float
    ended_at: float | None
    lease: float
    runs: tuple[Running, ...]
    running: int
    ahead: int
    held: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed evaluation, in short."""

    name: str
    cause: Cause
    type: str
    message: str
    attempts: int
    ended_at: float
    worker: str | None


@dataclass(frozen=True, slots=True)
class Overview:
    """A whole database at one moment.

    Attributes:
        at: When, unix seconds.
        pending: Evaluations nobody runs.
        in_progress: Evaluations a worker holds.
        completed: Evaluations with a result.
        failed: Evaluations that ended without one.
        causes: Of the failed ones, how many by cause.
        rate: Attempts that ended per second since the oldest of the living workers started: over the last minute, or over the
            last ten attempts where that is longer. None if there were none.
        settings: What the workers are asked to obey.
        workers: Those that have not ended, the oldest first.
        failures: The last failed evaluations, the newest first.
    """

    at: float
    pending: int
    in_progress: int
    completed: int
    failed: int
    causes: Mapping[Cause, int]
    rate: float | None
    settings: Settings
    workers: tuple[WorkerView, ...]
    failures: tuple[Failure, ...]

    @property
    def total(self) -> int:
        """Return the number of evaluations in the database."""
        return self.pending + self.in_progress + self.completed + self.failed

    @property
    def open(self) -> int:
        """Return the number of evaluations that have not ended."""
        return self.pending + self.in_progress


class Compacted(NamedTuple):
    """What compacting a database did: bytes before and after, and how many workers that had left were forgotten."""

    before: int
    after: int
    workers: int


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a database that somebody should know.

    Attributes:
        problem: What it is.
        fix: What to do about it.
        is_error: Whether it keeps speval from working, or has cost data; else it is a hint.
    """

    problem: str
    fix: str
    is_error: bool


@dataclass(frozen=True, slots=True)
class Health:
    """What a look under the bonnet has found: facts by name, in the order to show them, and findings, errors first."""

    facts: Mapping[str, str | int | float | bool | None]
    findings: tuple[Finding, ...]
