"""How many files this process may have open, and making room for worker processes.

Owns the soft limit of open files. Invariant: it is only ever raised, never past the hard limit; worker processes get the one
back that the user had.
"""

from __future__ import annotations

import errno
import logging
import os
import threading

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["PER_WORKER", "OpenFiles"]

logger = logging.getLogger("speval.executor")

PER_WORKER = 5  # descriptors the parent has open for each worker process
_RESERVE = 48  # kept for all else: databases, the event loop, what starting a process needs for a moment


class OpenFiles:
    """The limit of open files of this process."""

    _lock = threading.Lock()
    users_own: int | None = None  # the soft limit that the user had set, if it was raised
    _ours: int | None = None  # what it was raised to

    @classmethod
    def make_room(cls, workers: int) -> None:
        """Raise the soft limit if so many worker processes need it and the hard one allows it."""
        if resource is None:
            return
        with cls._lock:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if soft != cls._ours:  # the user has set another one since
                cls.users_own = cls._ours = None
            wanted = workers * PER_WORKER + 2 * _RESERVE + 64
            if soft == resource.RLIM_INFINITY or soft >= wanted or (hard != resource.RLIM_INFINITY and soft >= hard):
                return
            new = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (new, hard))
            except (OSError, ValueError):  # forbidden here: there are fewer workers then
                return
            cls.users_own, cls._ours = cls.users_own or soft, new
            logger.debug("the limit of open files is %d now, it was %d", new, soft)

    @classmethod
    def check(cls, descriptor: int) -> None:
        """See that a descriptor opened just now, the lowest that was free, leaves room for what else must be opened.

        Raises:
            OSError: it does not (EMFILE).
        """
        if resource is None:
            return
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # With a very low limit even a single worker could not be started, so a part of it is all that is kept.
        if soft != resource.RLIM_INFINITY and descriptor > soft - min(_RESERVE, soft // 2):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    @staticmethod
    def explained(error: OSError) -> str:
        """Return what keeps another worker from being started, and what helps."""
        if error.errno in (errno.EMFILE, errno.ENFILE):
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[1] if resource is not None else "?"
            return f"the limit of open files is reached (hard limit {soft}; raise it with `ulimit -n`)"
        if error.errno == errno.EAGAIN:
            return "the system starts no more processes for this user (`ulimit -u`, or the pids limit of a container)"
        if error.errno == errno.ENOMEM:
            return "there is no memory for another process"
        return str(error)
