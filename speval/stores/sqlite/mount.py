"""The filesystem a SQLite file is on.

Owns what can be found out about it: its kind, whether its locks exclude, and whether it shows what other machines have written.
Invariant: no descriptor of a database is ever closed here, because that would drop the locks of this process on it; those of
``O_PATH`` have no part in locks.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from ...errors import DatabaseError

__all__ = ["Freshness", "check_locks", "filesystem", "is_mount_point", "is_network", "kind_of_place"]

# One kernel alone writes to these. Any other kind, also one that is yet to be made, may be shared by several machines.
_LOCAL = {
    "apfs", "aufs", "bcachefs", "btrfs", "cramfs", "devtmpfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "fuseblk",
    "hfs", "hfsplus", "iso9660", "jffs2", "jfs", "minix", "msdos", "nilfs2", "ntfs", "ntfs3", "overlay", "ramfs", "reiser4",
    "reiserfs", "rootfs", "squashfs", "tmpfs", "ubifs", "udf", "ufs", "vfat", "xfs", "zfs",
}  # fmt: skip
_NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "fuse.ceph", "fuse.glusterfs", "fuse.gcsfuse", "fuse.juicefs",
    "fuse.lizardfs", "fuse.mfs", "fuse.moosefs", "fuse.s3fs", "fuse.sshfs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs",
    "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "wekafs",
}  # fmt: skip
_UNKNOWN = "unknown"
_HEADER = 100  # bytes of a database file, the counter of its changes among them
_LOCKLESS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def filesystem(path: Path) -> str | None:
    """Return the kind of filesystem the file is on, ``"unknown"`` where Linux does not tell, None on other systems."""
    if sys.platform != "linux":
        return None
    # By the number of the mount: a file's device is another one than its mount's in a subvolume and in an overlay.
    number, device = _mount_of(path), path.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    for fields in _mounts():
        if fields[0] == number if number else fields[2] == name:
            return fields[fields.index("-") + 1]
    return _UNKNOWN


def is_mount_point(path: Path) -> bool:
    """Tell whether a file has been mounted by itself, away from the folder that it is in (``docker -v runs.db:/runs.db``)."""
    if sys.platform != "linux":
        return False
    number = _mount_of(path)
    if number is not None:
        return number != _mount_of(path.parent)
    escaped = "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in str(path))
    return any(fields[4] == escaped for fields in _mounts())


def _mounts() -> Iterator[list[str]]:
    """Yield the fields of each line of the mount table, as far as it can be read."""
    with suppress(OSError), Path("/proc/self/mountinfo").open(errors="surrogateescape") as mounts:
        for line in mounts:
            yield line.split(" ")


def _mount_of(path: Path) -> str | None:
    """Return the number of the mount a file is in, None where the kernel does not tell."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with Path(f"/proc/self/fdinfo/{descriptor}").open() as lines:
            return next((line.split()[1] for line in lines if line.startswith("mnt_id:")), None)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def is_network(kind: str | None) -> bool:
    """Tell whether a kind of filesystem is shared by several machines, or may be."""
    return kind is not None and kind not in _LOCAL


def kind_of_place(kind: str | None) -> str:
    """Return how messages name a filesystem that is not known to be local."""
    return f"a network filesystem ({kind})" if kind in _NETWORK else f"a filesystem that is not known to be local ({kind})"


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
