"""The loop of a worker process: it receives calls from a socket and sends their results.

Owns the child's half of ``process``. Invariant: each result is sent before the next call starts, so a call that kills the
process loses no earlier result. When the parent dies, the kernel kills the whole process group.
"""

from __future__ import annotations

# These modules are built in, or loaded at the start of every interpreter. Importing socket, signal, threading, typing and
# pickle would double the start time of a worker process.
import _signal  # type: ignore[import-not-found]  # what the module signal is made of
import _thread
import fcntl
import marshal
import mmap
import os
import sys

from ...clock import Clock
from ..call import evaluate

try:
    from _pickle import loads
except ImportError:  # not CPython
    from pickle import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["serve"]

_F_SETSIG = 10  # Linux
_SIGINT = 2
_SIGKILL = 9
_HIGH = 200  # the lowest number for our descriptors: above those that a program usually has


def serve(tag: str, calls_fd: int, starts_fd: int, lifeline_fd: int, payload_fd: int, open_files: int = 0) -> None:
    """Load the function when the parent requests it, then run calls until the parent closes the socket.

    Args:
        tag: The start and the end of each message, in hexadecimal digits.
        calls_fd: The socket.
        starts_fd: The pipe with a start byte for each call.
        lifeline_fd: The pipe that closes when the parent dies.
        payload_fd: The file with the function.
        open_files: The soft limit of open files of the user, if the parent has raised its limit; otherwise 0.
    """
    if open_files:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files if hard < 0 else min(open_files, hard), hard))
    calls_fd, starts_fd, lifeline_fd = (_out_of_the_way(fd) for fd in (calls_fd, starts_fd, lifeline_fd))
    os.set_inheritable(payload_fd, False)
    os.set_blocking(calls_fd, True)
    _die_with_the_parent(lifeline_fd)
    calls = _Channel(calls_fd, bytes.fromhex(tag))
    # Ctrl-C does not reach this session, but Slurm sends SIGINT to all processes of a job step. The parent decides what to
    # do. A handler, because programs that the function starts would inherit an ignored signal.
    _signal.signal(_SIGINT, lambda *_: None)
    # Line buffering: output before a crash appears, and lines of several worker processes do not mix.
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]
    if calls.receive() is None:  # the function could not be pickled
        return
    clock = Clock()
    try:
        function, retry_on = _load(payload_fd)
    except BaseException as error:
        import traceback

        calls.send(("broken", "".join(traceback.format_exception(error))))
        return
    calls.send(("ready", os.getpid()))
    _make_calls(calls, starts_fd, lambda name, args: _evaluate(function, name, args, retry_on, clock))


def _make_calls(calls: _Channel, starts_fd: int, call: Callable[[str, str], Any]) -> None:
    """Run calls until the parent closes the socket."""
    while (batch := calls.receive()) is not None:
        left = len(batch)
        for name, args in batch:
            # A pipe holds a start byte for each call. This process reads it to start the call, or the parent reads it to take
            # the call back. The kernel gives each byte to one of them.
            try:
                os.read(starts_fd, 1)
            except BlockingIOError:
                break  # the rest has been taken back
            left -= 1
            # No variable for the result: a large one must not stay in memory during the next call.
            calls.send((call(name, args), left == 0))
        if left:
            calls.send((None, True))


def _evaluate(function: Any, name: str, args: str, retry_on: Any, clock: Any) -> Any:
    result = evaluate(function, name, args, retry_on, clock)
    error = result[2]
    if error is not None and error["type"] == "SystemExit" and result[0] == "exception":
        # sys.exit() means ending the process: it counts as a crash here, and not with other executors.
        error |= {"cause": "crash", "message": f"sys.exit({error['message']})"}
        result = ("crash", None, error, *result[3:5], True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: S110 - the function may have closed or replaced them
            pass
    return result


def _die_with_the_parent(lifeline: int) -> None:
    """Kill the process group when the other end of the lifeline closes, as it does when the parent dies."""
    os.set_blocking(lifeline, True)
    if sys.platform == "linux":
        # The kernel sends the signal, also when this process is stopped, or C code never releases the GIL.
        fcntl.fcntl(lifeline, _F_SETSIG, _SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)

    def watch() -> None:
        os.read(lifeline, 1)
        os.killpg(0, _SIGKILL)

    # Other systems need this thread; on Linux, the parent may have died before the lines above.
    _thread.start_new_thread(watch, ())


def _load(payload_fd: int) -> tuple[Any, Any]:
    """Load the function from the payload, which all worker processes map without copying."""
    # Pages that are written become private; all others are shared.
    whole = memoryview(mmap.mmap(payload_fd, 0, access=mmap.ACCESS_COPY))
    size = int.from_bytes(whole[:8], "little")
    path, argv, spans = marshal.loads(whole[8 : 8 + size])
    os.close(payload_fd)
    sys.path[:] = path
    sys.argv[:] = argv
    # speval() checks this: when a module that is imported here calls it at its top level, it must not start a second run.
    sys.speval_loading = True  # type: ignore[attr-defined]
    try:
        body, *buffers = (whole[start:end] for start, end in spans)
        loaded: tuple[Any, Any] = loads(body, buffers=buffers)
        return loaded
    finally:
        del sys.speval_loading  # type: ignore[attr-defined]


def _out_of_the_way(fd: int) -> int:
    """Move a descriptor to a high number, so that a function that uses foreign low numbers does not hit it."""
    # Children must not inherit these descriptors: EOF would never arrive.
    try:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH)
    except (OSError, ValueError):  # the limit of open files is too low
        os.set_inheritable(fd, False)
        return fd
    os.close(fd)
    return high


class _Channel:
    """The socket to the parent. A message is the tag, eight bytes of length, the data and the tag again."""

    def __init__(self, fd: int, tag: bytes) -> None:
        self._fd = fd
        self._tag = tag

    def receive(self) -> Any:
        """Return the next message, None when the parent has closed the socket."""
        mark = len(self._tag)
        head = self._exactly(mark + 8)
        if head is None:
            return None
        data = self._exactly(int.from_bytes(head[mark:], "little") + mark)
        if data is None:
            return None
        if head[:mark] != self._tag or data[-mark:] != self._tag:
            os._exit(70)  # the function has read from the socket: later data can't be trusted
        return marshal.loads(memoryview(data)[:-mark])

    def send(self, message: Any) -> None:
        """Send a complete message."""
        data = marshal.dumps(message)
        view = memoryview(b"".join((self._tag, len(data).to_bytes(8, "little"), data, self._tag)))
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except (BrokenPipeError, ConnectionResetError):  # the parent is dead: exit without a traceback
            os.killpg(0, _SIGKILL)

    def _exactly(self, size: int) -> bytes | bytearray | None:
        """Return ``size`` bytes, or None when the parent has closed the socket."""
        data = self._read(size)
        if len(data) == size:
            return data
        whole = bytearray(data)
        while data and len(whole) < size:
            data = self._read(size - len(whole))
            whole += data
        return whole if len(whole) == size else None

    def _read(self, size: int) -> bytes:
        try:
            return os.read(self._fd, min(size, 1 << 20))
        except ConnectionResetError:  # the parent closed it with unread data
            return b""
