"""One call of the user's function, wherever it happens.

Owns how a function that returned, raised or ran for too long becomes an outcome. Invariant: what comes out is text and numbers
only, and nothing the function or its objects do escapes as an exception. The worker processes load this module alone, without
the package, so it imports next to nothing.
"""

from __future__ import annotations

import os
import sys

from ..codec import decode, encode
from ..errors import UnserializableError

TYPE_CHECKING = False  # worker processes import this module, and typing takes longer than all of it
if TYPE_CHECKING:
    from typing import Any

    from ..clock import Clock
    from ..model import Function, Result, RetryOn

__all__ = ["OUTPUT_CLOSED", "completed", "evaluate", "failed", "outcome"]

OUTPUT_CLOSED = "output closed"  # a cause that is never recorded: the end of the call, not of the evaluation

_LONGEST_MESSAGE = 10_000  # characters; an exception that carries a whole document is cut
_LONGEST_TRACEBACK = 100_000


def evaluate(function: Function, name: str, args: str, retry_on: RetryOn, clock: Clock) -> Result:
    """Call the function and encode how it ended."""
    started_at, started, pid = clock.wall(), clock.monotonic(), os.getpid()
    try:
        result = function(decode(args))
    # SystemExit and KeyboardInterrupt too: raised by the function they are its failure and must not end the program.
    except BaseException as error:
        leave_if_forked(pid, error)
        return failed(error, retry_on, started_at, clock.monotonic() - started)
    leave_if_forked(pid, None)
    return completed(result, name, started_at, clock.monotonic() - started)


def leave_if_forked(pid: int, error: BaseException | None) -> None:
    """End this process if it is a child that the function has forked and that came back from it: it has no part in the run."""
    if os.getpid() == pid:
        return
    code = 0 if error is None else 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    elif error is not None:
        import traceback

        traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: S110
            pass
    os._exit(code & 0xFF)


def completed(result: Any, name: str, started_at: float, duration: float) -> Result:
    """Return the outcome of a function that returned."""
    what = f"the result of evaluation {name!r}"
    try:
        return None, encode(result, what), None, started_at, duration, False
    except UnserializableError as error:
        return outcome("unserializable", _name(error.__cause__ or error), str(error), "", started_at, duration)
    except BaseException as error:  # a hostile object's own code runs while it is encoded
        return _shown("unserializable", error, started_at, duration, again=False)


def failed(error: BaseException, retry_on: RetryOn, started_at: float, duration: float) -> Result:
    """Return the outcome of a function that raised."""
    if _is_about_a_pipe(error) and _output_is_closed():
        return outcome(OUTPUT_CLOSED, "BrokenPipeError", _text(error), "", started_at, duration)
    # Not isinstance(), which asks the exception itself.
    return _shown("exception", error, started_at, duration, again=issubclass(type(error), retry_on))


def _is_about_a_pipe(error: BaseException | None) -> bool:
    """Tell whether an exception is a BrokenPipeError, or comes of one."""
    try:
        for _ in range(10):
            if error is None or issubclass(type(error), BrokenPipeError):
                return error is not None
            error = error.__cause__ or error.__context__
    except BaseException:  # noqa: S110 - the exception's own code
        pass
    return False


def _output_is_closed() -> bool:
    """Tell whether stdout or stderr is a pipe without a reader, as behind ``| head -1``."""
    import select  # few calls need it

    descriptors = {1, 2}
    for stream in (sys.stdout, sys.stderr):
        try:
            descriptors.add(stream.fileno())
        except Exception:  # noqa: S110 - it may be closed, replaced by anything, or None
            pass
    try:
        poll = select.poll()
        for descriptor in descriptors:
            poll.register(descriptor, 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    except Exception:  # such as after gevent's patches, which leave no poll()
        return False


def _shown(cause: str, error: BaseException, started_at: float, duration: float, again: bool) -> Result:
    """Return an outcome with what can be shown of an exception, whose own code may fail or lie whenever it is looked at."""
    try:
        return outcome(cause, _name(error), _text(error), _trace(error), started_at, duration, again)
    except BaseException:
        return outcome(cause, _name(error), "an exception that can't be shown", "", started_at, duration, again)


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
    return str(type.__dict__["__qualname__"].__get__(type(error)))  # bypasses an unusual metaclass


def _text(error: BaseException) -> str:
    try:
        return "".join((str(error), ""))  # a plain string, whatever kind of one it was
    except BaseException:
        return f"<{_name(error)} whose text can't be made>"


def _trace(error: BaseException) -> str:
    """Return the traceback as Python prints it, without our own frame on top."""
    import traceback  # takes longer than many a call, and few calls need it

    trace = error.__traceback__
    try:
        return "".join(traceback.format_exception(type(error), error, trace.tb_next if trace else None))
    except BaseException:
        try:
            return "".join(traceback.format_tb(trace.tb_next if trace else None))
        except BaseException:  # no memory left, say
            return ""
