"""The filesystem a SQLite file is on.

Owns what can be found out about it: its kind, whether its locks exclude, and whether it shows what other machines have written.
Invariant: no descriptor of a database is ever closed here, because that would drop the locks of this process on it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

from ..errors import DatabaseError

__all__ = ["Freshness", "check_locks", "filesystem", "is_network"]

_NETWORK = {
    "9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "glusterfs", "gfs2", "gpfs", "lustre", "mmfs", "ncpfs", "nfs",
    "nfs4", "ocfs2", "orangefs", "panfs", "prl_fs", "pvfs2", "smb2", "smb3", "smbfs", "vboxsf", "virtiofs", "wekafs",
}  # fmt: skip
_HEADER = 100  # bytes of a database file, the counter of its changes among them
_LOCKLESS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def filesystem(path: Path) -> str | None:
    """Return the kind of filesystem the file is on, or None where that can't be told."""
    if sys.platform != "linux":
        return None
    device = path.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    try:
        with Path("/proc/self/mountinfo").open() as mounts:
            for line in mounts:
                fields = line.split()
                if fields[2] == name:
                    return fields[fields.index("-") + 1]
    except (OSError, ValueError):
        pass
    return None


def is_network(kind: str | None) -> bool:
    """Tell whether a kind of filesystem is shared by several machines, or may be."""
    return kind is not None and (kind in _NETWORK or kind.startswith("fuse."))


def check_locks(path: Path, shown: str, kind: str) -> None:
    """Try the locks of the file's folder, on a file of its own.

    Raises:
        DatabaseError: they don't work, or exclude nobody.
    """
    if sys.platform != "linux":
        return
    # The lock and the description of it, not the process, is who these locks belong to; so one process can be two.
    request = b"".join(
        value.to_bytes(size, sys.byteorder) for value, size in ((fcntl.F_WRLCK, 2), (0, 6), (0, 8), (1, 8), (0, 8))
    )
    try:
        with (
            tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.locks-") as one,
            Path(one.name).open("r+b") as other,
        ):
            fcntl.fcntl(one, fcntl.F_OFD_SETLK, request)
            try:
                fcntl.fcntl(other, fcntl.F_OFD_SETLK, request)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    return
                raise
    except OSError as error:
        if error.errno not in _LOCKLESS:
            return  # what keeps a file from being made will be said of the database itself
        raise DatabaseError(shown, _without_locks(kind, error.strerror or "")) from error
    raise DatabaseError(shown, _without_locks(kind, "two may have one at a time"))


def _without_locks(kind: str, problem: str) -> str:
    return f"its filesystem ({kind}) has no locks that work ({problem}); use a local disk, or a PostgreSQL database"


class Freshness:
    """Looks, under SQLite's lock, whether this machine sees the file as it is.

    Many filesystems in user space let the kernel keep what it has read, whatever other machines have written since. SQLite
    would then take old data for the newest, and write over what the others have recorded.

    Args:
        path: The file.
    """

    _kept: ClassVar[dict[tuple[int, int], tuple[int, int | None]]] = {}

    def __init__(self, path: Path) -> None:
        status = path.stat()
        key = status.st_dev, status.st_ino
        if key not in self._kept:
            try:
                direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
            except OSError:  # no way past the cache
                direct = None
            self._kept[key] = os.open(path, os.O_RDONLY | os.O_CLOEXEC), direct
        self._cached, self._direct = self._kept[key]

    def is_fresh(self) -> bool:
        """Return whether what the kernel shows is what the filesystem has, as far as that can be known."""
        if self._direct is None:
            return True
        with mmap.mmap(-1, mmap.PAGESIZE) as buffer:  # aligned, as reading past the cache wants it
            try:
                size = os.preadv(self._direct, [buffer], 0)
                return os.pread(self._cached, _HEADER, 0) == buffer[: min(size, _HEADER)]
            except OSError:
                return True  # SQLite will meet the same
