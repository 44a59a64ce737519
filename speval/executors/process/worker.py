"""One worker process, as its parent sees it.

Owns starting it, the channel to it, noticing its end and ending it with all it has started. Invariant: whatever the function
does to the channel or to the process costs this one worker and no other; after ``kill`` no process of its group is left.
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
_START_WITHIN = 300.0  # seconds a worker may take to import what the function needs
_DIE_WITHIN = 5.0  # seconds to wait for a killed process; one in the middle of a disk's or a driver's call takes its time
_GROUP_WITHIN = 0.3  # seconds to wait for the rest of its group
_MOST_TOKENS = 4096
_END_WITHIN = 8.0  # seconds an idle worker has for what it does at its exit; less than a stopped run has in all
_SAY_AFTER = 1.0  # seconds after which that is said
_TAG = 8  # bytes
_HEAD = _TAG + 8


class WorkerProcess:
    """One worker process."""

    def __init__(self, payload: int, outputs: Outputs) -> None:
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()  # of the parent
        ours, theirs = socket.socketpair()
        # Fails on a full pipe instead of waiting; a batch has fewer calls than a pipe has room for.
        pipes: list[int] = []
        try:
            pipes += os.pipe()
            pipes += os.pipe()
            OpenFiles.check(max(pipes))
            # Neither is as socket.setdefaulttimeout() has it; and a patched module may do nothing when it is told to block.
            ours.setblocking(False)
            os.set_blocking(theirs.fileno(), True)
            tokens, self._tokens_in, lifeline, self._lifeline = pipes
            os.set_blocking(tokens, False)
            # What the function writes to the channel by mistake does not have it.
            self._tag = os.urandom(_TAG)
            self._popen = self._started((theirs.fileno(), tokens, lifeline, payload), outputs)
        except BaseException:
            ours.close()
            for fd in pipes:
                os.close(fd)
            raise
        finally:
            theirs.close()
        os.close(lifeline)
        self._group = Group(self._popen.pid)
        self._tokens = tokens
        self._socket = ours
        self._received = bytearray()
        self.garbled = False  # what came through the channel is not what a worker sends
        self.on_message: Callable[[Any], None] = self._on_first_message
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._ready.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.exited: asyncio.Future[None] = self._loop.create_future()
        self._pidfd = -1
        self._poll: asyncio.TimerHandle | None = None
        self._sending: asyncio.Task[None] | None = None
        self._is_closed = False
        self._is_ending = False
        self._is_status_known = False
        self.unstarted = 0  # calls of the last batch that it never began, known when it is dead
        forgotten_after_fork(self)
        self._loop.add_reader(ours, self.receive)
        self._watch()

    def _started(self, fds: tuple[int, int, int, int], outputs: Outputs) -> subprocess.Popen[bytes]:
        numbers = fds if OpenFiles.users_own is None else (*fds, OpenFiles.users_own)
        # Its own session: Ctrl-C is for the parent to hear, `stty tostop` can't stop it, and it can be killed as a group.
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
        """Close what a forked child has of it: the worker is the parent's."""
        if not self._is_closed:
            self._is_closed = True
            fds = [self._tokens, self._tokens_in, self._lifeline, self._socket.detach()]
            for fd in fds if self._pidfd < 0 else [*fds, self._pidfd]:
                with suppress(OSError):
                    os.close(fd)
            self._popen.returncode = 0  # it is not the child's to wait for

    def __repr__(self) -> str:
        return f"<worker process {self._popen.pid}>"

    # Starting

    def load(self) -> None:
        """Let it load the function, which is in the payload now."""
        with suppress(OSError):  # it is dead, which is noticed anyway
            self._socket.send(self._frame("load"))

    def discard(self) -> None:
        """End one that has not been told to load the function: it runs no code of the user's, so this takes no time."""
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
        frame = memoryview(self._frame(calls))
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
        received, tag = self._received, self._tag
        start, end = 0, len(received)
        while end - start >= _HEAD and not self.garbled:
            size = int.from_bytes(received[start + _TAG : start + _HEAD], "little")
            if received[start : start + _TAG] != tag or end - start - _HEAD - _TAG < size:
                self.garbled = received[start : start + _TAG] != tag
                break
            begin, start = start + _HEAD, start + _HEAD + size + _TAG
            self._take(memoryview(received)[begin : begin + size], received[start - _TAG : start])
        if self.garbled:
            received.clear()
            self._kill_group()  # its end is noticed, and tells the rest
        elif start:
            del received[:start]

    def _take(self, data: memoryview, mark: bytearray) -> None:
        with data:
            try:
                message = marshal.loads(data) if mark == self._tag else None
            except (EOFError, ValueError, TypeError):
                message = None
        if isinstance(message, tuple) and len(message) == 2:
            self.on_message(message)
        else:
            self.garbled = True

    def _frame(self, message: Any) -> bytes:
        data = marshal.dumps(message)
        return b"".join((self._tag, len(data).to_bytes(8, "little"), data, self._tag))

    # Ending

    def _watch(self) -> None:
        """Notice the process's end, also when one of its children keeps the socket open."""
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
        # Without reaping: until the process is reaped, no other group can get its number.
        try:
            return os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def _on_exit(self) -> None:
        self._stop_watching()
        if not self._is_ending:
            self._kill_group()  # whatever it had started
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
        # Once it is reaped, its number may be that of another group.
        if self._popen.returncode is None:
            self._group.kill()

    def distrust(self, message: object) -> None:
        """Kill a worker that says something while it has no call."""
        logger.error("%r sends an answer without a call (%.100r): it is killed", self, message)
        self._kill_group()

    def how(self) -> str:
        """Return how it ended, in words."""
        if self.garbled:
            return "wrote to the channel that belongs to speval, and was killed"
        code = self._popen.returncode
        if code is None:
            return "is still running"
        if not self._is_status_known:
            return (
                "ended, with a status that this process was not told (SIGCHLD is ignored, or something else waits for children)"
            )
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
            if self._is_ending and self._popen.returncode is not None and self._group.lives():
                self._group.kill()
            self._is_ending = False
            self._kill_group()
            if not self.exited.done():
                # Not cancelled half way: what is recorded after this must be true.
                await surely(asyncio.wait({self.exited}, timeout=_DIE_WITHIN))
            if not self.exited.done():
                logger.warning(
                    "%r was killed and is still there: the system keeps it in a call that can't be interrupted", self
                )
            deadline = time.monotonic() + _GROUP_WITHIN
            while self._popen.returncode is not None and self._group.lives() and time.monotonic() < deadline:
                await surely(asyncio.sleep(0.002))
        finally:
            if not self._is_closed:
                self.receive()  # what it had sent before
                self.unstarted = self.take_back(_MOST_TOKENS)
                self._close()

    async def end(self) -> None:
        """Let an idle worker end by itself, with all it does at its exit; what is not over by then is killed."""
        self._is_ending = True
        self._loop.remove_reader(self._socket)
        with suppress(OSError):  # it is dead
            self._socket.shutdown(socket.SHUT_WR)
        told = self._loop.call_later(_SAY_AFTER, logger.info, "%r takes its time to exit; it has %g s", self, _END_WITHIN)
        try:
            async with asyncio.timeout(_END_WITHIN):
                await asyncio.shield(self.exited)
                # Helpers that end after it, such as multiprocessing's resource tracker, which cleans up behind it.
                for pause in pauses(0.001, 0.1):
                    if not self._group.lives():
                        break
                    await asyncio.sleep(pause)
        except TimeoutError:
            logger.warning("%r has not ended within %g s and is killed with all it has started", self, _END_WITHIN)
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
            for fd in (self._tokens, self._tokens_in, self._lifeline):
                os.close(fd)


def _interpreter_flags() -> list[str]:
    """Return the options this interpreter was started with, such as -O or -X utf8."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [flag for flag in flags if flag != "-P"]
