"""Whether a file and the -wal beside it belong together.

Owns the mark that tells it, and the look at it before SQLite has the file: an older or a newer copy put in the place of a
database would be merged with a -wal that continues another one, page by page and without an error. Invariant: with one
snapshot of the -wal, the file holds the mark that is in it, one that an earlier transaction of the same -wal has written, or
the one before those. What can't be looked at counts as belonging together.

A -wal begins anew, over what it held, once all of that is in the database; its header then holds another number. A copy that
notices writes a new mark, with the one before it, which is then in the database. The -wal may begin anew with that very
transaction, and be newer than the mark says; so a mark is sure only when the number is found unchanged after it was written.

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
_PATIENCE = 10  # seconds, which end the look at a crafted file
_NONE = "-"  # stands for the mark of a file without one
_SURE = "sure"
_ATTEMPTS = 4  # transactions; the next commit goes on
_MARK = "SELECT value FROM meta WHERE key = 'log'"
# In a process of its own: closing the file would drop our locks on it, and closing the last connection would merge it with the
# -wal. Two looks through the -wal that see the same have seen what belongs to the look at the file alone between them.
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
    """See that a file is the one that the -wal beside it continues; asked before SQLite opens it.

    Raises:
        DatabaseError: it is another one.
    """
    if _log_number(path) is None:
        return
    command = [sys.executable, "-S", "-P", "-c", _LOOK, quote(str(path)), _MARK]
    try:
        looked = subprocess.run(  # noqa: S603
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_PATIENCE, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return  # such as an interpreter that this user may not execute
    if looked.stdout.strip() != "misfit":
        return
    log = f"{shown}-wal"
    problem = f"is not the file that {log} continues: an older or a newer copy was put in its place, and the two do not fit"
    fix = f"put the right file back; or, to go on with this one and without the answers in {log}, move {log} away"
    raise DatabaseError(shown, f"{problem}; {fix}")


class Marker:
    """Writes a mark each time the -wal of an open file has begun anew.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._marked: int | None = None

    def __repr__(self) -> str:
        return f"<Marker of {str(self._path)!r}: -wal {self._marked}>"

    def look(self, write: Callable[[Callable[[sqlite3.Connection], int | None]], int | None]) -> None:
        """Look at the -wal, and write a mark if there is none for it; after each commit.

        Args:
            write: Calls a function in a transaction with the write lock.
        """
        for _ in range(_ATTEMPTS):
            if _log_number(self._path) in (None, self._marked):
                return
            self._marked = write(self._mark)

    def _mark(self, connection: sqlite3.Connection) -> int | None:
        """Write what is missing: a mark, or that it is sure; return the number of a -wal that has a sure one."""
        number = _log_number(self._path)
        row = connection.execute(_MARK).fetchone()
        of, is_sure, newest, *older = str(row[0]).split() if row else (_NONE, _SURE, _NONE)
        if of != str(number):
            # An unsure one may be the first in this -wal; then the file can still be as it was before.
            older = [newest] if is_sure == _SURE else [newest, *older]
            value = [str(number), "unsure", secrets.token_hex(8), *older]
        elif is_sure != _SURE:
            value = [of, _SURE, newest, *older]
        else:
            return number
        connection.execute("INSERT OR REPLACE INTO meta VALUES ('log', ?)", (" ".join(value),))
        return number if value[1] == _SURE else None


def _log_number(path: Path) -> int | None:
    """Return the number of the -wal beside a file, None if there is none yet."""
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
