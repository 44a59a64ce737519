"""A worker's process group: the worker and all it has started that did not leave.

Owns signalling, watching and burying the group. Invariant: nothing outside of the group is signalled or reaped.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["Group"]


class Group:
    """The group that a process leads.

    Args:
        leader: The number of the process, which is that of the group too. It is not reaped here.
    """

    def __init__(self, leader: int) -> None:
        self._leader = leader

    def __repr__(self) -> str:
        return f"<process group {self._leader}>"

    def kill(self) -> None:
        """Send SIGKILL to every process of it."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._leader, signal.SIGKILL)

    def lives(self) -> bool:
        """Tell whether one of its processes runs; zombies do not.

        The leader has been reaped by now.
        """
        self._reap()
        try:
            os.killpg(self._leader, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        # A zombie has a number too, for as long as its parent does not reap it, which in a container may be for ever.
        return sys.platform != "linux" or self._has_running()

    def _reap(self) -> None:
        """Reap those whose parent is gone, where they have become our children: in a container, our process may be init."""
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
