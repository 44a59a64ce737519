"""Connecting to a SQLite file, also with read permission only.

Owns the check whether a file that is read without locks has changed. Invariant: two equal values mean that everything read in
between is one state of the file; a -wal is never ignored.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from ...errors import DatabaseError
from .contents import GuardedConnection, guarded
from .errors import is_unreadable, may_use, permission

__all__ = ["Stillness", "connected", "stillness"]


class Stillness(NamedTuple):
    """The state of a file: two equal values mean that it has not changed."""

    inode: int
    size: int
    changed_at: int  # nanoseconds
    log: int  # bytes of the -wal


def stillness(path: Path) -> Stillness:
    """Return the present state of a file."""
    log = 0
    with suppress(OSError):
        log = Path(f"{path}-wal").stat().st_size
    try:
        status = path.stat()
    except OSError:
        return Stillness(0, 0, 0, log)
    return Stillness(status.st_ino, status.st_size, status.st_mtime_ns, log)


def connected(path: Path, shown: str, *, reads: bool) -> tuple[GuardedConnection, Stillness | None]:
    """Return a connection, and the state of the file if it was opened as immutable.

    Raises:
        DatabaseError: reading needs write permission for the folder, which is missing.
    """
    # Never mode=rwc: a file that is deleted between the starts of two workers must not be created again, empty. Not mode=ro for
    # reading: a reader with write permission removes the -wal and -shm that it has created.
    uri = f"file:{quote(str(path))}?mode=rw"
    connection = guarded(uri, path, shown, is_reader=reads)
    is_open = may_use(path.parent, os.W_OK)
    if not reads or is_open or not is_unreadable(connection):
        return connection, None
    connection.close()
    # In a folder without write permission, a WAL database opens only as immutable; without a -wal, no worker changes it.
    still = stillness(path)
    if still.log:
        why = permission(path.parent, "wx")
        raise DatabaseError(shown, f"its -wal must be merged, and {why}; or copy both files and read the copy")
    return guarded(f"{uri}&immutable=1", path, shown, is_reader=True), still
