"""Translates errors of SQLite, and names files in messages.

Owns the translation into errors of speval. Invariant: a transient error is a DatabaseLockedError or a DatabaseUnavailableError;
every other one is permanent, and its message names the file and the fix.
"""

from __future__ import annotations

import errno
import os
import pwd
import resource
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import DatabaseError, DatabaseLockedError, DatabaseUnavailableError, ForeignDatabaseError, SpevalError

__all__ = [
    "BUSY",
    "NONSENSE",
    "SIDE_FILES",
    "code_of",
    "is_unreadable",
    "may_use",
    "name_problem",
    "nonsense",
    "permission",
    "shown_path",
]
__all__ += ["translated", "translated_os", "understood"]

BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
# What code raises that reads values of other types or sizes than speval writes.
NONSENSE = (ArithmeticError, LookupError, RecursionError, TypeError, ValueError, sqlite3.IntegrityError)
SIDE_FILES = ("-journal", "-wal", "-shm")

_PROBED = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_PERM}
_PASSING = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR}
_FULL = "the disk is full; free some space, no result is lost"
_NAME, _PATH = 255, 512  # bytes of a name on nearly every filesystem, and of a path in SQLite
_PROBE = 65536  # bytes


def shown_path(path: Path) -> str:
    """Return a path as messages show it: from the folder we are in, if it lies below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def may_use(path: Path, mode: int) -> bool:
    """Tell what ``os.access`` does, by the rights that this process has now."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


@contextmanager
def understood(shown: str) -> Iterator[None]:
    """Read values inside; if they are invalid, the file has damage that SQLite does not detect."""
    try:
        yield
    except SpevalError:
        raise
    except NONSENSE as error:
        raise nonsense(shown, error) from error


def nonsense(shown: str, error: Exception) -> DatabaseError:
    """Return the error for invalid values."""
    problem = f"the file contains invalid data ({error!r}); use a backup of the file, or start a new one"
    return DatabaseError(shown, problem)


def code_of(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code, 0 if it has none."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def is_unreadable(connection: sqlite3.Connection) -> bool:
    """Tell whether not even reading works, because the files beside a WAL database can't be made."""
    try:
        connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
    except sqlite3.Error as error:
        return code_of(error) in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}
    except UnicodeDecodeError:  # damaged, which those who read more will say
        return False
    return False


def translated(
    error: sqlite3.Error | UnicodeDecodeError, path: Path, shown: str, *, writes: bool, waited: float
) -> DatabaseError:
    """Return the error to raise in place of SQLite's.

    Args:
        error: SQLite's.
        path: The file.
        shown: The file, for messages.
        writes: Whether the file was opened to be written to.
        waited: Seconds that were waited for a lock.
    """
    if isinstance(error, UnicodeDecodeError):
        return DatabaseError(shown, f"damaged: a text value is not valid UTF-8 ({error})")
    code = code_of(error)
    if code == sqlite3.SQLITE_NOTADB:
        return ForeignDatabaseError(shown, "a file of another kind")
    if code == sqlite3.SQLITE_CORRUPT:
        fix = f"`sqlite3 {shown} REINDEX` repairs an index, `speval salvage {shown} NEW` copies all intact data"
        return DatabaseError(shown, f"damaged ({error}); {fix}")
    if not code and str(error).startswith("Could not decode to UTF-8"):  # and goes on with all of the text
        return DatabaseError(shown, "damaged: a text value is not valid UTF-8")
    if code in BUSY:
        return DatabaseLockedError(shown, waited)
    if code in _PROBED:
        try:
            found = _cause(code, path, writes)
        except OSError as met:  # a folder on the way has been closed
            return translated_os(met, path, shown)
        if found is not None:
            problem, passes = found
            if passes:
                return DatabaseUnavailableError(shown, problem)
            return DatabaseError(shown, f"can't be {'written to' if writes else 'read'} ({error}): {problem}")
    if code == sqlite3.SQLITE_FULL:
        return DatabaseUnavailableError(shown, _FULL)
    if code == sqlite3.SQLITE_READONLY:
        return DatabaseError(shown, f"can't be written to ({error}); check the permissions of file and folder")
    if code in _PASSING:
        return DatabaseUnavailableError(shown, f"the database can't be read or written at the moment ({error})")
    return DatabaseError(shown, str(error))


def translated_os(error: OSError, path: Path, shown: str) -> DatabaseError:
    """Return the error to raise in place of the system's, met on the way to a file."""
    if error.errno in (errno.EACCES, errno.EPERM):
        closed = next((f for f in reversed(path.parents) if not may_use(f, os.X_OK)), None)
        return DatabaseError(shown, f"can't be reached: {permission(closed, 'x') if closed else error.strerror}")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return DatabaseUnavailableError(shown, _many_open(error))
    if error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ENOENT):
        return DatabaseError(shown, f"can't be opened ({error.strerror})")
    return DatabaseUnavailableError(shown, f"the file can't be reached at the moment ({error.strerror})")


def name_problem(path: Path) -> str | None:
    """Return what is wrong with the length of a name, also with those of the files that SQLite puts beside."""
    longest = max(map(len, SIDE_FILES))
    try:
        limit = os.pathconf(path.parent, "PC_NAME_MAX")
    except (OSError, ValueError):
        limit = _NAME
    for what, length, most in (("name", len(os.fsencode(path.name)), limit), ("path", len(os.fsencode(path)), _PATH)):
        if length + longest > most:
            return f"its {what} has {length} bytes, SQLite can use {most - longest} here; choose a shorter one"
    return None


def permission(file: Path, wanted: str) -> str:
    """Say who owns a file and what would permit ``wanted``, some of "rwx"."""
    status = file.stat()
    try:
        owner = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        owner = f"user {status.st_uid}"
    mine = status.st_uid == os.geteuid()
    who, shift = ("u", 6) if mine else ("g", 3) if status.st_gid in {os.getegid(), *os.getgroups()} else ("o", 0)
    bits = status.st_mode >> shift & 7
    missing = "".join(letter for letter, bit in (("r", 4), ("w", 2), ("x", 1)) if letter in wanted and not bits & bit)
    name, mode = shown_path(file), f"{stat.S_IMODE(status.st_mode):o}"
    if not missing:
        why = "an attribute (`lsattr`), an access list (`getfacl`) or a security module forbids it"
        return f"{name} belongs to {owner} and has mode {mode}, but {why}"
    return (
        f"{name} belongs to {owner} and has mode {mode}; `chmod {who}+{missing} {name}`{'' if mine else f' by {owner}'} helps"
    )


def _cause(code: int, path: Path, writes: bool) -> tuple[str, bool] | None:
    """Return what is in the way of a file, and whether that passes; None if nothing can be found."""
    folder = path.parent
    try:
        os.close(os.open(folder, os.O_RDONLY | os.O_CLOEXEC))
    except (FileNotFoundError, NotADirectoryError):
        return f"its folder {shown_path(folder)} is gone", False
    except PermissionError:
        pass  # it need not be listed
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return _many_open(error), True
        return f"its folder {shown_path(folder)} can't be reached at the moment ({error.strerror})", True
    if code != sqlite3.SQLITE_FULL and (
        problem := name_problem(path) or _forbidden(path, writes) or (writes and _too_large(path))
    ):
        return problem, False
    return _unwritable(folder) if writes else None


def _forbidden(path: Path, writes: bool) -> str | None:
    """Return which of a database's files may not be used, and why."""
    if writes and os.statvfs(path.parent).f_flag & os.ST_RDONLY:
        return f"the filesystem of {shown_path(path.parent)} is mounted read-only"
    mode, wanted = (os.R_OK | os.W_OK, "rw") if writes else (os.R_OK, "r")
    for file in (path, *(Path(f"{path}{suffix}") for suffix in SIDE_FILES)):
        if file.exists() and not may_use(file, mode):
            return permission(file, wanted)
    if writes and not may_use(path.parent, os.W_OK | os.X_OK):
        return permission(path.parent, "wx")
    return None


def _too_large(path: Path) -> str | None:
    """Return which of a database's files has reached the limit that this process has for the size of any."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == resource.RLIM_INFINITY:
        return None
    for file in (Path(f"{path}{suffix}") for suffix in ("", *SIDE_FILES)):
        if file.exists() and file.stat().st_size + _PROBE > limit:
            return f"{shown_path(file)} may not grow past {limit} bytes (`ulimit -f`); start with `ulimit -f unlimited`"
    return None


def _unwritable(folder: Path) -> tuple[str, bool] | None:
    """Return why no file can be written in a folder, or else where SQLite keeps its temporary ones."""
    if (error := _probe(folder)) is not None:
        if error.errno == errno.ENOSPC:
            return _FULL, True
        if error.errno == errno.EDQUOT:
            return f"the disk quota for {shown_path(folder)} is used up; free some space, no result is lost", True
        return f"can't write files in {shown_path(folder)} at the moment ({error.strerror})", True
    temporary = Path(os.environ.get("SQLITE_TMPDIR") or tempfile.gettempdir())
    if (error := _probe(temporary)) is not None:
        problem = f"can't write temporary files in {temporary} ({error.strerror})"
        return f"{problem}; free some space there or set SQLITE_TMPDIR to another folder, no result is lost", True
    return None


def _probe(folder: Path) -> OSError | None:
    """Write a file that has no name, and return what went wrong."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(_PROBE))
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def _many_open(error: OSError) -> str:
    if error.errno == errno.ENFILE:
        return "too many files are open on this machine; close some, no result is lost"
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"this process has reached its limit of {soft} open files (`ulimit -n`); close some or raise the limit, "
        "no result is lost"
    )
