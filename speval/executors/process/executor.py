"""Plain functions in worker processes.

Owns the parent's half: starting worker processes, sending them calls, killing them with all their children. Invariant: a call
that is ended by its timeout or by a cancellation leaves no process of its group, and its outcome is reported only afterwards.
A problem of one worker process does not affect another one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
from contextlib import suppress
from typing import Any

from ...clock import Clock
from ...errors import FunctionError
from ...model import Function, Outputs, RetryOn
from ..base import Executor, NoRoomError, Slot, Work, as_outcome, timed_out
from ..batch import Batch
from ..call import outcome
from ..limits import OpenFiles
from .worker import WorkerProcess

__all__ = ["ProcessExecutor"]

logger = logging.getLogger("speval.executor")

_STARTS = 3  # the maximum number of worker processes in a row that may die before they are ready
_TRIES = 3  # attempts to replace a worker process when the system has no resources for it
_PAUSE = 0.5  # seconds between these attempts


class ProcessExecutor(Executor):
    """Calls a plain function in a fresh interpreter per slot, which is reused until it is killed or dies.

    Args:
        function: The function; the constructor pickles it.
        retry_on: Exception types after which an evaluation may be tried again.
        clock: The clock.
        outputs: stdout and stderr of the worker processes. None: those of this process.
        concurrency: The number of worker processes wanted; the limit of open files is raised for it if possible.

    Raises:
        FunctionError: the function can't be pickled, or no worker process can be started.
    """

    can_stop = True
    takes_many = True

    def __init__(
        self,
        function: Function,
        retry_on: RetryOn,
        clock: Clock,
        outputs: Outputs = (None, None),
        concurrency: int = 1,
    ) -> None:
        if not sys.executable or getattr(sys, "frozen", False):
            raise FunctionError(repr(function), "no Python interpreter is available to start processes")
        self.clock = clock
        self._outputs = outputs
        OpenFiles.make_room(concurrency)
        self.payload = _nameless_file()
        # The first worker process starts while this process pickles the function, opens the database and compares the space.
        # Importing the code below takes nearly as long as starting an interpreter.
        self._spare: WorkerProcess | None = None
        try:
            self._spare = self._new()
            from ..payload import write_payload

            write_payload(self.payload, function, retry_on)
            self._spare.load()
        except BaseException as error:
            if self._spare is not None:
                self._spare.discard()
            os.close(self.payload)
            if isinstance(error, NoRoomError):
                raise error.fatal from error
            raise

    def slot(self, number: int) -> Slot:
        return _ProcessSlot(self)

    def take(self) -> WorkerProcess:
        """Return a started worker process: the spare one, or a new one."""
        process, self._spare = self._spare, None
        return process or self._another()

    def spare(self) -> None:
        """Start a spare worker process: after one was killed, another one probably will be."""
        if self._spare is None and self.payload >= 0:
            with suppress(NoRoomError):  # the spare only saves time
                self._spare = self._another()

    def _another(self) -> WorkerProcess:
        process = self._new()
        process.load()
        return process

    def _new(self) -> WorkerProcess:
        try:
            return WorkerProcess(self.payload, self._outputs)
        except OSError as error:
            problem = OpenFiles.explained(error)
            raise NoRoomError(problem, FunctionError("the function", f"no worker process can start: {problem}")) from error

    async def close(self) -> None:
        payload, self.payload = self.payload, -1
        if self._spare is not None:
            await self._spare.kill()
        if payload >= 0:
            os.close(payload)


class _ProcessSlot(Slot):
    """Has one worker process at a time."""

    def __init__(self, executor: ProcessExecutor) -> None:
        self._executor = executor
        self._process: WorkerProcess | None = None
        self._had_one = False

    async def run(self, work: Work) -> None:
        process = await self._started()
        batch = Batch(process, work, self._executor.clock)
        is_over = False

        def take(messages: list[Any]) -> None:
            nonlocal is_over
            batch.end(*(as_outcome(result) for result, _ in messages if result is not None))
            is_over = messages[-1][1]
            if is_over:
                batch.wake()

        process.on_messages = take
        process.exited.add_done_callback(batch.wake)
        try:
            process.send([(claim.name, claim.args) for claim in work.claims])
            await batch.wait()
            # It skipped calls that were not taken back: the function has read from the channel of speval.
            is_over = is_over and not batch.pending
        finally:
            process.exited.remove_done_callback(batch.wake)
            if not is_over:
                # Cancelled, timed out or dead: this worker process is not used again.
                self._process = None
                await process.kill()
            process.on_messages = process.distrust
        if not is_over:
            self._settle(batch, process, work.timeout)
            self._executor.spare()

    def _settle(self, batch: Batch, process: WorkerProcess, timeout: float | None) -> None:
        """Report the outcomes of the calls of a dead worker process."""
        batch.give_back(min(process.unstarted, len(batch.pending)))
        while batch.pending:
            duration, started_at = batch.running(), batch.since_wall
            if batch.overdue is None:
                message = f"its process {process.how()}"
                batch.end(as_outcome(outcome("crash", "ProcessDied", message, "", started_at, duration, again=True)))
            elif batch.pending[0] is batch.overdue:
                assert timeout is not None
                batch.end(timed_out(timeout, "", started_at, duration))
            else:  # it had just started when the call before it timed out
                batch.give_back(1)

    async def _started(self) -> WorkerProcess:
        """Return the worker process of the slot, ready for a call."""
        if self._process is not None and not self._process.exited.done():
            return self._process
        if self._process is not None:  # it died between two calls
            process, self._process = self._process, None
            logger.warning("%r %s between two evaluations", process, process.how())
            await process.kill()
        for start in range(_STARTS):
            process = await self._taken()
            try:
                await process.ready()
            except ChildProcessError as error:
                await process.kill()
                if start == _STARTS - 1:
                    raise FunctionError("the function", f"{error}, {_STARTS} times") from error
            except BaseException:
                await process.kill()
                raise
            else:
                self._process, self._had_one = process, True
                return process
        raise AssertionError("unreachable")

    async def _taken(self) -> WorkerProcess:
        """Return a new worker process; if the slot had one before, retry while the system has no resources."""
        for _ in range(_TRIES if self._had_one else 0):
            try:
                return self._executor.take()
            except NoRoomError:
                await asyncio.sleep(_PAUSE)
        return self._executor.take()

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.end()


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        with suppress(OSError):  # refused by a sandbox
            return os.memfd_create("speval function", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
