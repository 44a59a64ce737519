"""Connecting to a SQLite file, by those too who may only read it.

Owns what tells whether a file that is read without locks stands still. Invariant: two equal stillnesses mean that what was read
in between is one state of the file; a log is never overlooked.
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
    """A file at a moment."""

    inode: int
    size: int
    changed_at: int  # nanoseconds
    log: int  # bytes of the -wal


def stillness(path: Path) -> Stillness:
    """Return how a file is now."""
    log = 0
    with suppress(OSError):
        log = Path(f"{path}-wal").stat().st_size
    try:
        status = path.stat()
    except OSError:
        return Stillness(0, 0, 0, log)
    return Stillness(status.st_ino, status.st_size, status.st_mtime_ns, log)


def connected(path: Path, shown: str, *, reads: bool) -> tuple[GuardedConnection, Stillness | None]:
    """Return a connection, and how the file stands if it had to be opened as one that nobody changes.

    Raises:
        DatabaseError: it can't be read without writing beside it, which we may not.
    """
    # Never mode=rwc: a file that vanishes between two copies' starts must not come back empty under one of them. And not
    # mode=ro for reading: a reader that may write cleans up behind itself.
    uri = f"file:{quote(str(path))}?mode=rw"
    connection = guarded(uri, path, shown, is_reader=reads)
    is_open = may_use(path.parent, os.W_OK)
    if not reads or is_open or not is_unreadable(connection):
        return connection, None
    connection.close()
    # In a folder we may not write to, a WAL database opens only as one that nobody changes; with no -wal, nobody does.
    still = stillness(path)
    if still.log:
        why = permission(path.parent, "wx")
        raise DatabaseError(shown, f"its -wal file has to be merged, and {why}; or copy both files and read the copy")
    return guarded(f"{uri}&immutable=1", path, shown, is_reader=True), still
