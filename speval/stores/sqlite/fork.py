"""The process that has a SQLite file open.

Owns the list of files that the parent of a forked process had open. SQLite keeps its locks in the memory of the process, so a
forked child wrongly assumes that it holds the locks of its parent. Invariant: a forked child never uses a connection of its
parent, and never opens a file that its parent had open at the fork.
"""

from __future__ import annotations

import os

from ...errors import DatabaseError

__all__ = ["Owner"]

_FIX = "start it as a new process (multiprocessing.get_context('spawn') or 'forkserver'), or fork before the database is opened"
_open: set[Owner] = set()  # of this process and its ancestors by fork; it needs no lock, because each access is atomic


class Owner:
    """The process that has opened a file; registered while the file is open.

    Args:
        file: Device and number of the file.
        shown: The file, for messages.

    Attributes:
        is_first: Whether this process did not have the file open before.

    Raises:
        DatabaseError: this process was forked from one that had the file open.
    """

    def __init__(self, file: tuple[int, int], shown: str) -> None:
        self._pid = os.getpid()
        self._file = file
        self._shown = shown
        for other in _open.copy():
            if other._file == file and not other.is_here:
                problem = f"the file was open in process {other._pid} when this process ({self._pid}) was forked from it"
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
        """Check that this is still the process that opened the file.

        Raises:
            DatabaseError: this process was forked from that one.
        """
        if not self.is_here:
            problem = f"process {self._pid} opened the file, and this process ({os.getpid()}), a fork of it, can't use it"
            raise DatabaseError(self._shown, f"{problem}; {_FIX}")

    def leave(self) -> None:
        """Remove the entry when the file is closed; a second call and a call in a forked child do nothing."""
        if self.is_here:
            _open.discard(self)
