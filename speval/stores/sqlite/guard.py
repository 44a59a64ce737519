"""Checks before SQLite opens a file.

Owns the checks of the file, of the files beside it and of SQLite itself. Invariant: this module writes nothing and never
closes a descriptor of a database, because that would drop the locks of this process.
"""

from __future__ import annotations

import os
import pwd
import sqlite3
import stat
import sys
from contextlib import closing
from functools import lru_cache
from pathlib import Path

from ...errors import DatabaseError, DatabaseMissingError, ForeignDatabaseError
from .errors import SIDE_FILES, name_problem, shown_path, translated_os
from .mount import is_mount_point

__all__ = ["check_file", "check_journal", "check_library", "check_path"]

_OLDEST = (3, 35)  # RETURNING
_SMALLEST = 512  # bytes of the smallest database
_MAGIC = bytes.fromhex("d9d505f920a163d7")  # the start of a journal, and the end of one that names a super-journal


def check_library(shown: str) -> None:
    """Check that SQLite has the features that speval needs.

    Raises:
        DatabaseError: it is too old, or was built without a required feature.
    """
    if problem := _library_problem():
        fix = "use a Python that includes a newer one, from `uv venv --python 3.13`, conda or python.org"
        raise DatabaseError(shown, f"can't be used with this Python ({sys.executable}): its SQLite {problem}; {fix}")


@lru_cache
def _library_problem() -> str | None:
    version = sqlite3.sqlite_version
    if sqlite3.sqlite_version_info < _OLDEST:
        return f"is {version}, and speval needs {'.'.join(map(str, _OLDEST))} or later"
    if not sqlite3.threadsafety:
        return f"({version}) was built without threads"
    with closing(sqlite3.connect(":memory:")) as connection:
        try:
            connection.execute("SELECT value FROM json_each('[1]')").fetchall()
        except sqlite3.Error:
            return f"({version}) was built without JSON functions"
    return None


def check_path(path: Path, shown: str, mode: str) -> Path:
    """Return the path with symbolic links resolved; SQLite puts its other files beside that file.

    Raises:
        DatabaseError: the path can't be a database, or does not exist and ``mode`` is not ``create``.
    """
    real = Path(os.path.realpath(path))
    if problem := name_problem(real):
        raise DatabaseError(shown, problem)
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            problem = f"this is a symbolic link to {path.readlink()}, which does not exist; create that or remove the link"
            raise DatabaseError(str(path), problem) from None
        if mode != "create":
            raise DatabaseMissingError(shown) from None
        return real
    except OSError as error:
        raise translated_os(error, path, shown) from error
    if stat.S_ISDIR(status.st_mode):
        raise DatabaseError(shown, "this is a folder; name a file in it")
    return real


def check_file(path: Path, shown: str) -> None:
    """Check that SQLite can open a file, with the files beside it, without damage to any file.

    Raises:
        DatabaseError: it can't.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ForeignDatabaseError(shown, "a device, a pipe or a socket")
        # SQLite treats a file of one byte as an empty database.
        if 0 < status.st_size < _SMALLEST:
            raise ForeignDatabaseError(shown, "a file of another kind")
        if status.st_nlink > 1:
            problem = (
                f"the file has {status.st_nlink} names (hard links); SQLite keeps a -wal beside each, which destroys the file"
            )
            fix = f"remove the others (`find / -xdev -samefile {shown}` lists them), or use a copy of the file"
            raise DatabaseError(shown, f"{problem}: {fix}")
        if is_mount_point(path):
            problem = "the file is mounted without its folder; other workers may keep results in a -wal that is not visible"
            raise DatabaseError(shown, f"{problem}: mount its folder instead of the file (docker -v FOLDER:{path.parent})")
        for suffix in SIDE_FILES:
            _check_beside(Path(f"{path}{suffix}"), status, shown)
    except OSError as error:
        raise translated_os(error, path, shown) from error


def check_journal(path: Path, shown: str) -> None:
    """Check that SQLite may roll back the journal beside a file; called for each transaction with a rollback journal.

    Raises:
        DatabaseError: it may not.
    """
    try:
        _check_beside(Path(f"{path}-journal"), None, shown)
    except OSError as error:
        raise translated_os(error, path, shown) from error


def _check_beside(file: Path, database: os.stat_result | None, shown: str) -> None:
    """Check a file beside a database: it must be the file itself, of a user who may write to the database."""
    try:
        status = file.lstat()
    except FileNotFoundError:
        return
    name = shown_path(file)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not an ordinary file"
        what = "has other names (hard links)" if stat.S_ISREG(status.st_mode) else f"is {kind}"
        raise DatabaseError(
            shown, f"{name} {what}, and SQLite would write to its target; find out who created it, and remove it"
        )
    if not status.st_size or file.name.endswith("-shm"):
        return  # SQLite takes no data from it
    database = database or Path(str(file).removesuffix("-journal")).stat()
    if not _is_trusted(status.st_uid, database):
        problem = f"{name} belongs to another user ({_user(status.st_uid)}), and SQLite would apply it to the database"
        raise DatabaseError(shown, f"{problem}; find out what it is, and remove it if it is not yours")
    if file.name.endswith("-journal") and _names_another(file):
        problem = f"{name} names another file, which SQLite would delete (a super-journal)"
        fix = "remove it, unless your own transaction over several databases was interrupted; then open it with `sqlite3` first"
        raise DatabaseError(shown, f"{problem}; {fix}")


def _names_another(journal: Path) -> bool:
    """Tell whether a journal ends with the name of a super-journal, its length, a checksum and the magic bytes."""
    try:
        descriptor = os.open(journal, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):  # deleted in the meantime, or SQLite can't read it either
        return False
    try:
        size = os.fstat(descriptor).st_size
        return size >= 2 * len(_MAGIC) and os.pread(descriptor, len(_MAGIC), size - len(_MAGIC)) == _MAGIC
    finally:
        os.close(descriptor)


def _is_trusted(uid: int, database: os.stat_result) -> bool:
    """Tell whether a user may write to the database anyway."""
    if uid in (os.geteuid(), 0, database.st_uid) or database.st_mode & stat.S_IWOTH:
        return True
    if not database.st_mode & stat.S_IWGRP:
        return False
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return False
    return database.st_gid in os.getgrouplist(user.pw_name, user.pw_gid)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
