"""Whether a SQLite file stands still.

Owns what tells that somebody has written since. Invariant: two equal ones mean that what was read in between is one state of
the file; a log is never overlooked.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = ["Stillness", "stillness"]


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
