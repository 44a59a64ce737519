"""The limit of open files of this process, raised for worker processes.

Owns the soft limit of open files. Invariant: the limit is only raised, and never above the hard limit; worker processes get the
limit that the user had set.
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

PER_WORKER = 5  # descriptors that the parent has open for each worker process
_RESERVE = 48  # descriptors for everything else: databases, the event loop, starting a process


class OpenFiles:
    """The limit of open files of this process."""

    _lock = threading.Lock()
    users_own: int | None = None  # the soft limit of the user, if it was raised
    _ours: int | None = None  # the raised limit

    @classmethod
    def make_room(cls, workers: int) -> None:
        """Raise the soft limit if ``workers`` processes need it and the hard limit allows it."""
        if resource is None:
            return
        with cls._lock:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if soft != cls._ours:  # the user has changed it
                cls.users_own = cls._ours = None
            wanted = workers * PER_WORKER + 2 * _RESERVE + 64
            if soft == resource.RLIM_INFINITY or soft >= wanted or (hard != resource.RLIM_INFINITY and soft >= hard):
                return
            new = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (new, hard))
            except (OSError, ValueError):  # not permitted: the run uses fewer worker processes
                return
            cls.users_own, cls._ours = cls.users_own or soft, new
            logger.debug("raised the limit of open files from %d to %d", soft, new)

    @classmethod
    def check(cls, descriptor: int) -> None:
        """Check that a new descriptor, the lowest free number, leaves a reserve for other files.

        Raises:
            OSError: it does not (EMFILE).
        """
        if resource is None:
            return
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # With a very low limit, reserve only a part of it, so that one worker process can start.
        if soft != resource.RLIM_INFINITY and descriptor > soft - min(_RESERVE, soft // 2):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    @staticmethod
    def explained(error: OSError) -> str:
        """Return why no other worker process can start, and the fix."""
        if error.errno in (errno.EMFILE, errno.ENFILE):
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[1] if resource is not None else "?"
            return f"the limit of open files is reached (hard limit {soft}; raise it with `ulimit -n`)"
        if error.errno == errno.EAGAIN:
            return "the system starts no more processes for this user (`ulimit -u`, or the pids limit of a container)"
        if error.errno == errno.ENOMEM:
            return "there is no memory for another process"
        return str(error)
