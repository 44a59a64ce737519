"""The data types that all modules share.

Owns the public types (``Evaluation``, ``Summary``), the internal ones (``Claim``, ``Outcome``), and those for the command and
``Database`` (``Overview``, ``Attempt``, ``Health``).
Invariant: plain data without behaviour that can fail; the pair (evaluation, attempt) is the fencing token.
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
# What an adaptive space yields: pairs of a name and args, or None for "nothing to evaluate at the moment".
Pairs = Iterable[tuple[str, Any] | None] | AsyncIterable[tuple[str, Any] | None]
EvalSpace = Mapping[str, Any] | Iterable[Any] | AsyncIterable[Any] | Callable[[Callable[[], Any]], Pairs]
RetryOn = tuple[type[BaseException], ...]
Outputs = tuple[int | None, int | None]  # stdout and stderr of a worker process; None: those of this process
# The fields of an Outcome as worker processes send them: cause, result as JSON, error, started_at, duration, again.
Result = tuple[str | None, str | None, dict[str, str] | None, float, float, bool]
Cause = Literal["exception", "timeout", "crash", "lost", "unserializable"]
WorkerState = Literal["alive", "silent", "dead", "ended"]


def counted(count: int, noun: str = "evaluation") -> str:
    """Return a count with its noun: 1 evaluation, 2 evaluations."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class Error(TypedDict):
    """Why an evaluation failed."""

    cause: Cause
    type: str
    message: str
    traceback: str


class Evaluation(TypedDict):
    """One stored evaluation.

    Attributes:
        name: Its key; evaluations of a list space are named "0", "1" and so on.
        status: ``pending``, ``in_progress``, ``completed`` or ``failed``.
        updated: When the status last changed, unix seconds.
        result: What the function returned; None without a result.
        args: The argument of the function.
        attempts: The number of attempts, a running one included, released ones (Ctrl-C) excluded.
        error: Why the evaluation failed; None unless it failed.
        started: When the last attempt started, unix seconds, or None.
        duration: How long the last attempt ran, seconds, or None while it runs.
        worker: The worker of the last attempt, ``host:pid:id``, or None.
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
    """Read-only counts by cause; a dict, so that ``dataclasses.asdict``, ``json`` and ``copy`` accept it."""

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("a Summary is read-only")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)  # pickle restores other dicts item by item, which _refuse rejects


@dataclass(frozen=True, slots=True)
class Summary:
    """The evaluations of an eval space counted by status, at the end of a call.

    Attributes:
        pending: Evaluations that wait for an attempt.
        in_progress: Evaluations that a worker holds.
        completed: Evaluations with a result.
        failed: Evaluations that ended without a result.
        causes: The number of failed evaluations per cause.
        recorded: The number of completed and failed evaluations that this call recorded itself.
        seconds: How long the call took.
        stopped: Why the call ended early, or None.
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

    A tuple, because a run creates one per evaluation, and creating a dataclass takes three times as long.
    """

    id: int
    attempt: int
    charged: int  # charged attempts so far, this one included
    name: str
    args: str
    worker: int

    def __repr__(self) -> str:
        return f"<Claim {self.name!r} attempt {self.attempt}>"


class Outcome(NamedTuple):
    """How one attempt ended, as its executor reports it."""

    cause: Cause | None  # None: completed
    result: str | None  # JSON text
    error: Error | None
    started_at: float  # unix seconds
    duration: float  # seconds
    again: bool = False  # another attempt may follow, if the attempt budget allows


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at an evaluation, for display.

    Attributes:
        number: Its number, half of its fencing token; released attempts leave gaps.
        worker: The worker, ``host:pid:id``, or None if it is unknown.
        started_at: Unix seconds, or None if it never started.
        ended_at: Unix seconds, None while it runs.
        duration: Seconds, or None.
        outcome: ``completed`` or the cause of its failure, None while it runs.
        result: What the function returned.
        error: None if it is completed or running.
    """

    number: int
    worker: str | None
    started_at: float | None
    ended_at: float | None
    duration: float | None
    outcome: Literal["completed"] | Cause | None
    result: Any
    error: Error | None


LONGEST_LEASE = 86_400.0  # seconds; a longer lease in a database is treated as this long
MOST_CONCURRENCY = 1_000_000  # of a call or a setting; far more than any machine can run


class Settings(NamedTuple):
    """The settings for all workers of a database.

    Attributes:
        paused: Workers claim nothing; running evaluations continue.
        concurrency: Evaluations that each worker runs at once; it overrides the call. None: the value of the call.
    """

    paused: bool = False
    concurrency: int | None = None


@dataclass(frozen=True, slots=True)
class Running:
    """A running evaluation: its name, and when it started (unix seconds)."""

    name: str
    since: float


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker, for display.

    Attributes:
        worker: ``host:pid:id``.
        host: The machine it runs on.
        pid: Its process id there.
        state: ``alive``; ``silent``: no renewal for a whole lease by wall clock; ``dead``: declared dead, or its process on
            this machine has ended; ``ended``: it has left.
        started_at: Unix seconds.
        last_seen: Unix seconds.
        ended_at: Unix seconds; None until it has left, or until all its claims were reclaimed.
        lease: Seconds.
        runs: The evaluations that it runs, the longest running first; the list may be incomplete.
        running: The number of evaluations that it runs.
        ahead: The number of evaluations claimed ahead and probably not started.
        held: The number of evaluations that it holds during their backoff.
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
    """A failed evaluation: a short form of ``Evaluation``."""

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
        at: The time of the overview, unix seconds.
        pending: Evaluations that no worker holds and that have not ended.
        in_progress: Evaluations that a worker holds.
        completed: Evaluations with a result.
        failed: Evaluations that ended without a result.
        causes: The number of failed evaluations per cause.
        rate: Ended attempts per second since the oldest live worker started: over the last minute, or over the last ten
            attempts if that is longer. None without any.
        settings: The settings for all workers.
        workers: The workers that have not ended, the oldest first.
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
    """The result of compacting a database: bytes before and after, and the number of ended workers that were deleted."""

    before: int
    after: int
    workers: int


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem of a database.

    Attributes:
        problem: What is wrong.
        fix: How to fix it.
        is_error: Whether it stops speval from working or has destroyed data; otherwise it is a hint.
    """

    problem: str
    fix: str
    is_error: bool


@dataclass(frozen=True, slots=True)
class Health:
    """The result of a check of a database: facts by name, in display order, and findings, errors first."""

    facts: Mapping[str, str | int | float | bool | None]
    findings: tuple[Finding, ...]
