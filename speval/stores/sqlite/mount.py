"""The filesystem of a SQLite file.

Owns its checks: the kind of filesystem, whether its locks work, and whether it shows what other machines have written.
Invariant: this module never closes a descriptor of a database, because that would drop the locks of this process; descriptors
with ``O_PATH`` do not matter for locks.
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

# Only one kernel writes to these. Any other kind, also an unknown future one, may be shared by several machines.
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
    """Return the kind of filesystem of a file, ``"unknown"`` if Linux does not report it, None on other systems."""
    if sys.platform != "linux":
        return None
    # By mount id: in a subvolume and in an overlay, the device of a file differs from that of its mount.
    number, device = _mount_of(path), path.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    for fields in _mounts():
        if fields[0] == number if number else fields[2] == name:
            return fields[fields.index("-") + 1]
    return _UNKNOWN


def is_mount_point(path: Path) -> bool:
    """Tell whether a file is mounted without its folder (``docker -v runs.db:/runs.db``)."""
    if sys.platform != "linux":
        return False
    number = _mount_of(path)
    if number is not None:
        return number != _mount_of(path.parent)
    escaped = "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in str(path))
    return any(fields[4] == escaped for fields in _mounts())


def _mounts() -> Iterator[list[str]]:
    """Yield the fields of each line of the mount table, if it is readable."""
    with suppress(OSError), Path("/proc/self/mountinfo").open(errors="surrogateescape") as mounts:
        for line in mounts:
            yield line.split(" ")


def _mount_of(path: Path) -> str | None:
    """Return the mount id of a file, or None if the kernel does not report it."""
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
    """Return the text for messages about a filesystem that is not known to be local."""
    return f"a network filesystem ({kind})" if kind in _NETWORK else f"a filesystem that is not known to be local ({kind})"


def check_locks(path: Path, shown: str, kind: str) -> None:
    """Test locks in the file's folder, on a temporary file.

    Raises:
        DatabaseError: locks fail, or don't exclude each other.
    """
    if sys.platform != "linux":
        return
    # These locks belong to the open file description, not to the process, so one process can test both sides.
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
            return  # a file can't be created here; opening the database reports the reason
        raise DatabaseError(shown, _without_locks(kind, error.strerror or "")) from error
    raise DatabaseError(shown, _without_locks(kind, "two owners got the same lock"))


def _without_locks(kind: str, problem: str) -> str:
    return f"file locks don't work on its filesystem ({kind}): {problem}; use a local disk, or a PostgreSQL database"


class Freshness:
    """Checks, under SQLite's lock, whether this machine sees the current content of the file.

    Many filesystems in user space let the kernel cache data that other machines have overwritten. SQLite would then read old
    data, and overwrite what the others have recorded.

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
            except OSError:  # the cache can't be bypassed
                direct = None
            self._kept[key] = os.open(path, os.O_RDONLY | os.O_CLOEXEC), direct
        self._cached, self._direct = self._kept[key]

    def is_fresh(self) -> bool:
        """Return whether the cached content equals that of the filesystem; True if this is unknown."""
        if self._direct is None:
            return True
        with mmap.mmap(-1, mmap.PAGESIZE) as buffer:  # aligned, which O_DIRECT requires
            try:
                size = os.preadv(self._direct, [buffer], 0)
                return os.pread(self._cached, _HEADER, 0) == buffer[: min(size, _HEADER)]
            except OSError:
                return True  # SQLite will get the same error
