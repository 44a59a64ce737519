"""The open blocking calls of this process.

Owns their end when the interpreter exits, when the process forks, and when a garbage collection deletes one. Invariant: at
exit each call is ended while its threads still run; a forked child forgets all of them; and code called by a garbage
collection never waits, because it may run in the thread that it would wait for.
"""

from __future__ import annotations

import _thread
import atexit
import concurrent.futures.thread  # noqa: F401 - it registers what closes the pools, and has to do so before us
import gc
import os
import threading
import time
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

__all__ = ["add", "discard", "interrupt_soon", "is_collecting", "watch_collections"]

_PATIENCE = 15.0  # seconds the exit waits; a worker that stops takes 11 at most, unless something blocks its event loop


class _Call(Protocol):
    @property
    def asker(self) -> int:
        """The thread that has asked for something last."""

    def stop(self, at_exit: bool = False) -> None:
        """Have it end in good order; return at once."""

    def wait(self, timeout: float) -> None:
        """Wait until it has ended."""

    def leave(self) -> None:
        """Have it let go of everything, and forget it."""


_open: set[_Call] = set()  # without a lock, which a fork might copy while it is held: each access is atomic
_is_installed = False
# Both phases of the last garbage collection with what Python told about them, the later one last; and the same of each thread.
# They are filled by callbacks written in C: Ctrl-C that arrives during a collection comes out of the first step of Python code
# after it, and would be dropped if that were a callback.
_phases: dict[str, Any] = {}
_here = threading.local()


def add(call: _Call) -> None:
    """Have a call ended at exit, should it be under way then."""
    global _is_installed
    _open.add(call)
    if not _is_installed:
        _is_installed = True
        # Exit handlers run in reverse order of registration, while daemon threads still run.
        atexit.register(_end, everywhere=True)
        # That is too late for calls of the main thread: thread pools are closed by then, and an evaluation that needs one would
        # fail. The code that closes the pools is registered with this hook, and runs after ours.
        with suppress(AttributeError, RuntimeError):  # this hook was removed from Python; or the exit has started
            threading._register_atexit(_end)  # type: ignore[attr-defined]


def discard(call: _Call) -> None:
    """Forget a call that has ended."""
    _open.discard(call)


def _end(everywhere: bool = False) -> None:
    """End the calls of the main thread, which has come to its end; or those of all threads, which are daemons by then."""
    main = threading.main_thread().ident
    calls = [call for call in list(_open) if everywhere or call.asker == main]
    deadline = time.monotonic() + _PATIENCE
    try:
        for call in calls:
            call.stop(at_exit=True)
        for call in calls:
            call.wait(max(0.0, deadline - time.monotonic()))
    finally:  # also when Ctrl-C comes out of the wait
        for call in calls:
            call.leave()


def watch_collections() -> None:
    """Take note from now on of the thread that collects garbage."""
    if _phases.pop not in gc.callbacks:
        gc.callbacks.extend((_phases.pop, _phases.setdefault, partial(setattr, _here)))


def is_collecting() -> bool:
    """Tell whether this thread is within a garbage collection, so that it must not wait for any other."""
    last = next(reversed(_phases), "stop")
    return last == "start" and getattr(_here, "start", None) is _phases.get("start")


def interrupt_soon() -> None:
    """Have Ctrl-C come out of the main thread a moment later: Python drops what comes out of a finalizer."""
    timer = threading.Timer(0.05, _thread.interrupt_main)
    timer.name, timer.daemon = "speval interrupt", True
    timer.start()


if hasattr(os, "register_at_fork"):
    # Their threads are not in the child.
    os.register_at_fork(after_in_child=_open.clear)
