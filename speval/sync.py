"""speval for code that blocks: the same four calls as ``speval.aio``, each run in a separate event loop.

Owns the public names; ``portal`` owns the way into the loop and back. Invariant: a call that is left, however that happens,
gives back what it holds. A program that makes no call does not import the event loop: a call imports it, in the calling thread
and before anything begins.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from contextlib import aclosing, suppress
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from . import open_calls as calls
from .model import Durability, EvalSpace, Evaluation, OnChanged, Status, Summary
from .options import Database, ExecutorOption, Options, checked_database

if TYPE_CHECKING:
    from .portal import Call
    from .spaces.eager import Space
    from .spaces.lazy import Source

__all__ = ["as_completed", "load_evals", "retry", "speval"]

T = TypeVar("T")

_PATIENCE = 15.0  # seconds a generator that is dropped waits for its end, which takes 11 at most, unless a function blocks it


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
        executor: Where the function runs; coroutines run in a separate event loop.
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
    from . import aio

    space = _encoded(eval_space)
    return _called(lambda: aio.evaluated(func, space, db, options), space)


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
    return _Completed(func, eval_space, checked_database(db), options)


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
    from . import aio

    return _called(lambda: aio.load_evals(db, status=status))


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
    from . import aio

    return _called(lambda: aio.retry(db, names, status=status))


def _called(main: Callable[[], Coroutine[Any, Any, T]], space: Space | Source | None = None) -> T:
    """Run a coroutine and return what it returns; it closes the space once it has begun."""
    from .portal import Call, Future

    call = Call(main, Future())
    try:
        try:
            call.start()
            return call.result()
        finally:
            call.close()
    finally:
        call.close()
        if space is not None and not call.has_begun:
            space.close()


class _Completed(Generator[Evaluation, None, None]):
    """Yields evaluations as a generator does, and ends the call as soon as it is closed, exhausted, interrupted or dropped."""

    _call: Call[None] | None = None
    _space: Space | Source | None = None

    def __init__(self, func: Callable[[Any], Any], eval_space: EvalSpace, db: Database, options: Options) -> None:
        self._make = (func, eval_space, db, options)
        self._ready: deque[Evaluation] = deque()
        self._is_closed = False

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "not started" if self._call is None else "open"
        return f"<as_completed in {self._make[2]!r} {state}>"

    def __next__(self) -> Evaluation:
        try:
            try:
                while not self._is_closed:
                    with suppress(IndexError):  # nothing is there, or another thread was quicker
                        return self._ready.popleft()
                    self._fetch()
            except BaseException:
                self.close()
                raise
        except BaseException:
            self.close()  # what an interrupt has kept the other one from doing
            raise
        raise StopIteration

    def _fetch(self) -> None:
        """Get all that has ended since; the first time, begin."""
        if self._call is None:
            self._begin()
        assert self._call is not None
        batch = self._call.ask()
        if batch is None:
            self.close()
        else:
            self._ready.extend(batch)

    def _begin(self) -> None:
        from . import aio
        from .portal import Call, Future

        func, eval_space, db, options = self._make
        self._space = space = _encoded(eval_space)
        calls.watch_collections()

        # Not a method: the call must not know us, or we would never be dropped.
        async def main() -> None:
            async with aclosing(aio.batches(func, space, db, options)) as batches:
                await call.asked()
                async for batch in batches:
                    call.hand_over(batch)
                    await call.asked()

        # It is told twice that we are gone, since an interrupt may come between any two steps of a finalizer too.
        self._call = call = Call(main, Future(), weakref.ref(self, lambda _: call.stop()))
        call.start()

    def send(self, value: None) -> Evaluation:
        return self.__next__()

    def throw(self, typ: Any, val: Any = None, tb: TracebackType | None = None) -> Evaluation:
        self.close()
        return super().throw(typ, val, tb)

    def close(self) -> None:
        """End the call and wait until it has given back what it held; any thread may do so."""
        self._is_closed = True
        self._ready.clear()
        try:
            self._end()
        finally:
            self._end()

    def _end(self, timeout: float | None = None) -> None:
        call = self._call
        if call is not None:
            call.close(timeout)
        if self._space is not None and (call is None or not call.has_begun):
            self._space.close()

    def __del__(self) -> None:
        call = self._call
        if call is None or call.is_over or sys.is_finalizing():
            return
        # A loop that is left drops us in the thread that ran it, and what follows it may rely on all being given back. In any
        # other place a finalizer may be called in the middle of anything, so it must not wait.
        if threading.get_ident() != call.asker:
            call.stop()
            return
        try:
            try:
                self._end(_PATIENCE)
            finally:
                self._end(_PATIENCE)
        except KeyboardInterrupt:
            calls.interrupt_soon()


def _encoded(eval_space: EvalSpace) -> Space | Source:
    """Encode a space in the calling thread, whose generators may depend on it."""
    from .spaces.eager import Space
    from .spaces.lazy import Source, is_source

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
