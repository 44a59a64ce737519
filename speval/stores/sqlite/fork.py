"""Which process has which SQLite file open.

Owns what a forked process has to know of its parent. Invariant: SQLite keeps its locks in the memory of the process that took
them, so a fork believes that it has its parent's, which the kernel has not given it; no fork uses a connection of its parent,
nor opens a file that its parent had open when it forked.
"""

from __future__ import annotations

import os

from ...errors import DatabaseError

__all__ = ["Owner"]

_FIX = "start it as a new process (multiprocessing.get_context('spawn') or 'forkserver'), or fork before the database is opened"
_open: set[Owner] = set()  # of this process and of those it was forked from; without a lock, each access is atomic


class Owner:
    """The process that opens a file, entered as long as the file is open.

    Args:
        file: Device and number of the file.
        shown: The file, for messages.

    Attributes:
        is_first: Whether this process had the file not open before.

    Raises:
        DatabaseError: this is a fork of a process that had the file open.
    """

    def __init__(self, file: tuple[int, int], shown: str) -> None:
        self._pid = os.getpid()
        self._file = file
        self._shown = shown
        for other in _open.copy():
            if other._file == file and not other.is_here:
                problem = f"was open in process {other._pid} when this process ({self._pid}) was forked from it"
                raise DatabaseError(shown, f"{problem}, and can't be used here; {_FIX}")
        self.is_first = not any(other._file == file for other in _open.copy())
        _open.add(self)

    def __repr__(self) -> str:
        return f"<Owner of {self._shown!r}: process {self._pid}>"

    @property
    def is_here(self) -> bool:
        """Return whether this is still the process that opened the file."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """See that this is still the process that opened the file.

        Raises:
            DatabaseError: it is a fork of it.
        """
        if not self.is_here:
            problem = f"was opened by process {self._pid}, and this one ({os.getpid()}) is a fork of it, which can't use it"
            raise DatabaseError(self._shown, f"{problem}; {_FIX}")

    def leave(self) -> None:
        """Take the entry back, the file being closed; calling it again does nothing, nor does a fork's call."""
        if self.is_here:
            _open.discard(self)
