"""What a worker process does: a loop that gets calls from a socket and sends back how they ended.

Owns the child's half of ``process``. Invariant: each result is sent before the next call begins, so a call that kills the
process takes no earlier answer with it; and when the parent is gone, the kernel kills the whole process group.
"""

from __future__ import annotations

# Each of these is compiled in, or loaded already when an interpreter starts: importing socket, signal, threading, typing and
# pickle instead would double the time a worker takes to start.
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
_HIGH = 200  # where the descriptors go that are ours: above those a program has usually


def serve(tag: str, calls_fd: int, tokens_fd: int, lifeline_fd: int, payload_fd: int, open_files: int = 0) -> None:
    """Load the function when the parent says so, then make the calls that arrive until it closes the socket.

    Args:
        tag: What each message begins and ends with, in hexadecimal digits.
        calls_fd: The socket.
        tokens_fd: The pipe with a token for each call.
        lifeline_fd: The pipe that is closed when the parent is gone.
        payload_fd: The file with the function.
        open_files: The soft limit of open files that the user has set, if the parent has raised it for itself; else 0.
    """
    if open_files:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files if hard < 0 else min(open_files, hard), hard))
    calls_fd, tokens_fd, lifeline_fd = (_out_of_the_way(fd) for fd in (calls_fd, tokens_fd, lifeline_fd))
    os.set_inheritable(payload_fd, False)
    os.set_blocking(calls_fd, True)
    _die_with_the_parent(lifeline_fd)
    calls = _Channel(calls_fd, bytes.fromhex(tag))
    # Ctrl-C does not reach this session, but Slurm sends SIGINT to all processes of a job step. What to do then is for the
    # parent to say. A handler, because what is ignored would be so in every program the function starts.
    _signal.signal(_SIGINT, lambda *_: None)
    # What is printed before a crash is on the terminal; and a line is one write, or those of several workers would mix.
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
    _make_calls(calls, tokens_fd, lambda name, args: _evaluate(function, name, args, retry_on, clock))


def _make_calls(calls: _Channel, tokens_fd: int, call: Callable[[str, str], Any]) -> None:
    """Make the calls that arrive until the parent closes the socket."""
    while (batch := calls.receive()) is not None:
        left = len(batch)
        for name, args in batch:
            # Each call has a token in a pipe. Either this process reads it and makes the call, or the parent reads it and takes
            # the call back; the kernel gives it to one of them.
            try:
                os.read(tokens_fd, 1)
            except BlockingIOError:
                break  # the rest has been taken back
            left -= 1
            # Its own statement and no name: a big result is not kept while the next one is made.
            calls.send((call(name, args), left == 0))
        if left:
            calls.send((None, True))


def _evaluate(function: Any, name: str, args: str, retry_on: Any, clock: Any) -> Any:
    result = evaluate(function, name, args, retry_on, clock)
    error = result[2]
    if error is not None and error["type"] == "SystemExit" and result[0] == "exception":
        # To call sys.exit() is to end the process, which others have to live through and we don't.
        error |= {"cause": "crash", "message": f"sys.exit({error['message']})"}
        result = ("crash", None, error, *result[3:5], True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: S110 - the function may have closed or replaced them
            pass
    return result


def _die_with_the_parent(lifeline: int) -> None:
    """Have the process group killed when the other end of the lifeline is closed, which the parent's death does too."""
    os.set_blocking(lifeline, True)
    if sys.platform == "linux":
        # The kernel sends the signal by itself: also when this process is stopped, or C code never gives the GIL back.
        fcntl.fcntl(lifeline, _F_SETSIG, _SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)

    def watch() -> None:
        os.read(lifeline, 1)
        os.killpg(0, _SIGKILL)

    # Other systems need the thread; and here, the parent may have died before the line above.
    _thread.start_new_thread(watch, ())


def _load(payload_fd: int) -> tuple[Any, Any]:
    """Load the function from the payload, which all workers map and none copies."""
    # Private to this process where it is written to, shared with all others where it is only read.
    whole = memoryview(mmap.mmap(payload_fd, 0, access=mmap.ACCESS_COPY))
    size = int.from_bytes(whole[:8], "little")
    path, argv, spans = marshal.loads(whole[8 : 8 + size])
    os.close(payload_fd)
    sys.path[:] = path
    sys.argv[:] = argv
    # Looked at by speval(): called at the top level of a module that is imported here, it must not start all over again.
    sys.speval_loading = True  # type: ignore[attr-defined]
    try:
        body, *buffers = (whole[start:end] for start, end in spans)
        loaded: tuple[Any, Any] = loads(body, buffers=buffers)
        return loaded
    finally:
        del sys.speval_loading  # type: ignore[attr-defined]


def _out_of_the_way(fd: int) -> int:
    """Move a descriptor to a high number, so that a function that uses low ones it has not opened does not hit it."""
    # Not inheritable: a grandchild that held it would keep our death from being noticed, or our parent's from it.
    try:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH)
    except (OSError, ValueError):  # the limit is too low for that
        os.set_inheritable(fd, False)
        return fd
    os.close(fd)
    return high


class _Channel:
    """The socket to the parent. A message is the tag, eight bytes of length, the data and the tag once more."""

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
            os._exit(70)  # the function has read from the socket: nothing that comes now can be trusted
        return marshal.loads(memoryview(data)[:-mark])

    def send(self, message: Any) -> None:
        """Send a message whole."""
        data = marshal.dumps(message)
        view = memoryview(b"".join((self._tag, len(data).to_bytes(8, "little"), data, self._tag)))
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except (BrokenPipeError, ConnectionResetError):  # the parent is gone, and a traceback helps no reader
            os.killpg(0, _SIGKILL)

    def _exactly(self, size: int) -> bytes | bytearray | None:
        """Return so many bytes, or None when the parent has closed the socket."""
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
        except ConnectionResetError:  # closed with something of ours unread
            return b""
