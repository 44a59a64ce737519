"""Where the user's function runs.

Owns the shape all executors share: N slots, each with one call at a time, so the number of slots is the limit. Invariant: a
call ends within its timeout plus a short grace, whatever the function does, and its outcome is data, never an exception.
"""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from ..clock import Clock
from ..codec import decode, encode
from ..errors import UnserializableError
from ..model import Cause, Outcome

__all__ = ["Executor", "Slot", "evaluate", "failed", "timed_out"]

Function = Callable[[Any], Any]
RetryOn = tuple[type[BaseException], ...]

_LONGEST_MESSAGE = 10_000  # characters; an exception that carries a whole document is cut
_LONGEST_TRACEBACK = 100_000


class Slot(ABC):
    """Runs one evaluation at a time."""

    @abstractmethod
    async def call(self, name: str, args: str, timeout: float | None) -> Outcome:
        """Run the function once.

        Args:
            name: The evaluation's name, for messages.
            args: Its args as JSON.
            timeout: Seconds it may run from the moment the function is called.

        Returns:
            How it ended. When the call is cancelled, it stops the function, or lets go of it where that can't be done, and
            raises the cancellation within a short grace; but a function that has ended by then has an outcome, which is
            returned all the same.
        """

    @abstractmethod
    async def close(self) -> None:
        """Give back what the slot holds, within a short grace."""


class Executor(ABC):
    """Makes slots.

    Attributes:
        can_stop: Whether cancelling a call really ends the function, so that it is worth doing when a lease is in doubt.
    """

    can_stop: bool

    @abstractmethod
    def slot(self, number: int) -> Slot:
        """Return a new slot; ``number`` counts from 0 and is for names of threads and tasks."""

    @abstractmethod
    async def close(self) -> None:
        """Give back what the slots share; they are all closed by then."""


def evaluate(function: Function, name: str, args: str, retry_on: RetryOn, clock: Clock) -> Outcome:
    """Call the function and encode how it ended."""
    started_at, started = clock.wall(), clock.monotonic()
    try:
        result = function(decode(args))
    # SystemExit and KeyboardInterrupt too: raised by the function they are its failure and must not end the program.
    except BaseException as error:
        return failed(error, retry_on, started_at, clock.monotonic() - started)
    return completed(result, name, started_at, clock.monotonic() - started)


def completed(result: Any, name: str, started_at: float, duration: float) -> Outcome:
    """Return the outcome of a function that returned."""
    try:
        return Outcome(None, encode(result, f"the result of evaluation {name!r}"), None, started_at, duration)
    except UnserializableError as error:
        return _outcome("unserializable", type(error.__cause__ or error), str(error), "", started_at, duration)
    except BaseException as error:  # a hostile object's own code runs while it is encoded
        return _outcome("unserializable", type(error), _text(error), _trace(error), started_at, duration)


def failed(error: BaseException, retry_on: RetryOn, started_at: float, duration: float) -> Outcome:
    """Return the outcome of a function that raised."""
    again = isinstance(error, retry_on)
    return _outcome("exception", type(error), _text(error), _trace(error), started_at, duration, again)


def timed_out(timeout: float, where: str, started_at: float, duration: float) -> Outcome:
    """Return the outcome of a function that ran for too long; ``where`` is the stack it was stopped in."""
    return _outcome("timeout", TimeoutError, f"ran longer than {timeout:g} s", where, started_at, duration, again=True)


def _outcome(
    cause: Cause, type_: type, message: str, trace: str, started_at: float, duration: float, again: bool = False
) -> Outcome:
    message, trace = (_storable(message, _LONGEST_MESSAGE), _storable(trace, _LONGEST_TRACEBACK))
    error = {"cause": cause, "type": _storable(type_.__qualname__, 200), "message": message, "traceback": trace}
    return Outcome(cause, None, error, started_at, duration, again)  # type: ignore[arg-type]


def _storable(text: str, longest: int) -> str:
    """Cut the middle out of a long text and escape what UTF-8 can't carry."""
    if len(text) > longest:
        text = f"{text[: longest // 2]}\n[... {len(text) - longest} characters ...]\n{text[-longest // 2 :]}"
    return text.encode(errors="backslashreplace").decode()


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return f"<{type(error).__qualname__} whose text can't be made>"


def _trace(error: BaseException) -> str:
    """Return the traceback as Python prints it, without our own frame on top."""
    trace = error.__traceback__
    try:
        return "".join(traceback.format_exception(type(error), error, trace.tb_next if trace else None))
    except BaseException:
        return "".join(traceback.format_tb(trace.tb_next if trace else None))
