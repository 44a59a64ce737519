"""Watches a database file while it is open, and checks for its -wal before it is opened.

Owns detecting that the file or its -wal was deleted, replaced or truncated, saving the data of the open file, and detecting a
missing -wal. Invariant: existing files are never overwritten, and a message names a copy only when it is complete.
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

_NEWEST = "SELECT coalesce(max(seq), 0), (SELECT count(*) FROM evaluations WHERE id > -9e18) FROM attempts"
_UNENDED = "SELECT host, pid, machine FROM workers INDEXED BY workers_here WHERE ended_at IS NULL ORDER BY id LIMIT 100"


class Watchman:
    """Watches one open file.

    Args:
        path: Its name.

    Attributes:
        is_linked: Whether it had a second name, a hard link, at the last check.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log_path = Path(f"{path}-wal")
        self._identity: tuple[int, int] | None = None
        self._log: tuple[int, int] | None = None  # the identity of the -wal, if it exists
        self._was_filled = False
        self.is_linked = False
        self._rescued = ""  # the message about the rescue

    def note_log(self) -> None:
        """Remember the identity of the -wal, which exists from now on."""
        self._log = identity(self._log_path)[0]

    def taken_away(self) -> str | None:
        """Return what has happened to the files, or None if they exist unchanged."""
        how = None
        try:
            found, size, names = identity(self._path)
            if self._identity is None:
                self._identity = found
            if found != self._identity:
                how = "was deleted" if found is None else "was replaced by another file"
            elif self._was_filled and not size:
                how = "was emptied"
            # SQLite deletes the -wal only when the last connection closes; it contains commits that the database lacks.
            elif self._log is not None and identity(self._log_path)[0] != self._log:
                how = "has lost its -wal file, which was deleted or replaced"
        except OSError:
            return None  # a folder or a server is unreachable: SQLite will report it
        self._was_filled = self._was_filled or size > 0
        self.is_linked = names > 1
        return how

    def rescue(self, connection: sqlite3.Connection) -> str:
        """Copy the data of the open file to a new file beside it, once; return a message that names the copy."""
        if not self._rescued:
            try:
                path = self._copy(connection)
            except (OSError, sqlite3.Error) as error:
                if isinstance(connection, GuardedConnection):
                    connection.raise_caught()
                return f"the recorded data could not be saved: {error}"
            else:
                self._rescued = f"all recorded data is in {path}: rename it and start again"
                self._remove_log()
        return self._rescued

    def _remove_log(self) -> None:
        """Remove the -wal of a deleted file: SQLite would apply it to the next file with this name, and destroy that file."""
        with suppress(OSError):
            if self._log is not None and identity(self._path)[0] != self._identity and identity(self._log_path)[0] == self._log:
                self._log_path.unlink()
                Path(f"{self._path}-shm").unlink()

    def _copy(self, connection: sqlite3.Connection) -> Path:
        """Return the path of the copy: a new one, or an equal one that another worker has made."""
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
    """Tell whether the -wal of a file is missing or empty; call it before the file is opened."""
    try:
        return not Path(f"{path}-wal").stat().st_size
    except FileNotFoundError:
        return True
    except OSError:
        return False


def missing_log(connection: sqlite3.Connection, machine: str | None = None) -> str | None:
    """Return a message about a missing -wal, or None if the file needs none.

    A worker writes to the -wal until it leaves. If a worker has not left and the -wal is missing, there are two cases: the
    file was copied without it; or the worker died, and another program has opened and closed the file, which merges the -wal.

    Args:
        connection: The connection to the file.
        machine: Ignore workers of this machine, where the second case is likely.
    """
    if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        return None
    left = [f"{host}:{pid}" for host, pid, where in connection.execute(_UNENDED) if where != machine]
    if not left:
        return None
    return visible(
        f"its -wal is missing, and worker {left[0]} has not left: results are missing if the file was copied without its -wal"
    )


def _newest(connection: sqlite3.Connection) -> tuple[int, int]:
    newest: tuple[int, int] = connection.execute(_NEWEST).fetchone()
    return newest


def _holds(path: Path, held: tuple[int, int], connection: sqlite3.Connection) -> bool:
    """Tell whether a rescued file is complete and has the same evaluations and attempts."""
    sample = "SELECT * FROM attempts ORDER BY seq DESC LIMIT 100"
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0)) as other:
            return _newest(other) == held and other.execute(sample).fetchall() == connection.execute(sample).fetchall()
    except sqlite3.Error:  # empty, or being written
        return False


def identity(path: Path) -> tuple[tuple[int, int] | None, int, int]:
    """Return (identity, size, number of names) of a file; the identity is None if the file does not exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None, 0, 0
    return (status.st_dev, status.st_ino), status.st_size, status.st_nlink
