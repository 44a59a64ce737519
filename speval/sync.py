"""speval for code that blocks: the same four calls as ``speval.aio``, each run in an event loop of its own.

Owns the way from blocking code into the event loop and back. Invariant: the loop runs in a thread of its own, so a call
works wherever a loop is already running; the first Ctrl-C ends it in good order and the second one at once.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import contextmanager
from os import PathLike
from typing import Any, TypeVar

import anyio
from anyio.from_thread import BlockingPortal

from . import aio
from .errors import SpevalError
from .model import Durability, EvalSpace, Evaluation, OnChanged, Status, Summary
from .options import Database, ExecutorOption, Options, checked_database
from .source import Source, is_source
from .space import Space

__all__ = ["as_completed", "load_evals", "retry", "speval"]

T = TypeVar("T")

_JOIN_WITHIN = 2.0  # seconds to wait for the loop's thread, which a coroutine that refuses to end keeps alive


def speval(
    func: Callable[[Any], Any] | Callable[[Any], Awaitable[Any]],
    eval_space: EvalSpace,
    db: str | PathLike[str],
    timeout: float | None = None,
    *,
    concurrency: int = 1,
    executor: ExecutorOption = "auto",
    max_attempts: int = 3,
    retry_on: type[Exception] | tuple[type[Exception], ...] = (),
    backoff: float = 1.0,
    lease: float = 30.0,
    on_changed: OnChanged = "error",
    wait: bool = True,
    max_failures: int | float | None = None,
    durability: Durability = "process",
    progress: bool | None = None,
) -> Summary:
    """Evaluate a function over an eval space and block until that is done; ``aio.speval`` tells all about the parameters.

    Ctrl-C stops the work in good order, gives back what is held and raises ``KeyboardInterrupt``; a second one does so
    without waiting.

    Args:
        func: The function, plain or async, of one argument.
        eval_space: Args by name, or an iterable of args; read once, in the calling thread.
        db: The database: a file name or a URL.
        timeout: Seconds an evaluation may run.
        concurrency: Evaluations this call runs at once.
        executor: Where the function runs; coroutines run in a loop of their own.
        max_attempts: Attempts an evaluation gets.
        retry_on: Exception types after which an evaluation is tried again.
        backoff: Seconds before the second attempt.
        lease: Seconds without a sign of life after which a worker is presumed dead; at most a day.
        on_changed: What to do when names are stored with other args.
        wait: Return when every evaluation has ended, also those other workers hold.
        max_failures: Stop claiming when so many evaluations, or this share, have failed.
        durability: What a recorded result survives.
        progress: Whether to show a progress bar.

    Returns:
        How many evaluations of the space stand where.

    Raises:
        SpevalError: as ``aio.speval`` does.
    """
    options = Options(
        timeout=timeout,
        concurrency=concurrency,
        executor=executor,
        max_attempts=max_attempts,
        retry_on=retry_on,  # type: ignore[arg-type]
        backoff=backoff,
        lease=lease,
        on_changed=on_changed,
        wait=wait,
        max_failures=max_failures,
        durability=durability,
        progress=progress,
    )
    space = _encoded(eval_space)
    with _loop() as loop:
        return loop.call(aio.evaluated, func, space, db, options)


def as_completed(
    func: Callable[[Any], Any] | Callable[[Any], Awaitable[Any]],
    eval_space: EvalSpace,
    db: str | PathLike[str],
    timeout: float | None = None,
    *,
    concurrency: int = 1,
    executor: ExecutorOption = "auto",
    max_attempts: int = 3,
    retry_on: type[Exception] | tuple[type[Exception], ...] = (),
    backoff: float = 1.0,
    lease: float = 30.0,
    on_changed: OnChanged = "error",
    wait: bool = True,
    max_failures: int | float | None = None,
    durability: Durability = "process",
    progress: bool | None = None,
) -> Generator[Evaluation, None, None]:
    """Do as ``speval`` does, and yield each evaluation of the space once, as it ends; ``aio.as_completed`` tells more.

    Leaving the loop early stops the work and gives back what is held.

    Args:
        func: The function, plain or async, of one argument.
        eval_space: Args by name, or an iterable of args; read when the loop starts.
        db: The database: a file name or a URL.
        timeout: Seconds an evaluation may run.
        concurrency: Evaluations this call runs at once; they go on while the loop's body runs.
        executor: Where the function runs.
        max_attempts: Attempts an evaluation gets.
        retry_on: Exception types after which an evaluation is tried again.
        backoff: Seconds before the second attempt.
        lease: Seconds without a sign of life after which a worker is presumed dead; at most a day.
        on_changed: What to do when names are stored with other args.
        wait: Go on until every evaluation has ended, also those other workers hold.
        max_failures: Stop claiming when so many evaluations, or this share, have failed.
        durability: What a recorded result survives.
        progress: Whether to show a progress bar.

    Yields:
        The evaluations, completed and failed ones.

    Raises:
        SpevalError: as ``aio.speval`` does; option values are checked at once, all else when the loop starts.
    """
    options = Options(
        timeout=timeout,
        concurrency=concurrency,
        executor=executor,
        max_attempts=max_attempts,
        retry_on=retry_on,  # type: ignore[arg-type]
        backoff=backoff,
        lease=lease,
        on_changed=on_changed,
        wait=wait,
        max_failures=max_failures,
        durability=durability,
        progress=progress,
    )
    return _as_completed(func, eval_space, checked_database(db), options)


def load_evals(db: str | PathLike[str], *, status: Status | None = None) -> list[Evaluation]:
    """Read evaluations from a database; ``aio.load_evals`` tells more.

    Args:
        db: The database: a file name or a URL.
        status: Only those of this status. None: all.

    Returns:
        One for each evaluation stored, in eval-space order.

    Raises:
        DatabaseError: there is no such file, or it can't be read.
    """
    with _loop() as loop:
        return loop.call(lambda: aio.load_evals(db, status=status))


def retry(db: str | PathLike[str], names: Iterable[str] | None = None, *, status: Status = "failed") -> int:
    """Put evaluations back to pending with a fresh attempt budget; ``aio.retry`` tells more.

    Args:
        db: The database: a file name or a URL.
        names: Which ones. None: all of that status.
        status: ``"failed"`` or ``"completed"``.

    Returns:
        How many evaluations were put back.

    Raises:
        UnknownNameError: a name is not in the database; nothing was changed.
        DatabaseError: the file can't be used as a database.
    """
    with _loop() as loop:
        return loop.call(lambda: aio.retry(db, names, status=status))


def _as_completed(
    func: Callable[[Any], Any], eval_space: EvalSpace, db: Database, options: Options
) -> Generator[Evaluation, None, None]:
    space = _encoded(eval_space)
    with _loop() as loop:
        batches = aio.batches(func, space, db, options)
        try:
            while batch := loop.call(anext, batches, None):
                yield from batch
        finally:
            if not loop.is_abandoned:
                loop.call(batches.aclose)


def _encoded(eval_space: EvalSpace) -> Space | Source:
    """Encode a space in the calling thread, whose generators may depend on it."""
    if is_source(eval_space):
        return Source(eval_space)  # type: ignore[arg-type]
    space = Space()
    try:
        for _ in space.fill(eval_space):
            pass
    except BaseException:
        space.close()
        raise
    return space


class _Loop:
    """An event loop in a thread of its own, and the way into it."""

    def __init__(self, portal: BlockingPortal, loop: asyncio.AbstractEventLoop) -> None:
        self._portal = portal
        self._loop = loop
        self.is_abandoned = False

    def call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run ``function(*args)`` in the loop and wait for it."""
        # anyio's future is done as soon as it is cancelled, and what we wait for is the end of the clean-up.
        ended = threading.Event()

        async def run() -> T:
            try:
                return await function(*args)
            finally:
                ended.set()

        try:
            future = self._portal.start_task_soon(run)
            return future.result()
        except SpevalError as error:
            # The way through two threads is of no use to whoever reads the traceback, and the message says it all.
            raise error.with_traceback(None) from None
        except KeyboardInterrupt:
            # The first one ends the call in good order. Another one meanwhile comes out of this wait and is the last word.
            self.is_abandoned = True
            future.cancel()
            ended.wait()
            self.is_abandoned = False
            raise

    def stop(self) -> None:
        """End the loop; called once, from outside, and not waiting for anything."""
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self._stopping = self._loop.create_task(self._portal.stop(cancel_remaining=True))


@contextmanager
def _loop() -> Generator[_Loop, None, None]:
    """Run an event loop in a thread of its own."""
    ready: Future[_Loop] = Future()

    async def serve() -> None:
        async with BlockingPortal() as portal:
            ready.set_result(_Loop(portal, asyncio.get_running_loop()))
            await portal.sleep_until_stopped()

    def run() -> None:
        try:
            anyio.run(serve)
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)

    # Not start_blocking_portal(), which waits for its thread at the end: the second Ctrl-C waits for nothing.
    thread = threading.Thread(target=run, name="speval loop", daemon=True)
    thread.start()
    loop = ready.result()
    try:
        yield loop
    finally:
        loop.stop()
        if not loop.is_abandoned:
            thread.join(timeout=_JOIN_WITHIN)
