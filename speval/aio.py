"""speval for async code: the four calls, awaited in the caller's event loop.

Owns the public face; ``speval.sync`` has the same names and parameters for code that blocks. Invariant: nothing here blocks
the event loop, and leaving a call, however that happens, gives back what it held.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from os import PathLike
from typing import Any

from .bitmap import Bitmap
from .clock import Clock
from .engine.worker import Worker
from .errors import CalledInWorkerError, OptionError
from .executors import make_executor
from .model import Durability, EvalSpace, Evaluation, OnChanged, Outputs, Status, Summary
from .options import Database, ExecutorOption, Options, checked_database, checked_status
from .spaces.eager import Space
from .spaces.lazy import Source, is_source
from .stores import make_store
from .terminal.progress import progress

__all__ = ["as_completed", "load_evals", "retry", "speval"]

_PAGE = 1000  # evaluations read at once
_POLL = 0.2  # seconds between looks for what other workers have recorded


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
    """Evaluate a function over an eval space, together with every other copy that works on the same database.

    When it returns, every evaluation is recorded in the database. When it is cancelled, it stops claiming, cancels what
    runs, records what has ended, gives back the rest without charging an attempt, and raises the cancellation; cancelled
    once more, it lets go at once.

    Args:
        func: The function, plain or async. It gets one argument: the args of the evaluation as JSON gives them back.
        eval_space: Args by name, or an iterable of args, which are then named "0", "1" and so on. Read once, in order, before
            the first evaluation starts. Or a lazy space, read while the run goes on, whenever a slot
            has nothing to do: an async iterable of args, named by position; or a generator function, plain (run in a thread)
            or async, that is given a function ``ended`` and yields pairs of a name and args, or None for "nothing until
            more has ended". ``ended()``, to be awaited in an async one, returns the evaluations that have ended since it was
            last called, whichever worker recorded them, at first all. With such a space the call speaks of all that is stored.
        db: A file name, made if it is missing, with its folders; or the URL of a PostgreSQL database, ``postgresql://host/name``.
        timeout: Seconds an evaluation may run. None: as long as it takes.
        concurrency: Evaluations this call runs at once.
        executor: Where the function runs: ``"coroutine"`` (this event loop), ``"thread"``, ``"process"``, or an executor of
            ``concurrent.futures`` that you make and close. ``"auto"`` takes coroutines for async functions; for plain ones a
            thread while ``concurrency`` is 1 and no timeout is set, else processes, which alone can be stopped.
        max_attempts: Attempts an evaluation gets when they end in a timeout, a crash or with the death of their worker.
        retry_on: Exception types after which an evaluation is tried again, within ``max_attempts``. By default an
            exception is final.
        backoff: Seconds before the second attempt, doubling with each further one, 60 at most, give or take a fifth. An
            evaluation whose worker died is tried again at once.
        lease: Seconds without a sign of life after which a worker is presumed dead; at most a day.
        on_changed: What to do when names are stored with other args: ``"error"`` raises and changes nothing, ``"keep"``
            warns and goes on with the stored ones, ``"rerun"`` stores the new ones and evaluates those again.
        wait: Return when every evaluation is completed or failed, also those other workers hold. False: return when nothing
            is left to claim.
        max_failures: Stop claiming when so many evaluations (int), or this share of the space (float), have failed since
            the call began, in whichever copy.
        durability: What a recorded result survives: ``"process"`` the death of any process, ``"power"`` a power cut too.
        progress: Whether to show a progress bar. None: when stderr is a terminal, or in a notebook.

    Returns:
        How many evaluations of the space stand where.

    Raises:
        OptionError: an option's value can't be used.
        SpaceError: a name can't be used, or stands for two evaluations.
        UnserializableError: some args can't be written as JSON.
        ArgsChangedError: names are stored with other args, and ``on_changed`` is ``"error"``.
        FunctionError: the function can't be sent to processes.
        ExecutorError: the executor handed in takes no more calls; what had ended is recorded.
        DatabaseError: the file can't be used as a database. In all these cases nothing was changed.
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
    """Do as ``speval`` does, and yield each evaluation of the space once, as it ends.

    Those that had ended before come first, in the order in which they ended; those that other workers record come too. What is
    yielded is recorded. Leaving the loop early stops the work and gives back what is held; ``contextlib.aclosing`` makes that
    happen at a known time.

    Args:
        func: See ``speval``, as for all others.
        eval_space: Read when the loop starts.
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
        SpevalError: as ``speval`` does; option values are checked at once, all else when the loop starts.
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
    """Read evaluations from a database, without changing it and without waiting for other programs.

    Args:
        db: The database: a file name, also of one of speval 0.1.1, or a URL.
        status: Only those of this status. None: all.

    Returns:
        One for each evaluation stored, in eval-space order; what later calls added follows what was there.

    Raises:
        DatabaseMissingError: there is no such file.
        DatabaseError: it is not a database of speval, or can't be read.
    """
    path = checked_database(db)
    checked_status(status, (None, "pending", "in_progress", "completed", "failed"))
    store = make_store(path, "read")
    await store.open()
    try:
        evaluations: list[Evaluation] = []
        cursor = 0
        while True:
            # In pages, because a reader that keeps one snapshot for long keeps the write-ahead log growing.
            cursor, page = await store.load(status, cursor, _PAGE)
            if not page:
                return evaluations
            evaluations += page
    finally:
        await store.close()


async def retry(db: str | PathLike[str], names: Iterable[str] | None = None, *, status: Status = "failed") -> int:
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
        DatabaseError: the file can't be used as a database.
    """
    path = checked_database(db)
    checked_status(status, ("failed", "completed"))
    if isinstance(names, str):
        raise OptionError("names", repr(names), "a list of names, not a single one")
    store = make_store(path, "write")
    await store.open()
    try:
        return await store.retry(None if names is None else [str(name) for name in names], status)
    finally:
        await store.close()


# What both flavours are made of


async def evaluated(
    func: Callable[[Any], Any], space: Space | Source, db: str | PathLike[str] | Database, options: Options
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
    db: str | PathLike[str] | Database,
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
    func: Callable[[Any], Any], space: Space | Source, db: str | PathLike[str] | Database, options: Options
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
    eval_space: EvalSpace, func: Callable[[Any], Any], db: Database, options: Options
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
