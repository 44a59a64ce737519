"""One call of the user's function, wherever it happens.

Owns how a function that returned, raised or ran for too long becomes an outcome. Invariant: what comes out is text and numbers
only, and nothing the function or its objects do escapes as an exception. The worker processes load this module alone, without
the package, so it imports next to nothing.
"""

from __future__ import annotations

from ..codec import decode, encode
from ..errors import UnserializableError

TYPE_CHECKING = False  # worker processes import this module, and typing takes longer than all of it
if TYPE_CHECKING:
    from typing import Any

    from ..clock import Clock
    from ..model import Function, Result, RetryOn

__all__ = ["completed", "evaluate", "failed", "outcome"]

_LONGEST_MESSAGE = 10_000  # characters; an exception that carries a whole document is cut
_LONGEST_TRACEBACK = 100_000


def evaluate(function: Function, name: str, args: str, retry_on: RetryOn, clock: Clock) -> Result:
    """Call the function and encode how it ended."""
    started_at, started = clock.wall(), clock.monotonic()
    try:
        result = function(decode(args))
    # SystemExit and KeyboardInterrupt too: raised by the function they are its failure and must not end the program.
    except BaseException as error:
        return failed(error, retry_on, started_at, clock.monotonic() - started)
    return completed(result, name, started_at, clock.monotonic() - started)


def completed(result: Any, name: str, started_at: float, duration: float) -> Result:
    """Return the outcome of a function that returned."""
    try:
        return None, encode(result, f"the result of evaluation {name!r}"), None, started_at, duration, False
    except UnserializableError as error:
        return outcome("unserializable", _name(error.__cause__ or error), str(error), "", started_at, duration)
    except BaseException as error:  # a hostile object's own code runs while it is encoded
        return outcome("unserializable", _name(error), _text(error), _trace(error), started_at, duration)


def failed(error: BaseException, retry_on: RetryOn, started_at: float, duration: float) -> Result:
    """Return the outcome of a function that raised."""
    again = isinstance(error, retry_on)
    return outcome("exception", _name(error), _text(error), _trace(error), started_at, duration, again)


def outcome(
    cause: str, type_: str, message: str, trace: str, started_at: float, duration: float, again: bool = False
) -> Result:
    """Return the outcome of a call that failed, its texts cut and escaped so that they can be stored."""
    message, trace = _storable(message, _LONGEST_MESSAGE), _storable(trace, _LONGEST_TRACEBACK)
    error = {"cause": cause, "type": _storable(type_, 200), "message": message, "traceback": trace}
    return cause, None, error, started_at, duration, again


def _storable(text: str, longest: int) -> str:
    """Cut the middle out of a long text and escape what UTF-8 can't carry."""
    if len(text) > longest:
        text = f"{text[: longest // 2]}\n[... {len(text) - longest} characters ...]\n{text[-longest // 2 :]}"
    return text.encode(errors="backslashreplace").decode()


def _name(error: BaseException) -> str:
    return type(error).__qualname__


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return f"<{_name(error)} whose text can't be made>"


def _trace(error: BaseException) -> str:
    """Return the traceback as Python prints it, without our own frame on top."""
    import traceback  # takes longer than many a call, and few calls need it

    trace = error.__traceback__
    try:
        return "".join(traceback.format_exception(type(error), error, trace.tb_next if trace else None))
    except BaseException:
        return "".join(traceback.format_tb(trace.tb_next if trace else None))
