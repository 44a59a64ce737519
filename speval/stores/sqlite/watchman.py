"""What becomes of a database file while it is open, or before it is opened.

Owns noticing that the file or its -wal was deleted, replaced or emptied, saving what the open file still holds, and telling
that a file lacks the -wal it was used with. Invariant: nothing that exists is overwritten, and a copy is named only if it is
whole.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, nullcontext, suppress
from itertools import count
from pathlib import Path

from ...escape import visible
from .contents import GuardedConnection

__all__ = ["Watchman", "identity", "lacks_log", "missing_log"]

_NEWEST = "SELECT coalesce(max(seq), 0), (SELECT count(*) FROM evaluations) FROM attempts"
_UNENDED = "SELECT host, pid, machine FROM workers INDEXED BY workers_here WHERE ended_at IS NULL ORDER BY id LIMIT 100"


class Watchman:
    """Watches one open file.

    Args:
        path: Its name.

    Attributes:
        is_linked: Whether it has a second name, a hard link, as of the last look.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log_path = Path(f"{path}-wal")
        self._identity: tuple[int, int] | None = None
        self._log: tuple[int, int] | None = None  # the same of the -wal, where there is one
        self._was_filled = False
        self.is_linked = False
        self._rescued = ""  # what was said of it

    def note_log(self) -> None:
        """Remember the -wal, which is there from now on."""
        self._log = identity(self._log_path)[0]

    def taken_away(self) -> str | None:
        """Return what has happened to the files, None if they are there."""
        how = None
        try:
            found, size, names = identity(self._path)
            if self._identity is None:
                self._identity = found
            if found != self._identity:
                how = "was deleted" if found is None else "was replaced by another file"
            elif self._was_filled and not size:
                how = "was emptied"
            # SQLite itself deletes it only when the last one closes the database, and it holds what is not in the database yet.
            elif self._log is not None and identity(self._log_path)[0] != self._log:
                how = "has lost its -wal file, which was deleted or replaced"
        except OSError:
            return None  # a folder or a server out of reach: SQLite will say
        self._was_filled = self._was_filled or size > 0
        self.is_linked = names > 1
        return how

    def rescue(self, connection: sqlite3.Connection) -> str:
        """Copy what the open file still holds beside the name it had, once, and say where to."""
        if not self._rescued:
            try:
                path = self._copy(connection)
            except (OSError, sqlite3.Error) as error:
                if isinstance(connection, GuardedConnection):
                    connection.raise_caught()
                return f"what was recorded could not be saved: {error}"
            else:
                self._rescued = f"all that was recorded is in {path}: rename it and start again"
                self._remove_log()
        return self._rescued

    def _remove_log(self) -> None:
        """Remove the -wal of a file that is gone: SQLite would apply it to the next file of that name and so destroy that."""
        with suppress(OSError):
            if self._log is not None and identity(self._path)[0] != self._identity and identity(self._log_path)[0] == self._log:
                self._log_path.unlink()
                Path(f"{self._path}-shm").unlink()

    def _copy(self, connection: sqlite3.Connection) -> Path:
        """Return the copy: a new one, or one that another copy of the script has made of the same."""
        held = _newest(connection)
        for number in count(1):
            path = Path(f"{self._path}.rescued{'' if number == 1 else f'-{number}'}")
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
                break
            except FileExistsError:
                if _holds(path, held, connection):
                    return path
        try:
            with connection.unlimited() if isinstance(connection, GuardedConnection) else nullcontext():
                connection.execute("VACUUM INTO ?", (str(path),))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path


def lacks_log(path: Path) -> bool:
    """Tell whether a file stands without a -wal, or with an empty one; asked before anything opens it."""
    try:
        return not Path(f"{path}-wal").stat().st_size
    except FileNotFoundError:
        return True
    except OSError:
        return False


def missing_log(connection: sqlite3.Connection, machine: str | None = None) -> str | None:
    """Return what there is to say of a file that lacks a -wal, None if it needs none.

    A worker writes to the -wal until it leaves. Where one has not left and there is no -wal, the file was copied without it; or
    the worker died, and another program has opened and closed the file since, which moves all of the -wal into it.

    Args:
        connection: To the file.
        machine: Do not count workers of this one, where the second is likely.
    """
    if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        return None
    left = [f"{host}:{pid}" for host, pid, where in connection.execute(_UNENDED) if where != machine]
    if not left:
        return None
    return visible(
        f"it has no -wal file, and worker {left[0]} has not left: answers are missing if it was copied without its -wal"
    )


def _newest(connection: sqlite3.Connection) -> tuple[int, int]:
    newest: tuple[int, int] = connection.execute(_NEWEST).fetchone()
    return newest


def _holds(path: Path, held: tuple[int, int], connection: sqlite3.Connection) -> bool:
    """Tell whether a rescued file is whole, and of the same evaluations and attempts."""
    sample = "SELECT * FROM attempts ORDER BY seq DESC LIMIT 100"
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0)) as other:
            return _newest(other) == held and other.execute(sample).fetchall() == connection.execute(sample).fetchall()
    except sqlite3.Error:  # empty, or being written
        return False


def identity(path: Path) -> tuple[tuple[int, int] | None, int, int]:
    """Return what tells a file from every other one, None if there is none of that name, its size and how many names it has."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None, 0, 0
    return (status.st_dev, status.st_ino), status.st_size, status.st_nlink
