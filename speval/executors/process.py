"""Plain functions in processes of their own.

Owns the parent's half: starting workers, handing them calls, killing them with all they have started. Invariant: a call that
is ended, by its timeout or by a cancellation, leaves no process of its group, and its outcome is told only after; what happens
to one worker touches no other.
"""

from __future__ import annotations

import asyncio
import logging
import marshal
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..clock import Clock
from ..errors import FunctionError
from ..model import Claim, Function, Outcome, Outputs, RetryOn
from .base import Executor, Slot, as_outcome, timed_out
from .batch import Batch, BatchSlot
from .call import outcome

__all__ = ["ProcessExecutor"]

logger = logging.getLogger("speval.executor")

_SCRIPT = Path(__file__).with_name("process_worker.py")
_START_WITHIN = 300.0  # seconds a worker may take to import what the function needs
_STARTS = 3  # workers that may die one after the other before they are ready
_DIE_WITHIN = 5.0  # seconds to wait for a killed process; one in the middle of a disk's or a driver's call takes its time
_GROUP_WITHIN = 0.3  # seconds to wait for the rest of its group, whom init may be slow to bury
_MOST_TOKENS = 4096
_END_WITHIN = 0.5  # seconds an idle worker has to end by itself


class ProcessExecutor(Executor):
    """Calls a plain function in a fresh interpreter per slot, which is used again until it is killed or dies.

    Args:
        function: The function; it is pickled here and now.
        retry_on: Exception types after which an evaluation may be tried again.
        clock: Where the time comes from.
        outputs: What its processes get as stdout and stderr. None: those of this process.

    Raises:
        FunctionError: the function can't be pickled, or there is no interpreter to start.
    """

    can_stop = True
    takes_many = True

    def __init__(self, function: Function, retry_on: RetryOn, clock: Clock, outputs: Outputs = (None, None)) -> None:
        if not sys.executable or getattr(sys, "frozen", False):
            raise FunctionError(repr(function), "there is no Python interpreter to start processes with")
        self.clock = clock
        self._outputs = outputs
        self.payload = _nameless_file()
        # The first worker starts beside all that is still to be done here: pickling the function, opening the database,
        # comparing the space. The import alone takes nearly as long as a bare interpreter's start.
        self._spare: _Process | None = None
        try:
            self._spare = _Process(self.payload, self._outputs)
            from .payload import write_payload

            write_payload(self.payload, function, retry_on)
            self._spare.load()
        except BaseException:
            if self._spare is not None:
                self._spare.discard()
            os.close(self.payload)
            raise

    def slot(self, number: int) -> Slot:
        return _ProcessSlot(self)

    def take(self) -> _Process:
        """Return a worker that has been started, perhaps long ago."""
        process, self._spare = self._spare, None
        return process or self._another()

    def spare(self) -> None:
        """Have a worker ready for the next one that is killed: where one was, another will be."""
        if self._spare is None and self.payload >= 0:
            with suppress(OSError):  # no room for one just now; it is only for speed
                self._spare = self._another()

    def _another(self) -> _Process:
        process = _Process(self.payload, self._outputs)
        process.load()
        return process

    async def close(self) -> None:
        payload, self.payload = self.payload, -1
        if self._spare is not None:
            await self._spare.kill()
        if payload >= 0:
            os.close(payload)


class _Process:
    """One worker process."""

    def __init__(self, payload: int, outputs: Outputs) -> None:
        self._loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        # Fails on a full pipe instead of waiting; a batch has fewer calls than a pipe has room for.
        tokens, self._tokens_in = os.pipe()
        os.set_blocking(tokens, False)
        lifeline, self._lifeline = os.pipe()
        fds = (theirs.fileno(), tokens, lifeline, payload)
        # Its own session: Ctrl-C is for the parent to hear, `stty tostop` can't stop it, and it can be killed as a group.
        command = [sys.executable, *_interpreter_flags(), "-P", str(_SCRIPT), *(str(fd) for fd in fds)]
        try:
            self._popen = subprocess.Popen(
                command,
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=outputs[0],
                stderr=outputs[1],
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            for fd in (tokens, self._tokens_in, self._lifeline):
                os.close(fd)
            raise
        finally:
            theirs.close()
            os.close(lifeline)
        ours.setblocking(False)
        self._tokens = tokens
        self._socket = ours
        self._received = bytearray()
        self.on_message: Callable[[Any], None] = self._on_first_message
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._ready.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.exited: asyncio.Future[None] = self._loop.create_future()
        self._pidfd = -1
        self._poll: asyncio.TimerHandle | None = None
        self._sending: asyncio.Task[None] | None = None
        self._is_closed = False
        self.unstarted = 0  # calls of the last batch that it never began, known when it is dead
        self._loop.add_reader(ours, self.receive)
        self._watch()

    def __repr__(self) -> str:
        return f"<worker process {self._popen.pid}>"

    # Starting

    def load(self) -> None:
        """Let it load the function, which is in the payload now."""
        with suppress(OSError):  # it is dead, which is noticed anyway
            self._socket.send(_frame("load"))

    def discard(self) -> None:
        """End one that has not been told to load the function: it runs nobody's code, so this takes no time."""
        self._killpg()
        self._popen.wait()
        self._close()

    async def ready(self) -> None:
        """Wait until the function is loaded."""
        first = asyncio.FIRST_COMPLETED
        if not (await asyncio.wait({self._ready, self.exited}, timeout=_START_WITHIN, return_when=first))[0]:
            raise FunctionError("the function", f"a fresh interpreter could not load it within {_START_WITHIN:g} s")
        self.receive()
        if self._ready.done():
            self._ready.result()
            return
        raise ChildProcessError(f"a worker process {self.how()} before it was ready")

    def _on_first_message(self, message: Any) -> None:
        kind, value = message
        if self._ready.done():
            return
        if kind == "ready":
            self._ready.set_result(None)
        else:
            self._ready.set_exception(FunctionError("the function", f"a fresh interpreter can't load it:\n{value}"))

    # Calls

    def send(self, calls: list[tuple[str, str]]) -> None:
        """Hand over calls, to be made one after the other; what the socket has no room for now follows by itself."""
        os.write(self._tokens_in, bytes(len(calls)))
        frame = memoryview(_frame(calls))
        try:
            frame = frame[self._socket.send(frame) :]
        except BlockingIOError:
            pass
        except OSError:  # it is dead, which is noticed anyway
            return
        if frame:
            self._sending = self._loop.create_task(self._send(frame), name="speval args")

    async def _send(self, frame: memoryview) -> None:
        with suppress(OSError):
            await self._loop.sock_sendall(self._socket, frame)

    def take_back(self, most: int) -> int:
        """Take back up to so many calls that have not begun, the last ones first, and return how many."""
        try:
            return len(os.read(self._tokens, most)) if most > 0 else 0
        except BlockingIOError:
            return 0

    def receive(self) -> None:
        """Take in what has arrived."""
        while not self._is_closed:
            try:
                data = self._socket.recv(1 << 18)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                data = b""
            if not data:
                self._loop.remove_reader(self._socket)
                break
            self._received += data
            if len(data) < 1 << 18:
                break
        received = self._received
        start, end = 0, len(received)
        while end - start >= 8:
            size = int.from_bytes(received[start : start + 8], "little")
            if end - start - 8 < size:
                break
            message = marshal.loads(memoryview(received)[start + 8 : start + 8 + size])
            start += 8 + size
            self.on_message(message)
        if start:
            del received[:start]

    # Ending

    def _watch(self) -> None:
        """Notice the process's end, also when a child of its own keeps the socket open."""
        if hasattr(os, "pidfd_open"):
            with suppress(OSError):
                self._pidfd = os.pidfd_open(self._popen.pid)
                self._loop.add_reader(self._pidfd, self._on_exit)
                return
        self._check()

    def _check(self) -> None:
        if self._has_ended():
            self._on_exit()
        else:
            self._poll = self._loop.call_later(0.05, self._check)

    def _has_ended(self) -> bool:
        # Without reaping: as long as nobody does that, the number of its group is nobody else's.
        try:
            return os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def _on_exit(self) -> None:
        self._stop_watching()
        self._killpg()  # whatever it had started
        self._popen.poll()
        if not self.exited.done():
            self.exited.set_result(None)

    def _stop_watching(self) -> None:
        if self._poll is not None:
            self._poll.cancel()
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _killpg(self) -> None:
        if self._popen.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signal.SIGKILL)

    def distrust(self, message: object) -> None:
        """Kill a worker that says something when it has nothing to say."""
        logger.error("%r says what nobody has asked for (%.100r) and is killed", self, message)
        self._killpg()

    def how(self) -> str:
        """Return how it ended, in words."""
        code = self._popen.returncode
        if code is None:
            return "is still running"
        if code >= 0:
            return f"exited with status {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"was killed by {name} ({signal.strsignal(-code) or 'unknown'})"

    async def kill(self) -> None:
        """Kill the process and all of its group, and return when they are dead."""
        try:
            self._killpg()
            if not self.exited.done():
                # Not cancelled half way: what is recorded after this must be true.
                await _surely(asyncio.wait({self.exited}, timeout=_DIE_WITHIN))
            if not self.exited.done():
                logger.warning(
                    "%r was killed and is still there: the system keeps it in a call that can't be interrupted", self
                )
            deadline = time.monotonic() + _GROUP_WITHIN
            while _group_lives(self._popen.pid) and time.monotonic() < deadline:
                await _surely(asyncio.sleep(0.002))
        finally:
            if not self._is_closed:
                self.receive()  # what it had sent before
                self.unstarted = self.take_back(_MOST_TOKENS)
                self._close()

    async def end(self) -> None:
        """Let an idle worker end by itself; what does not is killed."""
        self._loop.remove_reader(self._socket)
        self._socket.shutdown(socket.SHUT_WR)
        try:
            await asyncio.wait({self.exited}, timeout=_END_WITHIN)
        finally:
            await self.kill()

    def _close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._stop_watching()
            if self._sending is not None:
                self._sending.cancel()
                self._loop.remove_writer(self._socket)
            self._loop.remove_reader(self._socket)
            self._socket.close()
            for fd in (self._tokens, self._tokens_in, self._lifeline):
                os.close(fd)


class _ProcessSlot(BatchSlot):
    """Has one worker process at a time."""

    def __init__(self, executor: ProcessExecutor) -> None:
        self._executor = executor
        self._process: _Process | None = None

    async def run(
        self,
        claims: Sequence[Claim],
        timeout: float | None,
        ended: Callable[[Claim, Outcome], None],
        back: Callable[[Sequence[Claim]], None],
        more: Callable[[], Claim | None],
    ) -> None:
        process = await self._started()
        batch = Batch(process, claims, timeout, ended, back, self._executor.clock)
        is_over = False

        def take(message: Any) -> None:
            nonlocal is_over
            result, is_over = message
            if result is not None:
                batch.end(as_outcome(result))
            if is_over:
                batch.wake()

        process.on_message = take
        process.exited.add_done_callback(batch.wake)
        try:
            process.send([(claim.name, claim.args) for claim in claims])
            await batch.wait()
        finally:
            process.exited.remove_done_callback(batch.wake)
            if not is_over:
                # Cancelled, run into its timeout, or dead already: this worker is not used again.
                self._process = None
                await process.kill()
            process.on_message = process.distrust
        if not is_over:
            self._settle(batch, process, timeout, back)
            self._executor.spare()

    def _settle(self, batch: Batch, process: _Process, timeout: float | None, back: Callable[[Sequence[Claim]], None]) -> None:
        """Tell what became of the calls of a worker that is dead."""
        batch.give_back(min(process.unstarted, len(batch.pending)))
        while batch.pending:
            duration, started_at = batch.running(), batch.since_wall
            if batch.overdue is None:
                message = f"its process {process.how()}"
                batch.end(as_outcome(outcome("crash", "ProcessDied", message, "", started_at, duration, again=True)))
            elif batch.pending[0] is batch.overdue:
                assert timeout is not None
                batch.end(timed_out(timeout, "", started_at, duration))
            else:  # it had just begun when the one before it was found to have taken too long
                back([batch.pending.popleft()])

    async def _started(self) -> _Process:
        """Return the slot's worker, ready for a call."""
        if self._process is not None and not self._process.exited.done():
            return self._process
        if self._process is not None:  # it died between two calls
            process, self._process = self._process, None
            logger.warning("%r %s between two evaluations", process, process.how())
            await process.kill()
        for start in range(_STARTS):
            process = self._executor.take()
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
                self._process = process
                return process
        raise AssertionError("unreachable")

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.end()


def _frame(message: Any) -> bytes:
    data = marshal.dumps(message)
    return len(data).to_bytes(8, "little") + data


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("speval function", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _interpreter_flags() -> list[str]:
    """Return the options this interpreter was started with, such as -O or -X utf8."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [flag for flag in flags if flag != "-P"]


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


async def _surely(awaitable: Any) -> None:
    """Await to the end, and only then raise a cancellation that came meanwhile."""
    task = asyncio.ensure_future(awaitable)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
