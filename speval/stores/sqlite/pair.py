"""Whether a file and the -wal beside it belong together.

Owns the mark that proves it, and its check before SQLite opens the file: SQLite would merge an older or newer copy of a
database with a -wal of another one, page by page and without an error. Invariant: for one snapshot of the -wal, the file
contains the mark in the -wal, a mark of an earlier transaction of the same -wal, or the mark before those. If the check can't
run, the two count as belonging together.

A -wal restarts at its beginning when all of it is in the database; its header then has another number. A worker that detects
this writes a new mark together with the previous one, which is then in the database. The -wal may restart with this
transaction and be newer than the mark; so a mark is sure only when the number is unchanged after the write.

Source:
    https://www.sqlite.org/walformat.html#the_wal_file_format
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from ...errors import DatabaseError

__all__ = ["Marker", "check_pair"]

_HEADER = struct.Struct(">16x I 12x")  # the number, which grows by one
_PATIENCE = 10  # seconds; the time limit of the check, for a crafted file
_NONE = "-"  # the mark of a file without one
_SURE = "sure"
_ATTEMPTS = 4  # transactions; the next commit continues
_MARK = "SELECT value FROM meta WHERE key = 'log'"
# In a separate process: closing the file would drop our locks, and closing the last connection would merge it with the -wal.
# If two reads through the -wal return the same, they belong to the read of the file alone between them.
_LOOK = """
import os, sqlite3, sys, time
path, sql = sys.argv[1:]
def connect(how):
    c = sqlite3.connect(f"file:{path}?{how}", uri=True, isolation_level=None, timeout=1)
    c.execute("PRAGMA trusted_schema = OFF")
    return c
def marks(c):
    try:
        row = c.execute(sql).fetchone()
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):
            raise
        row = None
    return str(row[0])[:1000].split() if row else []
def through_log(c):
    try:
        return marks(c)
    except sqlite3.DatabaseError as error:
        if type(error) is not sqlite3.DatabaseError:  # but "malformed", of what alone is not
            raise
try:
    both, alone, misfits = connect("mode=ro"), [], 0
    while misfits < 5 and len(alone) < 100:
        before = through_log(both)
        alone.append(connect("mode=ro&immutable=1"))
        own = (marks(alone[-1]) + ["-", "-", "-"])[2]
        if before is not None and (not before or own in before[2:]):
            break
        if through_log(both) == before:
            misfits += 1
            time.sleep(0.02)  # a mark may be on its way
    else:
        print("misfit" if misfits == 5 else "", flush=True)
except sqlite3.Error:
    pass
os._exit(0)
"""


def check_pair(path: Path, shown: str) -> None:
    """Check that the -wal beside a file belongs to it, before SQLite opens the file.

    Raises:
        DatabaseError: the -wal belongs to another file.
    """
    if _log_number(path) is None:
        return
    command = [sys.executable, "-S", "-P", "-c", _LOOK, quote(str(path)), _MARK]
    try:
        looked = subprocess.run(  # noqa: S603
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_PATIENCE, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return  # for example, this user may not execute the interpreter
    if looked.stdout.strip() != "misfit":
        return
    log = f"{shown}-wal"
    problem = f"{log} does not belong to this file, which is probably an older or newer copy"
    fix = f"restore the right file; or, to continue with this one and without the results in {log}, move {log} away"
    raise DatabaseError(shown, f"{problem}; {fix}")


class Marker:
    """Writes a mark each time the -wal of an open file has restarted.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._marked: int | None = None

    def __repr__(self) -> str:
        return f"<Marker of {str(self._path)!r}: -wal {self._marked}>"

    def look(self, write: Callable[[Callable[[sqlite3.Connection], int | None]], int | None]) -> None:
        """Check the -wal after a commit, and write a mark if it has none.

        Args:
            write: Calls a function in a transaction with the write lock.
        """
        for _ in range(_ATTEMPTS):
            if _log_number(self._path) in (None, self._marked):
                return
            self._marked = write(self._mark)

    def _mark(self, connection: sqlite3.Connection) -> int | None:
        """Write a new mark, or make it sure; return the number of the -wal once its mark is sure."""
        number = _log_number(self._path)
        row = connection.execute(_MARK).fetchone()
        of, is_sure, newest, *older = str(row[0]).split() if row else (_NONE, _SURE, _NONE)
        if of != str(number):
            # An unsure mark may be the first one in this -wal; then the file may still contain the one before.
            older = [newest] if is_sure == _SURE else [newest, *older]
            value = [str(number), "unsure", secrets.token_hex(8), *older]
        elif is_sure != _SURE:
            value = [of, _SURE, newest, *older]
        else:
            return number
        connection.execute("INSERT OR REPLACE INTO meta VALUES ('log', ?)", (" ".join(value),))
        return number if value[1] == _SURE else None


def _log_number(path: Path) -> int | None:
    """Return the number of the -wal beside a file, or None without a -wal."""
    try:
        descriptor = os.open(f"{path}-wal", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        header = os.read(descriptor, _HEADER.size)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return int(_HEADER.unpack(header)[0]) if len(header) == _HEADER.size else None
