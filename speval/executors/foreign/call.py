"""What runs in a user's executor, in another process.

Owns the functions that are loaded there. Invariant: a call runs the function it was submitted with, whatever other calls this
process serves at the same time; and one that must report its beginning and can't does not run at all.
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

NEEDS_PAYLOAD = "payload"  # this process has not got the function
NOT_TOLD = "not told"  # the beginning of the call could not be reported
_MOST_LOADED = 4  # functions, the last ones used; each may hold much memory

_loaded: dict[bytes, Any] = {}
_lock = threading.Lock()


def call_loaded(
    digest: bytes, payload: bytes | None, token: str, channel: tuple[str, str] | None, name: str, args: str
) -> Result | str:
    """Call a function.

    Args:
        digest: Which function.
        payload: The function itself; None, where this process is thought to have it.
        token: The call's own; it makes no two calls equal.
        channel: Where to tell that the call begins.
        name: The evaluation's name.
        args: Its args as JSON.

    Returns:
        How it ended, or one of the words above, and then the function has not been called.
    """
    loaded = _load(digest, payload)
    if loaded is None:
        return NEEDS_PAYLOAD
    if channel is not None and not _tell(*channel, token):
        return NOT_TOLD
    function, retry_on = loaded
    return evaluate(function, name, args, retry_on, Clock())


def _load(digest: bytes, payload: bytes | None) -> Any:
    loaded = _used(digest, None)
    if loaded is None and payload is not None:
        # Not under the lock, since it runs the user's code, and so does the end of what is dropped.
        loaded = _used(digest, pickle.loads(payload))
    return loaded


def _used(digest: bytes, new: Any) -> Any:
    """Return the function of a digest as the last one used; when there is none yet, the new one."""
    dropped = []
    with _lock:
        loaded = _loaded.pop(digest, new)
        if loaded is not None:
            _loaded[digest] = loaded
        while len(_loaded) > _MOST_LOADED:
            dropped.append(_loaded.pop(next(iter(_loaded))))
    return loaded


def _tell(kind: str, where: str, token: str) -> bool:
    """Tell that a call begins; False if it can't be done."""
    try:
        if kind == "dask":
            from distributed import get_worker

            get_worker().log_event(where, token)
            return True
        # It fails when nothing reads it: then the run is over, and this call has been given up.
        fd = os.open(where, os.O_WRONLY | os.O_NONBLOCK)
        try:
            return os.write(fd, token.encode()) == len(token)
        finally:
            os.close(fd)
    except Exception:
        return False
