"""One worker process, seen from its parent.

Owns starting it, the channel to it, detecting its end, and ending it with all its children. Invariant: anything that the
function does to the channel or to the process affects only this worker process; after ``kill`` no process of its group is
left.
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
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import FunctionError
from ...model import Outputs
from ...pauses import pauses
from ..base import surely
from ..limits import OpenFiles
from .forked import forgotten_after_fork
from .group import Group

__all__ = ["WorkerProcess"]

logger = logging.getLogger("speval.executor")

_SCRIPT = Path(__file__).with_name("main.py")
_START_WITHIN = 300.0  # seconds for importing what the function needs
_DIE_WITHIN = 5.0  # seconds to wait for a killed process; a system call to a disk or a driver may delay its end
_GROUP_WITHIN = 0.3  # seconds to wait for the rest of its group
_MOST_STARTS = 4096
_END_WITHIN = 8.0  # seconds for the exit handlers of an idle worker process; a stopped run has more in total
_SAY_AFTER = 1.0  # seconds until this is logged
_TAG = 8  # bytes
_HEAD = _TAG + 8


class WorkerProcess:
    """One worker process."""

    def __init__(self, payload: int, outputs: Outputs) -> None:
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()  # of the parent
        ours, theirs = socket.socketpair()
        # Non-blocking: writing to a full pipe fails. A batch has fewer calls than a pipe can hold.
        pipes: list[int] = []
        try:
            pipes += os.pipe()
            pipes += os.pipe()
            OpenFiles.check(max(pipes))
            # Override socket.setdefaulttimeout(). os.set_blocking, because a patched socket module may ignore setblocking().
            ours.setblocking(False)
            os.set_blocking(theirs.fileno(), True)
            starts, self._starts_in, lifeline, self._lifeline = pipes
            os.set_blocking(starts, False)
            # Data that the function writes to the channel by mistake lacks this tag.
            self._tag = os.urandom(_TAG)
            self._popen = self._started((theirs.fileno(), starts, lifeline, payload), outputs)
        except BaseException:
            ours.close()
            for fd in pipes:
                os.close(fd)
            raise
        finally:
            theirs.close()
        os.close(lifeline)
        self._group = Group(self._popen.pid)
        self._starts = starts
        self._socket = ours
        self._received = bytearray()
        self.garbled = False  # what came through the channel is not what a worker sends
        self.on_messages: Callable[[list[Any]], None] = self._on_first_messages
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._ready.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.exited: asyncio.Future[None] = self._loop.create_future()
        self._pidfd = -1
        self._poll: asyncio.TimerHandle | None = None
        self._sending: asyncio.Task[None] | None = None
        self._is_closed = False
        self._is_ending = False
        self._is_status_known = False
        self.unstarted = 0  # calls of the last batch that never started; known when the process is dead
        forgotten_after_fork(self)
        self._loop.add_reader(ours, self.receive)
        self._watch()

    def _started(self, fds: tuple[int, int, int, int], outputs: Outputs) -> subprocess.Popen[bytes]:
        numbers = fds if OpenFiles.users_own is None else (*fds, OpenFiles.users_own)
        # A new session: only the parent gets Ctrl-C, `stty tostop` can't stop it, and it can be killed as a group.
        command = [sys.executable, *_interpreter_flags(), "-P", str(_SCRIPT), self._tag.hex(), *map(str, numbers)]
        return subprocess.Popen(
            command,
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=outputs[0],
            stderr=outputs[1],
            start_new_session=True,
        )

    def forget(self) -> None:
        """Close the descriptors in a forked child: the worker process belongs to the parent."""
        if not self._is_closed:
            self._is_closed = True
            fds = [self._starts, self._starts_in, self._lifeline, self._socket.detach()]
            for fd in fds if self._pidfd < 0 else [*fds, self._pidfd]:
                with suppress(OSError):
                    os.close(fd)
            self._popen.returncode = 0  # the child must not wait for it

    def __repr__(self) -> str:
        return f"<worker process {self._popen.pid}>"

    # Starting

    def load(self) -> None:
        """Tell it to load the function from the payload, which is complete now."""
        with suppress(OSError):  # it is dead, which is detected elsewhere
            self._socket.send(self._frame("load"))

    def discard(self) -> None:
        """End a process that has not loaded the function: it runs no user code, so this is immediate."""
        self._kill_group()
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

    def _on_first_messages(self, messages: list[Any]) -> None:
        kind, value = messages[0]
        if self._ready.done():
            return
        if kind == "ready":
            self._ready.set_result(None)
        else:
            self._ready.set_exception(FunctionError("the function", f"a fresh interpreter can't load it:\n{value}"))

    # Calls

    def send(self, calls: list[tuple[str, str]]) -> None:
        """Send calls, which run one after the other; data that the socket can't take now is sent later."""
        os.write(self._starts_in, bytes(len(calls)))
        frame = memoryview(self._frame(calls))
        try:
            frame = frame[self._socket.send(frame) :]
        except BlockingIOError:
            pass
        except OSError:  # it is dead, which is detected elsewhere
            return
        if frame:
            self._sending = self._loop.create_task(self._send(frame), name="speval args")

    async def _send(self, frame: memoryview) -> None:
        with suppress(OSError):
            await self._loop.sock_sendall(self._socket, frame)

    def take_back(self, most: int) -> int:
        """Take back up to ``most`` calls that have not started, the last ones first; return how many."""
        try:
            return len(os.read(self._starts, most)) if most > 0 else 0
        except BlockingIOError:
            return 0

    def receive(self) -> None:
        """Process the data that has arrived."""
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
        messages, length = self._messages()
        if messages:
            self.on_messages(messages)
        if self.garbled:
            self._received.clear()
            self._kill_group()  # its end is noticed, and tells the rest
        elif length:
            del self._received[:length]

    def _messages(self) -> tuple[list[Any], int]:
        """Return the messages that are complete, and how many bytes they take."""
        messages: list[Any] = []
        received, tag = self._received, self._tag
        start, end = 0, len(received)
        with memoryview(received) as view:
            while end - start >= _HEAD and not self.garbled:
                begin = start + _HEAD
                mark = begin + int.from_bytes(view[start + _TAG : begin], "little")
                if not received.startswith(tag, start):
                    self.garbled = True
                elif end - mark < _TAG:
                    break
                elif received.startswith(tag, mark) and (message := _loaded(view[begin:mark])) is not None:
                    messages.append(message)
                    start = mark + _TAG
                else:
                    self.garbled = True
        return messages, start

    def _frame(self, message: Any) -> bytes:
        data = marshal.dumps(message)
        return b"".join((self._tag, len(data).to_bytes(8, "little"), data, self._tag))

    # Ending

    def _watch(self) -> None:
        """Detect the end of the process, also when one of its children keeps the socket open."""
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
        # Do not reap it: until then, the number of its group can't be reused.
        try:
            return os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def _on_exit(self) -> None:
        self._stop_watching()
        if not self._is_ending:
            self._kill_group()  # its children
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            self._is_status_known = True
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

    def _kill_group(self) -> None:
        # After it is reaped, another group may have its number.
        if self._popen.returncode is None:
            self._group.kill()

    def distrust(self, messages: list[Any]) -> None:
        """Kill a worker that says something while it has no call."""
        logger.error("%r sends an answer without a call (%.100r): it is killed", self, messages[0])
        self._kill_group()

    def how(self) -> str:
        """Return how it ended, as text."""
        if self.garbled:
            return "wrote to the channel that belongs to speval, and was killed"
        code = self._popen.returncode
        if code is None:
            return "is still running"
        if not self._is_status_known:
            return "ended with an unknown status (SIGCHLD is ignored, or other code waits for children)"
        if code >= 0:
            return f"exited with status {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"was killed by {name} ({signal.strsignal(-code) or 'unknown'})"

    async def kill(self) -> None:
        """Kill the process and its group, and return when they are dead."""
        try:
            if self._is_ending and self._popen.returncode is not None and self._group.lives():
                self._group.kill()
            self._is_ending = False
            self._kill_group()
            if not self.exited.done():
                # Shielded from cancellation: the recorded outcome must be true.
                await surely(asyncio.wait({self.exited}, timeout=_DIE_WITHIN))
            if not self.exited.done():
                logger.warning("%r was killed and still exists: the kernel keeps it in a call that can't be interrupted", self)
            deadline = time.monotonic() + _GROUP_WITHIN
            while self._popen.returncode is not None and self._group.lives() and time.monotonic() < deadline:
                await surely(asyncio.sleep(0.002))
        finally:
            if not self._is_closed:
                self.receive()  # messages that it had sent before
                self.unstarted = self.take_back(_MOST_STARTS)
                self._close()

    async def end(self) -> None:
        """Let an idle worker process exit normally, with its exit handlers; kill it after a time limit."""
        self._is_ending = True
        self._loop.remove_reader(self._socket)
        with suppress(OSError):  # it is dead
            self._socket.shutdown(socket.SHUT_WR)
        told = self._loop.call_later(_SAY_AFTER, logger.info, "waiting up to %g s for %r to exit", _END_WITHIN, self)
        try:
            async with asyncio.timeout(_END_WITHIN):
                await asyncio.shield(self.exited)
                # Wait for helpers that end after it, such as multiprocessing's resource tracker.
                for pause in pauses(0.001, 0.1):
                    if not self._group.lives():
                        break
                    await asyncio.sleep(pause)
        except TimeoutError:
            logger.warning("%r did not exit within %g s and is killed with all its children", self, _END_WITHIN)
            self._group.kill()
        finally:
            told.cancel()
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
            for fd in (self._starts, self._starts_in, self._lifeline):
                os.close(fd)


def _loaded(data: memoryview) -> tuple[Any, Any] | None:
    """Return the message that some bytes stand for; None if no worker sends such bytes."""
    try:
        message = marshal.loads(data)
    except (EOFError, ValueError, TypeError):
        return None
    return message if isinstance(message, tuple) and len(message) == 2 else None


def _interpreter_flags() -> list[str]:
    """Return the options of this interpreter, such as -O or -X utf8."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [flag for flag in flags if flag != "-P"]
