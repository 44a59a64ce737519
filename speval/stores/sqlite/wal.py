"""Finds what blocks the checkpoint of a -wal.

Owns reading SQLite's -wal index and the kernel's table of locks. Invariant: only a transaction older than megabytes of
commits is reported, and a separate process reads the index, because closing it would drop our locks.

Source:
    https://www.sqlite.org/walformat.html#the_wal_index_file_format
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ...escape import visible
from ...model import Finding

__all__ = ["blocked"]

_LARGE = 2**23  # bytes; a commit tries to move them into the database from 4 MB on
_HEADER = struct.Struct("=12xBxH I 76x 6I")  # initialised, page size, last frame; frames moved, last frame of each reader
_READERS = 123  # the byte of the index that the first kind of reader locks
_READ = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read(int(sys.argv[2])))"
_SHOWN = 60  # characters of a command line


def blocked(database: Path) -> list[Finding]:
    """Return a finding if the -wal has grown because of an open transaction or a missing checkpoint."""
    log, index = Path(f"{database}-wal"), Path(f"{database}-shm")
    try:
        size = log.stat().st_size
        if size < _LARGE:
            return []
        known = _read(index)
        key = index.stat().st_ino
    except OSError:
        return []  # deleted in the meantime
    if known is None:
        return []
    page, last, moved, *seen = known
    seen[0] = moved  # readers of the database file alone
    behind = {_READERS + i for i, frame in enumerate(seen) if (last - frame) * page >= _LARGE}
    readers = sorted({pid for pid, byte in _locks(key) if byte in behind and pid != os.getpid()})
    if not readers and (last - moved) * page < _LARGE:
        return []
    grown = f"the -wal has grown to {_megabytes(size)} beside a database of {_megabytes(database.stat().st_size)}"
    if readers:
        who = " and ".join(map(_shown, readers))
        problem = f"{grown}: its checkpoint is blocked by a transaction kept open by {who}"
        fix = "end that transaction; until then the -wal grows with every commit, and no result is lost"
    else:
        problem = f"{grown}, and no checkpoint has moved {_megabytes((last - moved) * page)} of it"
        fix = "the next worker does; if not, a process that is not visible here keeps a transaction open"
    return [Finding(problem, fix, False)]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _read(index: Path) -> tuple[int, ...] | None:
    """Return the page size, the last frame, the number of moved frames, and the last frame of each of the five readers."""
    command = [sys.executable, "-I", "-S", "-c", _READ, str(index), str(_HEADER.size)]
    try:
        read = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout  # noqa: S603
        initialised, page, *frames = _HEADER.unpack(read)
    except (OSError, subprocess.SubprocessError, struct.error):
        return None
    return (65536 if page == 1 else page, *frames) if initialised else None


def _locks(inode: int) -> Iterator[tuple[int, int]]:
    """Yield (pid, byte) for each locked byte of a file; nothing if the kernel does not report locks."""
    with suppress(OSError, ValueError), Path("/proc/locks").open() as table:
        for line in table:
            fields = line.replace("-> ", "").split()
            if fields[5].endswith(f":{inode}") and fields[7] != "EOF":
                yield from ((int(fields[4]), byte) for byte in range(int(fields[6]), int(fields[7]) + 1))


def _shown(pid: int) -> str:
    if pid <= 0:
        return "a process outside of this container"
    command = ""
    with suppress(OSError):
        command = visible(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip())
    return f"process {pid}" + (f" ({command if len(command) <= _SHOWN else command[: _SHOWN - 1] + '…'})" if command else "")
