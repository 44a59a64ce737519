"""The way from blocking code into an event loop, and back.

Owns the loop and the thread of one call, from before they begin until after they have ended. Invariant: whatever interrupts the
calling thread, and at whichever moment, ``close`` ends the call in good order; interrupted once more, it waits for nothing.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Generic, TypeVar

# Here, in the thread that imports speval, and not by the first cancel scope in a loop's thread: code that is executed there
# after a second interrupt makes CPython forget why the program ends, and its exit status is 1.
import anyio._backends._asyncio  # noqa: F401

from . import open_calls as calls
from . import threads
from .errors import SpevalError

__all__ = ["Call", "Future"]

logger = logging.getLogger("speval.worker")

T = TypeVar("T")

_END_WITHIN = 2.0  # seconds to wait for the loop's end, which a coroutine that refuses to end keeps away
_LOOK = 0.1  # seconds between two looks for the outcome of a call whose loop is still there


class _Latch:
    """Something that happens once. It is sound after an exception at any moment, which those of ``threading`` are not."""

    def __init__(self) -> None:
        self._is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        if not self._is_set:
            self._is_set = True
            self._lock.release()

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout: float = 60.0) -> bool:
        """Wait for it, or not even so long: ask again."""
        if not self._is_set and self._lock.acquire(timeout=timeout):
            self._lock.release()  # for the next one who waits
        return self._is_set


class Future(Generic[T]):
    """A value that another thread brings."""

    def __init__(self) -> None:
        self._is_there = _Latch()
        self._value: Any = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Tell whether it is there."""
        return self._is_there.is_set()

    def set_result(self, value: T) -> None:
        """Bring the value."""
        self._value = value
        self._is_there.set()

    def set_exception(self, error: BaseException) -> None:
        """Bring the exception that there is in place of a value."""
        self._error = error
        self._is_there.set()

    def result(self) -> T:
        """Wait for the value and return it, or raise."""
        while not self._is_there.wait():
            pass
        if self._error is not None:
            raise self._error
        value: T = self._value
        return value


class Call(Generic[T]):
    """One call: a coroutine in a new event loop in a new thread.

    It is new, begun, and over, or never begun at all. ``stop`` asks it to end, ``close`` waits for that. Use it like this,
    since an interrupt may come between any two steps, and the second ``close`` does what it kept the first one from doing::

        try:
            try:
                call.start()
                return call.result()
            finally:
                call.close()
        finally:
            call.close()

    Args:
        main: Makes the coroutine, in the loop.
        ended: Told how it ended.
        owner: Kept as long as the call.

    Attributes:
        has_begun: Whether the coroutine was begun.
        asker: The thread that has asked for something last.
    """

    def __init__(self, main: Callable[[], Coroutine[Any, Any, T]], ended: Future[T], owner: object = None) -> None:
        self.has_begun = False
        self.asker = threading.get_ident()
        self._main = main
        self._ended = ended
        self._owner = owner
        self._process = os.getpid()
        # No locks: an interrupt may come, and a finalizer may call stop(), within any statement. The caller writes _is_stopping
        # and then reads what the thread writes; the thread writes and then reads _is_stopping: so one of them sees the other.
        self._is_awake = False
        self._is_stopping = False
        self._is_at_exit = False
        self._is_left = False
        self._interrupts = 0  # of those who wait
        self._asked: deque[Future[Any]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over = _Latch()
        # A daemon, so that the second Ctrl-C waits for nothing.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="speval loop", daemon=True)

    def __repr__(self) -> str:
        state = "over" if self._over.is_set() else "begun" if self.has_begun else "new"
        return f"<Call {state}{' stopping' if self._is_stopping else ''}>"

    @property
    def is_over(self) -> bool:
        """Return whether there is nothing to wait for any more."""
        return self._is_left or self._over.is_set()

    # In the calling thread

    def start(self) -> None:
        """Begin."""
        calls.add(self)
        threads.start(self._thread)

    def result(self) -> T:
        """Wait for the end of the coroutine and return what it returned, or raise."""
        value: T = self._waited(self._ended)
        return value

    def ask(self) -> Any:
        """Return what the coroutine hands over next; None when it has ended.

        Raises:
            SpevalError: this is a process forked from the one in which the call is under way.
        """
        if self._process != os.getpid():
            problem = f"it was begun in process {self._process}, of which this one is a fork, and goes on there"
            raise SpevalError(f"this call of as_completed has no part here: {problem}; call as_completed again in this process")
        self.asker = threading.get_ident()
        future: Future[Any] = Future()
        self._asked.append(future)
        self._signal(lambda: self._wanted.set())
        if self._ended.done():
            self._answer_all()
        handed = self._waited(future)
        is_told = self._is_at_exit and threading.current_thread().daemon  # its loop must not seem to have come to its end
        if handed is None and (is_told or not self._is_stopping):
            self.result()  # raises, if the coroutine did
        return handed

    def _waited(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except asyncio.CancelledError:
            if self._is_at_exit and threading.current_thread().daemon:
                raise SystemExit from None  # the interpreter exits, and this thread ends without a word
            raise
        except SpevalError as error:
            # Frames of two threads would not help the reader of the traceback; the message is sufficient.
            raise error.with_traceback(None)  # noqa: B904 - it keeps the cause it has
        except BaseException:
            if not future.done():
                self._interrupts += 1
            raise

    def close(self, timeout: float | None = None) -> None:
        """End the call, if it has not ended by itself, and wait for that; interrupted a second time, let go of everything.

        Within a garbage collection, and in the loop itself, it does not wait; in a forked child, it does nothing.

        Args:
            timeout: Seconds to wait. None: until it has stopped in good order.
        """
        if self.is_over or self._process != os.getpid():
            return
        self.stop()
        if not self._is_awake:  # and never will be
            calls.discard(self)
        elif self._interrupts < 2 and not calls.is_collecting() and threading.get_ident() != self._thread.ident:
            try:
                self.wait(timeout)
            except BaseException:
                self._interrupts += 1
                if self._interrupts > 1:
                    self.leave()
                raise

    def stop(self, at_exit: bool = False) -> None:
        """Have the call end in good order; it waits for nothing, and any thread may call it, finalizers too."""
        if self._process != os.getpid():
            return
        self._is_stopping = True
        if at_exit:
            self._is_at_exit = True
        self._signal(self._cancel)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until a call that has begun is over, or until only what refuses to end is left of it."""
        if not self._is_awake:
            return
        until = None if timeout is None else time.monotonic() + timeout
        while not self._ended.done() and not self._over.wait(_LOOK):
            if until is not None and time.monotonic() > until:
                return
        if self._over.wait(_END_WITHIN):
            self._thread.join(_END_WITHIN)  # it has nothing left to do

    def leave(self) -> None:
        """Let go of everything at once, if there is anything left."""
        calls.discard(self)
        self._is_left = True
        if not self._over.is_set():
            self._signal(self._cancel_again)

    def _signal(self, callback: Callable[[], object]) -> None:
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(callback)

    # In the loop's thread

    def _run(self) -> None:
        self._is_awake = True
        try:
            if self._is_stopping:
                raise asyncio.CancelledError  # the caller may have left already
            self.has_begun = True
            with asyncio.Runner() as runner:
                loop = runner.get_loop()
                self._wanted = asyncio.Event()
                self._is_cancelled = False
                self._task = loop.create_task(self._main(), name="speval call")
                del self._main  # it knows us
                self._loop = loop
                if self._is_stopping:
                    self._cancel()
                self._bring(_complete(loop, self._task))
        except BaseException as error:
            if self._ended.done():
                logger.warning("the event loop of a call could not be closed in good order: %r", error)
            else:
                self._bring(error)
        finally:
            self._loop = self._owner = None
            calls.discard(self)
            self._over.set()

    def _bring(self, failure: BaseException | None) -> None:
        """Tell those who wait how it ended."""
        if failure is None:
            self._ended.set_result(self._task.result())
        else:
            self._ended.set_exception(failure)
        self._answer_all()

    def _answer_all(self) -> None:
        """Answer those who have asked that nothing more will come."""
        with suppress(IndexError):
            while True:
                self._asked.popleft().set_result(None)

    async def asked(self) -> None:
        """Wait until ``ask`` was called."""
        while not self._asked:
            self._wanted.clear()
            await self._wanted.wait()

    def hand_over(self, value: object) -> None:
        """Give a value to the one who has asked."""
        self._asked.popleft().set_result(value)

    def _cancel(self) -> None:
        if not self._is_cancelled:
            self._is_cancelled = True
            self._task.cancel()

    def _cancel_again(self) -> None:
        self._cancel()
        self._task.cancel()


def _complete(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> BaseException | None:
    """Run the loop until the task is done, past what would end other loops, and return what the task has raised.

    SystemExit and KeyboardInterrupt in a task or a callback leave the loop, which can continue afterwards. Only the evaluated
    function can have started that task: they are its failures, and must not end the run.
    """
    while not task.done():
        try:
            loop.run_until_complete(task)
        except (SystemExit, KeyboardInterrupt) as error:
            from .executors.coroutine import fail_evaluation  # which few calls need

            if not task.done() and not fail_evaluation(error):
                text = "the function has started something in the event loop that raised %r; the run goes on"
                logger.error(text, error)  # noqa: TRY400 - it may be long after
        except RuntimeError as error:
            if not task.done() and "stopped before" not in str(error):
                raise
            # The function has stopped the loop, and nothing of it depends on that.
        except BaseException:
            if not task.done():
                raise
    return asyncio.CancelledError() if task.cancelled() else task.exception()
