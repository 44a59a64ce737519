"""speval for async code: the four calls, awaited in the caller's event loop.

Owns the public face; ``speval.sync`` has the same names and parameters for code that blocks. Invariant: nothing here blocks
the event loop, and leaving a call, however that happens, gives back what it held.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from itertools import islice
from os import PathLike
from typing import Any, Literal, Protocol, TypeVar, get_args

from .bitmap import Bitmap
from .clock import Clock
from .engine.worker import Worker
from .errors import CalledInWorkerError
from .executors import make_executor
from .model import Durability, EvalSpace, Evaluation, OnChanged, Outputs, Status, Summary
from .options import ExecutorOption, Location, Options, checked_database, checked_retry, checked_status
from .spaces.eager import Space
from .spaces.lazy import Source, is_source
from .stores import make_control, make_store
from .stores.control import Control, ControlMode
from .terminal.progress import progress
from .threads import WorkThread

__all__ = ["as_completed", "load_evals", "retry", "speval"]

T = TypeVar("T")

_PAGE = 1000  # evaluations read at once
_POLL = 0.2  # seconds between looks for what other workers have recorded


class _Run(Protocol):
    """Runs what blocks in a thread."""

    async def __call__(self, work: Callable[[], T]) -> T: ...


async def speval(
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
    """Do as ``speval.speval`` does, awaited: ``"coroutine"`` means the running event loop, which is never blocked.

    The parameters are those of ``speval.speval``, whose documentation has them in full. Cancelling it does what Ctrl-C does
    there: it stops claiming, cancels what runs, records what has ended, gives back the rest without charging an attempt, and
    raises the cancellation; cancelled once more, it leaves at once.

    Returns:
        The evaluations of the space, counted by status and cause, and how the call ended.

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
    return await evaluated(func, await _encoded(eval_space), db, options)


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
) -> AsyncGenerator[Evaluation, None]:
    """Do as ``speval.speval`` does, and yield each evaluation of the space once, as it ends.

    The parameters are those of ``speval.speval``, the order is that of ``speval.as_completed``. Leaving the loop early stops
    the work and gives back what is held; ``contextlib.aclosing`` makes that happen at a known time.

    Yields:
        Completed and failed evaluations.

    Raises:
        SpevalError: as ``speval.speval`` does; option values are checked at once, all else when the loop starts.
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
    return _flattened(eval_space, func, checked_database(db), options)


async def load_evals(db: str | PathLike[str], *, status: Status | None = None) -> list[Evaluation]:
    """Do as ``speval.load_evals`` does, in a thread beside the event loop.

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
    async with _controlled(location, "read") as (control, run):
        evaluations: list[Evaluation] = []
        reading = control.evaluations(status=status)
        while page := await run(lambda: list(islice(reading, _PAGE))):
            evaluations += page
        return evaluations


async def retry(
    db: str | PathLike[str], names: Iterable[str] | None = None, *, status: Literal["failed", "completed"] = "failed"
) -> int:
    """Do as ``speval.retry`` does, in a thread beside the event loop.

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
    async with _controlled(location, "write") as (control, run):
        return await run(lambda: control.retry(chosen, status=status))


@asynccontextmanager
async def _controlled(location: Location, mode: ControlMode) -> AsyncGenerator[tuple[Control, _Run]]:
    """Open what people use a database with in a thread, and give it out with the way into that thread."""
    opened: list[Control] = []
    given_up = threading.Event()
    thread = WorkThread("speval reader")
    try:
        await thread.run(lambda: opened.append(make_control(location, mode, given_up=given_up)))
        yield opened[0], thread.run
    finally:
        await thread.finish(lambda: [control.close() for control in opened], given_up.set)


# What both flavours are made of


async def evaluated(
    func: Callable[[Any], Any], space: Space | Source, db: str | PathLike[str] | Location, options: Options
) -> Summary:
    """Evaluate an encoded space, and close it."""
    try:
        with progress(options.progress) as bar:
            worker = make_worker(func, space, db, options, bar.outputs)
            await worker.start()
            try:
                async with bar.shown(worker):
                    await worker.wait()
                return worker.tell(await worker.summary())
            finally:
                await worker.close()
    finally:
        space.close()


def make_worker(
    func: Callable[[Any], Any],
    space: Space | Source,
    db: str | PathLike[str] | Location,
    options: Options,
    outputs: Outputs = (None, None),
) -> Worker:
    """Return a worker that has not begun; ``outputs`` is where worker processes print, if not where this one does."""
    if hasattr(sys, "speval_loading"):
        raise CalledInWorkerError("speval")
    clock = Clock()
    options.failure_limit(space.count)  # refused before anything is begun
    store = make_store(checked_database(db), "create", options.durability, clock)
    return Worker(space, store, make_executor(func, options, clock, outputs), options, clock)


async def batches(
    func: Callable[[Any], Any], space: Space | Source, db: str | PathLike[str] | Location, options: Options
) -> AsyncGenerator[list[Evaluation], None]:
    """Yield the evaluations of a space as they end, all that are there at once."""
    try:
        with progress(options.progress) as bar:
            worker = make_worker(func, space, db, options, bar.outputs)
            await worker.start()
            try:
                async with bar.shown(worker):
                    async with aclosing(_ended(worker, space.count)) as ended:
                        async for batch in ended:
                            yield batch
                    await worker.wait()
                worker.tell(await worker.summary())
            finally:
                await worker.close()
    finally:
        space.close()


async def _ended(worker: Worker, count: int | None) -> AsyncGenerator[list[Evaluation], None]:
    """Yield each evaluation once, reading from the database what this worker and all others have recorded."""
    seen = Bitmap()
    cursor, left = 0, count
    while left != 0:
        worker.commits.clear()
        is_done = worker.is_done  # asked before looking: what it recorded last is seen then
        cursor, ended = await worker.store.ended_since(cursor, _PAGE)
        batch = []
        for id, evaluation in ended:
            if seen.add(id):
                batch.append(evaluation)
        if left is not None:
            left -= len(batch)
        if batch:
            yield batch
        elif is_done:
            return
        elif not ended:
            await _commit_or_pause(worker)


async def _commit_or_pause(worker: Worker) -> None:
    try:
        async with asyncio.timeout(_POLL):
            await worker.commits.wait()
    except TimeoutError:
        pass


async def _flattened(
    eval_space: EvalSpace, func: Callable[[Any], Any], db: Location, options: Options
) -> AsyncGenerator[Evaluation, None]:
    async with aclosing(batches(func, await _encoded(eval_space), db, options)) as all_batches:
        async for batch in all_batches:
            for evaluation in batch:
                yield evaluation


async def _encoded(eval_space: EvalSpace) -> Space | Source:
    """Encode a space, letting others run now and then."""
    if is_source(eval_space):
        return Source(eval_space)  # type: ignore[arg-type]
    space = Space()
    try:
        for _ in space.fill(eval_space):
            await asyncio.sleep(0)
    except BaseException:
        space.close()
        raise
    return space
