"""The process group of a worker process: the process and its children that did not leave the group.

Owns signalling, checking and reaping the group. Invariant: processes outside of the group are never signalled or reaped.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["Group"]


class Group:
    """The process group of a leader.

    Args:
        leader: The pid of the leader, which is also the number of the group. The leader is reaped elsewhere.
    """

    def __init__(self, leader: int) -> None:
        self._leader = leader

    def __repr__(self) -> str:
        return f"<process group {self._leader}>"

    def kill(self) -> None:
        """Send SIGKILL to every process of the group."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._leader, signal.SIGKILL)

    def lives(self) -> bool:
        """Tell whether a process of the group runs; zombies do not count.

        Call it after the leader was reaped.
        """
        self._reap()
        try:
            os.killpg(self._leader, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        # A zombie keeps its pid until its parent reaps it, which in a container may never happen.
        return sys.platform != "linux" or self._has_running()

    def _reap(self) -> None:
        """Reap orphaned processes that have become our children: in a container, our process may be init."""
        with suppress(ChildProcessError):
            while os.waitpid(-self._leader, os.WNOHANG)[0]:
                pass

    def _has_running(self) -> bool:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            if int(fields[2]) == self._leader and fields[0] not in ("Z", "X"):
                return True
        return False
