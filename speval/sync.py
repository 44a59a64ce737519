"""speval for code that blocks: the same four calls as ``speval.aio``; those that evaluate run in a separate event loop.

Owns the public names; ``portal`` owns the way into the loop and back. Invariant: a call that is left, however that happens,
gives back what it holds. A program that makes no call does not import the event loop: a call imports it, in the calling thread
and before anything begins.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Iterator
from contextlib import aclosing, contextmanager, suppress
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from . import open_calls as calls
from .model import Durability, EvalSpace, Evaluation, OnChanged, Status, Summary
from .options import ExecutorOption, Location, Options, checked_database, checked_retry, checked_status

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
    """Evaluate a function over an eval space, together with every other copy that works on the same database.

    When it returns, every evaluation is recorded in the database. Ctrl-C stops claiming, cancels what runs, records what has
    ended, gives back the rest without charging an attempt, and raises ``KeyboardInterrupt``; a second Ctrl-C leaves at once.
    ``speval.aio.speval`` is the same call, awaited.

    Args:
        func: The function, plain or async. It gets one argument: the args of the evaluation as JSON gives them back.
        eval_space: Args by name, or an iterable of args, which are then named "0", "1" and so on; read once, in order, in the
            calling thread, before the first evaluation starts. Or a lazy space, read during the run whenever a slot is free: an
            async iterable of args, named by position; or a generator function, plain (run in a thread) or async, that is given
            a function ``ended`` and yields pairs of a name and args, or None for "nothing until more has ended". ``ended()``,
            awaited in an async one, returns the evaluations that have ended since its last call, whichever copy recorded them;
            its first call returns all. With a lazy space the call covers everything that is stored.
        db: A file name, made if it is missing, with its folders; or the URL of a PostgreSQL database, ``postgresql://host/name``.
        timeout: Seconds an attempt may run. None, the default: no limit.
        concurrency: Evaluations this call runs at once, from 1, the default, to 1,000,000.
        executor: Where the function runs: ``"coroutine"`` (an event loop), ``"thread"``, ``"process"``, or an executor of
            ``concurrent.futures`` that you make and close. ``"auto"``, the default, takes coroutines for async functions; for
            plain ones a thread while ``concurrency`` is 1 and no timeout is set, else processes, which alone can be stopped.
        max_attempts: Attempts an evaluation gets when they end in a timeout, a crash or with the death of their worker; 3 by
            default.
        retry_on: Exception types after which an evaluation is tried again, within ``max_attempts``. By default an exception
            is final.
        backoff: Seconds before the second attempt, 1.0 by default; it doubles with each further one, up to 60, and varies by a
            fifth. An evaluation whose worker died is tried again at once.
        lease: Seconds without a sign of life after which a worker is presumed dead; 30.0 by default, from 1 to 86,400 (a day).
        on_changed: What to do when names are stored with other args: ``"error"``, the default, raises and changes nothing;
            ``"keep"`` warns and goes on with the stored ones; ``"rerun"`` stores the new ones and evaluates those again.
        wait: Return when every evaluation is completed or failed, also those other workers hold. False: return when nothing
            is left to claim.
        max_failures: Stop claiming when so many evaluations (int), or this share of the space (float), have failed since
            the call began, in all copies together. None, the default: never.
        durability: What a recorded result survives: ``"process"``, the default, the death of any process; ``"power"`` a power
            cut too.
        progress: Whether to show a progress bar. None, the default: when stderr is a terminal, or in a notebook.

    Returns:
        The evaluations of the space, counted by status and cause, and how the call ended.

    Raises:
        OptionError: an option's value can't be used.
        SpaceError: a name can't be used, or stands for two evaluations.
        UnserializableError: some args can't be written as JSON.
        ArgsChangedError: names are stored with other args, and ``on_changed`` is ``"error"``.
        FunctionError: the function can't be sent to processes.
        ExecutorError: the executor handed in takes no more calls; what had ended is recorded.
        DatabaseError: the database can't be used. Before the first claim, all of these leave the database unchanged.
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
    with _importing():
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
    """Do as ``speval.speval`` does, and yield each evaluation of the space once, as it ends.

    Evaluations that had ended before come first, in the order in which they ended; those that other workers record come too.
    What is yielded is recorded. The work goes on while the loop's body runs. Leaving the loop early stops it and gives back
    what is held. The parameters are those of ``speval.speval``; option values are checked at once, everything else when the
    loop starts.

    Yields:
        Completed and failed evaluations.

    Raises:
        SpevalError: as ``speval.speval`` does.
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
    """Read evaluations from a database into a list, without changing it and without keeping a worker waiting.

    ``Database.evaluations`` iterates over them instead, which needs no memory for all of them at once.

    Args:
        db: The database: a file name, also of one of speval 0.1.1, or a URL.
        status: Only those of this status. None: all.

    Returns:
        One for each evaluation stored, in eval-space order; what later calls added follows what was there.

    Raises:
        DatabaseMissingError: the database does not exist.
        DatabaseError: the database does not belong to speval, or can't be read.
    """
    location = checked_database(db)
    checked_status(status, (None, *get_args(Status)))
    from .stores import make_control

    with make_control(location) as control:
        return list(control.evaluations(status=status))


def retry(
    db: str | PathLike[str], names: Iterable[str] | None = None, *, status: Literal["failed", "completed"] = "failed"
) -> int:
    """Put evaluations back to pending with a fresh attempt budget; the next ``speval`` call evaluates them again.

    What the earlier attempts brought stays recorded in the table ``attempts``.

    Args:
        db: The database: a file name or a URL.
        names: Which ones. None: all of that status.
        status: ``"failed"``, or ``"completed"`` to evaluate again what has a result. Those of another status stay as they are.

    Returns:
        How many evaluations were put back.

    Raises:
        UnknownNameError: a name is not in the database; nothing was changed.
        DatabaseError: the database can't be used.
    """
    location, chosen = checked_retry(db, names, status)
    from .stores import make_control

    with make_control(location, "write") as control:
        return control.retry(chosen, status=status)


@contextmanager
def _importing() -> Iterator[None]:
    """Let Ctrl-C out of an import: Python 3.11 turns what interrupts the making of a class into a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise


def _called(main: Callable[[], Coroutine[Any, Any, T]], space: Space | Source | None = None) -> T:
    """Run a coroutine and return what it returns; it closes the space once it has begun."""
    with _importing():
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

    def __init__(self, func: Callable[[Any], Any], eval_space: EvalSpace, db: Location, options: Options) -> None:
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
        with _importing():
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
