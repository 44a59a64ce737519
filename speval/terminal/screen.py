"""A terminal with a bar on its last line.

Owns whatever is written to the terminal while a bar stands there: the bar itself, what this process prints, and what its
worker processes print. Invariant: what is printed appears as if there were no bar, nothing that this process prints is lost
when it dies, and the terminal is in no mode that somebody would have to reset.
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

_TICK = 0.1  # seconds between two looks at what there is to draw
_SELDOM = 0.05  # seconds between two drawings
_BUFFERED = 4096  # characters; a stream keeps at least so many to itself
_UNFINISHED = 0.3  # seconds after which a line that is not ended has to put up with a bar below it
_CLEAR = "\r\x1b[K"
_LINE_UP = "\x1b[A\r"


class Screen:
    """Keeps a bar below what is printed; draws in a thread of its own, so that a stopped terminal stops nobody else.

    Args:
        fd: A descriptor of the terminal.
    """

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)
        self._terminal = os.fstat(fd).st_rdev
        self._pid = os.getpid()
        # A signal's handler may print in the middle of a print.
        self._lock = threading.RLock()
        self._bar = ""
        self._drawn = ""  # the bar that stands there
        self._is_below = False  # it stands below a line that is not ended
        self._tail = ""  # what that line holds
        self._printed_at = 0.0
        self._drawn_at = 0.0
        self._size = (0, 0)
        self._is_closed = False
        self._patched: list[TextIO] = []
        try:
            # So that for the function it is still a terminal that it prints to.
            self._relay, self._inlet = os.openpty()
            tty.setraw(self._inlet)
        except OSError:
            self._relay, self._inlet = os.pipe()
        self._columns()
        self._thread = threading.Thread(target=self._run, name="speval screen", daemon=True)
        self._thread.start()
        for stream in {id(s): s for s in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__) if s is not None}.values():
            self._lead_through(stream)

    def __repr__(self) -> str:
        return f"<Screen{' closed' if self._is_closed else ''}>"

    @property
    def outputs(self) -> Outputs:
        """Return what worker processes are to print to."""
        out, err = (self._inlet if self._is_ours(fd) else None for fd in (1, 2))
        return out, err

    def _is_ours(self, fd: int) -> bool:
        try:
            return os.isatty(fd) and os.fstat(fd).st_rdev == self._terminal
        except OSError:
            return False

    def _lead_through(self, stream: TextIO) -> None:
        """Have what is written to a stream make its way around the bar."""
        try:
            if not self._is_ours(stream.fileno()):
                return
        except (AttributeError, OSError, ValueError):
            return
        write, flush = stream.write, stream.flush
        # With `python -u`, and in streams of others, every piece goes out at once.
        is_buffered = isinstance(stream, io.TextIOWrapper) and not stream.write_through
        waiting = ""  # in the stream's own buffer

        def through(text: str) -> int:
            nonlocal waiting
            if self._is_not_ours():
                return write(text)
            with self._lock:
                waiting += text
                # print() writes a line in pieces. Those of several threads would mix if each piece waited for the terminal.
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

        # The stream itself, not another one in its place: handlers of logging and the like hold it already.
        with suppress(AttributeError):
            flush()
            stream.write, stream.flush = through, flush_through  # type: ignore[method-assign]
            self._patched.append(stream)

    def _is_not_ours(self) -> bool:
        # A fork of us has the terminal, but not the thread that draws, and maybe the lock of another one.
        return self._is_closed or os.getpid() != self._pid

    # What tqdm writes to

    def write(self, text: str) -> None:
        """Have a bar drawn soon, in place of the one before; never waits for the terminal."""
        if bar := text.strip("\r\n").rstrip():
            self._bar = bar

    @property
    def encoding(self) -> str:
        """Return what the terminal takes, by which tqdm chooses its characters."""
        return sys.stderr.encoding or "ascii"

    def flush(self) -> None:
        """Do nothing; tqdm asks for it."""

    def fileno(self) -> int:
        """Return the terminal, whose width tqdm asks for."""
        return self._fd

    def close(self) -> None:
        """Draw the bar for the last time and leave it there; what worker processes still print goes through as before."""
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
        # Ends when no process is left that could print. One that was left behind does not keep us.
        self._thread.join(timeout=1.0)

    # The thread, and what happens under the lock

    def _run(self) -> None:
        while True:
            readable, _, _ = select.select([self._relay], [], [], _TICK)
            data = b""
            if readable:
                with suppress(OSError):  # as Linux says that nobody has the other end any more
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
        """Note what stands on the line that is not ended."""
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
                self._tail, self._is_below = "", False  # it could not be written again, so its line ends here
        # Back to its beginning: what comes past us, such as the last words of a crash, then begins at the margin.
        self._put(below + "\r" + bar + "\x1b[K\r")
        self._drawn, self._drawn_at = bar, now

    def _columns(self) -> int:
        """Return the terminal's width, and tell it to whoever prints through us."""
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
    """Return a screen while the body runs, if stderr is a terminal in whose foreground we are."""
    screen: Any = None
    # Twenty copies in the background of one terminal would draw over each other.
    with suppress(AttributeError, OSError, ValueError):
        if sys.stderr.isatty() and os.tcgetpgrp(sys.stderr.fileno()) == os.getpgrp():
            screen = Screen(sys.stderr.fileno())
    try:
        yield screen
    finally:
        if screen is not None:
            screen.close()
