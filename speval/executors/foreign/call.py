"""The code that runs in the processes of a pool.

Owns the functions that are loaded there. Invariant: a call runs the function it was submitted with, also when this process
serves other calls at the same time. A call that can't report its start, although it was asked to, does not run.
"""

from __future__ import annotations

import os
import pickle
import threading
from typing import Any

from ...clock import Clock
from ...model import Result
from ..call import evaluate

__all__ = ["NEEDS_PAYLOAD", "NOT_TOLD", "call_loaded"]

NEEDS_PAYLOAD = "payload"  # this process does not have the function
NOT_TOLD = "not told"  # the start of the call could not be reported
_MOST_LOADED = 4  # the number of recently used functions to keep; each may use much memory

_loaded: dict[bytes, Any] = {}
_lock = threading.Lock()


def call_loaded(
    digest: bytes, payload: bytes | None, key: str, channel: tuple[str, str] | None, name: str, args: str
) -> Result | str:
    """Call a function.

    Args:
        digest: The digest of the function.
        payload: The pickled function, or None if this process should have it.
        key: A unique key of the call, so that calls are never equal.
        channel: The address for the report that the call starts.
        name: The evaluation's name.
        args: Its args as JSON.

    Returns:
        The result, or one of the constants above if the function was not called.
    """
    loaded = _load(digest, payload)
    if loaded is None:
        return NEEDS_PAYLOAD
    if channel is not None and not _tell(*channel, key):
        return NOT_TOLD
    function, retry_on = loaded
    return evaluate(function, name, args, retry_on, Clock())


def _load(digest: bytes, payload: bytes | None) -> Any:
    loaded = _used(digest, None)
    if loaded is None and payload is not None:
        # Not under the lock: loading and deleting functions run code of the user.
        loaded = _used(digest, pickle.loads(payload))
    return loaded


def _used(digest: bytes, new: Any) -> Any:
    """Return the function of a digest and mark it as recently used; if it is missing, add and return the new one."""
    dropped = []
    with _lock:
        loaded = _loaded.pop(digest, new)
        if loaded is not None:
            _loaded[digest] = loaded
        while len(_loaded) > _MOST_LOADED:
            dropped.append(_loaded.pop(next(iter(_loaded))))
    return loaded


def _tell(kind: str, where: str, key: str) -> bool:
    """Report that a call starts; return whether this succeeded."""
    try:
        if kind == "dask":
            from distributed import get_worker

            get_worker().log_event(where, key)
            return True
        # Opening fails without a reader: then the run is over, and this call was abandoned.
        fd = os.open(where, os.O_WRONLY | os.O_NONBLOCK)
        try:
            return os.write(fd, key.encode()) == len(key)
        finally:
            os.close(fd)
    except Exception:
        return False
