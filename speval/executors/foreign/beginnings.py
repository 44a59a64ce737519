"""Reports from the processes of a pool that a call starts.

Owns the channel from these processes to this one. Invariant: a call is reported only after it has started; the pool itself
reports calls as running that still wait in its pipes. For a pool without a channel, nothing is reported.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["KEY_LENGTH", "Channel", "open_channel"]

KEY_LENGTH = 16  # characters: the length of the unique key of a call


class Channel:
    """Reports the keys of calls that start.

    Attributes:
        address: The address to which a call reports its start.
    """

    address: tuple[str, str]

    def close(self) -> None:
        """Stop reporting."""


class _Fifo(Channel):
    """A named pipe, for processes of this machine; it does not depend on how they were started."""

    def __init__(self, report: Callable[[str], object]) -> None:
        self._report = report
        self._folder = Path(tempfile.mkdtemp(prefix="speval-"))  # only this user may enter it
        self._path = self._folder / "begun"
        self._fd = -1
        try:
            os.mkfifo(self._path, 0o600)
            # Also open it for writing, so that reading never reaches the end of the file.
            self._fd = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._fd, self._read)
        except BaseException:
            self._remove()
            raise
        self.address = ("fifo", str(self._path))

    def _read(self) -> None:
        with suppress(BlockingIOError):
            data = os.read(self._fd, KEY_LENGTH * 1024)  # each key was written in one write, so it is complete
            for start in range(0, len(data), KEY_LENGTH):
                self._report(data[start : start + KEY_LENGTH].decode(errors="replace"))

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        self._remove()

    def _remove(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._path.unlink(missing_ok=True)
        with suppress(OSError):
            self._folder.rmdir()


class _DaskEvents(Channel):
    """Events of a Dask topic, for workers of a Dask cluster; the scheduler delivers them before the result of the call."""

    def __init__(self, client: Any, report: Callable[[str], object]) -> None:
        loop, topic = asyncio.get_running_loop(), f"speval-{secrets.token_hex(8)}"

        def hear(event: tuple[float, str]) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(report, event[1])

        client.subscribe_topic(topic, hear)
        self._client = client
        self.address = ("dask", topic)

    def close(self) -> None:
        with suppress(Exception):  # the client may be closed
            self._client.unsubscribe_topic(self.address[1])


def open_channel(pool: Executor, report: Callable[[str], object]) -> Channel | None:
    """Open a channel for a pool, or return None if its kind has no channel.

    Args:
        pool: The pool.
        report: Called in the event loop with the key of each call that starts.
    """
    try:
        if type(pool).__module__.startswith("distributed."):
            return _DaskEvents(pool._client, report)  # type: ignore[attr-defined]
        if isinstance(pool, ProcessPoolExecutor) or type(pool).__module__.startswith("loky."):
            return _Fifo(report)
    except Exception:  # the pipe can't be created, or the client is of another kind
        return None
    return None
