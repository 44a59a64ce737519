"""How the processes of a user's executor report that a call begins.

Owns the way their word takes to this process. Invariant: a call is reported as begun only when it has: a pool says so already
of what waits in its pipes. Where there is no way, there is no channel, and nothing is reported.
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

__all__ = ["TOKEN", "Channel", "open_channel"]

TOKEN = 16  # characters of a call's token


class Channel:
    """Reports tokens of calls that begin.

    Attributes:
        address: What a call is given to tell its beginning.
    """

    address: tuple[str, str]

    def close(self) -> None:
        """Report no more."""


class _Fifo(Channel):
    """For processes of this machine: whichever way they were started, they can open a named pipe."""

    def __init__(self, report: Callable[[str], object]) -> None:
        self._report = report
        self._folder = Path(tempfile.mkdtemp(prefix="speval-"))  # only this user may enter it
        self._path = self._folder / "begun"
        self._fd = -1
        try:
            os.mkfifo(self._path, 0o600)
            # For writing too: so it never comes to its end.
            self._fd = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._fd, self._read)
        except BaseException:
            self._remove()
            raise
        self.address = ("fifo", str(self._path))

    def _read(self) -> None:
        with suppress(BlockingIOError):
            data = os.read(self._fd, TOKEN * 1024)  # each was written at once, and so is whole
            for start in range(0, len(data), TOKEN):
                self._report(data[start : start + TOKEN].decode(errors="replace"))

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
    """For the workers of a Dask cluster: events of a topic come by way of the scheduler, before the call's result."""

    def __init__(self, client: Any, report: Callable[[str], object]) -> None:
        loop, topic = asyncio.get_running_loop(), f"speval-{secrets.token_hex(8)}"

        def hear(event: tuple[float, str]) -> None:
            with suppress(RuntimeError):  # the loop is over
                loop.call_soon_threadsafe(report, event[1])

        client.subscribe_topic(topic, hear)
        self._client = client
        self.address = ("dask", topic)

    def close(self) -> None:
        with suppress(Exception):  # the client may be closed
            self._client.unsubscribe_topic(self.address[1])


def open_channel(pool: Executor, report: Callable[[str], object]) -> Channel | None:
    """Open the channel for a pool, if there is one.

    Args:
        pool: The executor.
        report: Told the token of each call that begins, in the event loop.
    """
    try:
        if type(pool).__module__.startswith("distributed."):
            return _DaskEvents(pool._client, report)  # type: ignore[attr-defined]
        if isinstance(pool, ProcessPoolExecutor) or type(pool).__module__.startswith("loky."):
            return _Fifo(report)
    except Exception:  # no place for a pipe, or a client of another kind
        return None
    return None
