"""A terminal with a bar on its last line.

Owns all output to the terminal while a bar is drawn: the bar, the output of this process, and that of its worker processes.
Invariant: output looks the same as without a bar, output of this process is never lost when it dies, and the mode of the
terminal is never changed.
"""

from __future__ import annotations

import fcntl
import io
import os
import select
import struct
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from ..model import Outputs

__all__ = ["Screen", "opened"]

_TICK = 0.1  # seconds between two checks for something to draw
_SELDOM = 0.05  # the minimum time between two drawings, seconds
_BUFFERED = 4096  # characters; a stream buffers at least this many
_UNFINISHED = 0.3  # seconds after which the bar is drawn below an unfinished line
_CLEAR = "\r\x1b[K"
_LINE_UP = "\x1b[A\r"


class Screen:
    """Keeps a bar below all output; draws in a separate thread, so that a stopped terminal blocks only that thread.

    Args:
        fd: A file descriptor of the terminal.
    """

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)
        self._terminal = os.fstat(fd).st_rdev
        self._pid = os.getpid()
        # Reentrant: a signal handler may print while this thread prints.
        self._lock = threading.RLock()
        self._bar = ""
        self._drawn = ""  # the bar on the terminal
        self._is_below = False  # whether the bar is below an unfinished line
        self._tail = ""  # the text of the unfinished line
        self._printed_at = 0.0
        self._drawn_at = 0.0
        self._size = (0, 0)
        self._is_closed = False
        self._patched: list[TextIO] = []
        try:
            # With a pseudo-terminal, isatty() is still true in the function.
            self._relay, self._inlet = os.openpty()
            tty.setraw(self._inlet)
        except OSError:
            self._relay, self._inlet = os.pipe()
        self._columns()
        self._thread = threading.Thread(target=self._run, name="speval screen", daemon=True)
        self._thread.start()
        for stream in {id(s): s for s in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__) if s is not None}.values():
            self._route(stream)

    def __repr__(self) -> str:
        return f"<Screen{' closed' if self._is_closed else ''}>"

    @property
    def outputs(self) -> Outputs:
        """Return the outputs for worker processes."""
        out, err = (self._inlet if self._is_ours(fd) else None for fd in (1, 2))
        return out, err

    def _is_ours(self, fd: int) -> bool:
        try:
            return os.isatty(fd) and os.fstat(fd).st_rdev == self._terminal
        except OSError:
            return False

    def _route(self, stream: TextIO) -> None:
        """Route all writes to a stream around the bar."""
        try:
            if not self._is_ours(stream.fileno()):
                return
        except (AttributeError, OSError, ValueError):
            return
        write, flush = stream.write, stream.flush
        # Unbuffered: `python -u`, and stream classes of other packages.
        is_buffered = isinstance(stream, io.TextIOWrapper) and not stream.write_through
        waiting = ""  # in the stream's own buffer

        def through(text: str) -> int:
            nonlocal waiting
            if self._is_not_ours():
                return write(text)
            with self._lock:
                waiting += text
                # print() writes a line in pieces. If each piece went to the terminal, pieces of several threads would mix.
                if is_buffered and "\n" not in text and "\r" not in text and len(waiting) < _BUFFERED:
                    return write(text)
                self._make_way()
                count = write(text)
                flush_through()
            return count

        def flush_through() -> None:
            nonlocal waiting
            if self._is_not_ours():
                flush()
                return
            with self._lock:
                if waiting:
                    self._make_way()
                flush()
                if waiting:
                    self._follow(waiting)
                    waiting = ""
                    self._draw_if_due()

        # Patch the stream itself: logging handlers and others already hold a reference to it.
        with suppress(AttributeError):
            flush()
            stream.write, stream.flush = through, flush_through  # type: ignore[method-assign]
            self._patched.append(stream)

    def _is_not_ours(self) -> bool:
        # A forked child has the terminal but not the drawing thread, and the lock may be held by a thread it does not have.
        return self._is_closed or os.getpid() != self._pid

    # The file interface for tqdm

    def write(self, text: str) -> None:
        """Set the text of the bar, which is drawn soon; never waits for the terminal."""
        if bar := text.strip("\r\n").rstrip():
            self._bar = bar

    @property
    def encoding(self) -> str:
        """Return the encoding of the terminal; tqdm chooses its characters by it."""
        return sys.stderr.encoding or "ascii"

    def flush(self) -> None:
        """Do nothing; tqdm requires this method."""

    def fileno(self) -> int:
        """Return the descriptor of the terminal; tqdm reads its width."""
        return self._fd

    def close(self) -> None:
        """Draw the final bar and leave it in place; later output of worker processes is still passed on."""
        for stream in self._patched:
            with suppress(AttributeError):
                stream.flush()
                del stream.write, stream.flush
        with self._lock:
            self._make_way()
            if self._bar:
                self._put(("\r\n" if self._tail else "") + self._bar[: self._columns() - 1] + "\r\n")
                self._tail = ""
            self._is_closed = True
        os.close(self._inlet)
        # The thread ends when every process has closed its end of the pipe. A process that runs on does not block close().
        self._thread.join(timeout=1.0)

    # The drawing thread, and methods that need the lock

    def _run(self) -> None:
        while True:
            readable, _, _ = select.select([self._relay], [], [], _TICK)
            data = b""
            if readable:
                with suppress(OSError):  # Linux raises it when the other end is closed
                    data = os.read(self._relay, 65536)
                if not data:
                    break
            with self._lock:
                if data:
                    self._make_way()
                    self._put(data)
                    self._follow(data.decode(errors="replace"))
                self._draw_if_due()
        os.close(self._relay)
        os.close(self._fd)

    def _make_way(self) -> None:
        if self._drawn:
            self._put(_CLEAR + (_LINE_UP + self._tail if self._is_below else ""))
            self._drawn = ""

    def _follow(self, text: str) -> None:
        """Remember the text of the unfinished line."""
        self._tail = (self._tail + text).rpartition("\n")[2].rpartition("\r")[2][-1000:]
        self._printed_at = time.monotonic()

    def _draw_if_due(self) -> None:
        now = time.monotonic()
        if self._is_closed or now - self._drawn_at < _SELDOM or (self._tail and now - self._printed_at < _UNFINISHED):
            return
        bar = self._bar[: self._columns() - 1]
        if bar == self._drawn:
            return
        below = ""
        if not self._drawn:
            self._is_below = bool(self._tail)
            below = "\r\n" if self._tail else ""
            if self._tail and (not self._tail.isprintable() or len(self._tail) >= self._columns()):
                self._tail, self._is_below = "", False  # this text can't be restored, so the line ends here
        # Return to column 0: output that bypasses this module, such as a crash report, then starts at the margin.
        self._put(below + "\r" + bar + "\x1b[K\r")
        self._drawn, self._drawn_at = bar, now

    def _columns(self) -> int:
        """Return the width of the terminal, and copy its size to the pseudo-terminal."""
        try:
            packed = fcntl.ioctl(self._fd, termios.TIOCGWINSZ, bytes(8))
            lines, columns = struct.unpack("HHHH", packed)[:2]
            if (lines, columns) != self._size:
                self._size = (lines, columns)
                fcntl.ioctl(self._relay, termios.TIOCSWINSZ, packed)
        except OSError:
            pass
        return self._size[1] or 80

    def _put(self, data: str | bytes) -> None:
        left = data.encode(self.encoding, errors="replace") if isinstance(data, str) else data
        while left:
            try:
                left = left[os.write(self._fd, left) :]
            except BlockingIOError:
                select.select([], [self._fd], [], 1.0)
            except OSError:  # the window is closed
                return


@contextmanager
def opened() -> Iterator[Screen | None]:
    """Yield a screen, if stderr is a terminal and this process is in its foreground."""
    screen: Any = None
    # Workers in the background of one terminal would draw over each other.
    with suppress(AttributeError, OSError, ValueError):
        if sys.stderr.isatty() and os.tcgetpgrp(sys.stderr.fileno()) == os.getpgrp():
            screen = Screen(sys.stderr.fileno())
    try:
        yield screen
    finally:
        if screen is not None:
            screen.close()
