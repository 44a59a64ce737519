"""One SQLite file and one connection to it.

Owns opening, recognising, creating and migrating the file, waiting for its lock, and what SQLite's errors mean.
Invariant: every transaction is one call on one thread, takes its lock at BEGIN, and is over when the call returns; a file
that is not ours is never written to.
"""

from __future__ import annotations

import logging
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar
from urllib.parse import quote

from ..errors import (
    DatabaseError,
    DatabaseLockedError,
    DatabaseMissingError,
    DatabaseUnavailableError,
    ForeignDatabaseError,
    NewerSchemaError,
    SpevalError,
    StoreClosedError,
)
from ..model import Durability
from .checksum import of_attempt, of_evaluation
from .sqlite_mount import Freshness, check_locks, filesystem, is_network

__all__ = ["SqliteFile", "shown_path"]

logger = logging.getLogger("speval.store")

P = ParamSpec("P")
T = TypeVar("T")

APPLICATION_ID = 0x7370_6576  # "spev"
SCHEMA = 2
RELEASE_FOR_SCHEMA = "1.0"  # the first release that reads SCHEMA
COLUMNS_0_1 = ["name", "status", "updated", "result", "args"]

_PATIENCE = 60.0  # seconds to wait for the lock of another program

_TRANSIENT = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}


class SqliteFile:
    """A connection to a database file of speval, used by one thread at a time.

    Args:
        path: The file.
        mode: ``create`` makes it if it is missing, ``write`` needs it to be there, ``read`` changes nothing.
        durability: ``process`` survives the death of any process, ``power`` a power cut too.
        patience: Seconds to wait for others' locks. None: a minute.
        given_up: Set by others to make all waiting end.
    """

    def __init__(
        self,
        path: Path,
        mode: Literal["create", "write", "read"],
        durability: Durability = "process",
        patience: float | None = None,
        given_up: threading.Event | None = None,
    ) -> None:
        self.path = path
        self._log_path = Path(f"{path}-wal")
        self.shown = shown_path(path)
        self.patience = _PATIENCE if patience is None else patience
        self.is_0_1 = False  # an unmigrated database of speval 0.1.1, opened to read
        self.is_empty = False  # nothing in it yet, opened to read
        self.network: str | None = None  # the kind of network filesystem it is on
        self._freshness: Freshness | None = None
        self._is_current = False
        self._identity: tuple[int, int] | None = None
        self._log: tuple[int, int] | None = None  # the same of the -wal, where there is one
        self._was_filled = False
        self._rescued = ""  # what was said of it
        self._given_up = given_up or threading.Event()
        self._closed = False
        _check_path(path, self.shown, mode)
        with self._errors():
            if mode != "read":
                self._check_mount()
            self.connection = self._connect(mode)
            try:
                self._recognise(mode)
                if mode != "read":
                    self._prepare(durability)
            except BaseException:
                self.connection.close()
                raise

    def __repr__(self) -> str:
        return f"<SqliteFile {self.shown!r}{' closed' if self._closed else ''}>"

    def write(self, work: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work(connection, ...)`` in one transaction that holds the write lock from its start."""
        return self._transaction("BEGIN IMMEDIATE", self.patience, work, *args, **kwargs)

    def write_within(
        self, patience: float, work: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Do as ``write`` does, waiting so many seconds for the lock."""
        return self._transaction("BEGIN IMMEDIATE", patience, work, *args, **kwargs)

    def read(self, work: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work(connection, ...)`` on one snapshot; it may write to TEMP tables only."""
        return self._transaction("BEGIN", self.patience, work, *args, **kwargs)

    def rows(self, sql: str, values: tuple[object, ...] = ()) -> Iterator[tuple[Any, ...]]:
        """Yield what a query brings, in a transaction; what goes wrong is this file's error, whoever reads the rows."""
        with self._errors():
            for row in self.connection.execute(sql, values):  # noqa: UP028 - which would close the cursor, perhaps too late
                yield row

    def show_as_current(self) -> None:
        """Go on with a copy in memory, brought to this release's schema, if an empty or an old file was opened to read."""
        if self.is_empty or self.is_0_1:
            copy = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            with self._errors():
                self.connection.backup(copy)
                self.connection.close()
                self.connection = copy
                _migrate(copy)

    def look_after(self) -> None:
        """See that the name still leads to the file that is open, before a look that may be one of many.

        Raises:
            DatabaseError: it does not.
        """
        if how := self._taken_away():
            raise DatabaseError(self.shown, f"{how} while in use; start again with the file that is there now")

    def rewrite(self) -> None:
        """Write the whole file anew, without the room that nothing needs, and empty the -wal.

        Raises:
            DatabaseLockedError: another program reads or writes it.
        """
        self._look_after_the_file()
        with self._errors():
            self._patiently(self.patience, "VACUUM")
            (is_busy, _, _) = self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if is_busy:
                raise DatabaseLockedError(self.shown, 0.0)

    def data_version(self) -> int:
        """Return a number that differs after another connection has written."""
        self._look_after_the_file()  # who waits would not notice for long
        with self._errors():
            (version,) = self.connection.execute("PRAGMA data_version").fetchone()
            return int(version)

    def close(self) -> None:
        """Close the connection; calling it again does nothing."""
        self._closed = True
        self.connection.close()

    def give_up(self) -> None:
        """Make a call that waits for a lock fail at once; callable from any thread."""
        self._given_up.set()

    def _transaction(
        self,
        begin: str,
        patience: float,
        work: Callable[Concatenate[sqlite3.Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        if self._closed:
            raise StoreClosedError(self.shown)
        connection = self.connection
        if begin != "BEGIN":
            self._look_after_the_file()
        with self._errors():
            self._patiently(patience, begin)
            try:
                if begin == "BEGIN":  # takes its lock only with the first look at the file, which may be refused as well
                    self._patiently(patience, "SELECT 1 FROM sqlite_master LIMIT 1")
                if self._freshness is not None and not self._freshness.is_fresh():
                    problem = f"its filesystem ({self.network}) shows this machine old data, without what others have written"
                    fix = "mount it without caches (direct_io, timeouts of 0), or use a PostgreSQL database"
                    raise DatabaseError(self.shown, f"{problem}; {fix}; nothing was written")
                result = self._understanding(work, connection, *args, **kwargs)
                self._patiently(patience, "COMMIT")
                return result
            finally:
                if connection.in_transaction:
                    connection.rollback()

    def _understanding(
        self,
        work: Callable[Concatenate[sqlite3.Connection, P], T],
        connection: sqlite3.Connection,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run ``work``; where what it reads makes no sense, the file is damaged in a way that SQLite does not notice."""
        try:
            return work(connection, *args, **kwargs)
        except SpevalError:
            raise
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            problem = f"holds what no speval has written ({error!r}); go back to a copy of the file, or start a new one"
            raise DatabaseError(self.shown, problem) from error

    def _look_after_the_file(self) -> None:
        """See that the names still lead to the files that are open, since what is written to a deleted one is gone with us."""
        if how := self._taken_away():
            self._rescued = self._rescued or self._rescue()
            raise DatabaseError(self.shown, f"{how} while in use; {self._rescued}")

    def _taken_away(self) -> str | None:
        """Return what has happened to the files, None if they are there."""
        how = None
        try:
            found, size = _identity(self.path)
            if self._identity is None:
                self._identity = found
            if found != self._identity:
                how = "was deleted" if found is None else "was replaced by another file"
            elif self._was_filled and not size:
                how = "was emptied"
            # SQLite itself deletes it only when the last one closes the database, and it holds what is not in the database yet.
            elif self._log is not None and _identity(self._log_path)[0] != self._log:
                how = "has lost its -wal file, which was deleted or replaced"
        except OSError:
            return None  # a folder or a server out of reach: SQLite will say
        self._was_filled = self._was_filled or size > 0
        return how

    def _rescue(self) -> str:
        """Copy what the open file still holds beside the name it had, and say where to."""
        rescued = Path(f"{self.path}.rescued")
        try:
            os.close(os.open(rescued, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            self.connection.execute("VACUUM INTO ?", (str(rescued),))
        except FileExistsError:
            return f"all that was recorded is in {rescued}, unless that is an older one"
        except (OSError, sqlite3.Error) as error:
            return f"what was recorded could not be saved: {error}"
        return f"all that was recorded is in {rescued}: rename it and start again"

    def _patiently(self, patience: float, statement: str) -> None:
        """Execute a statement that may find the database locked."""
        # SQLite's own busy handler lets some wait for seconds while others go first many hundred times. Short random
        # pauses are fair and hardly slower; they grow once it is plain that somebody keeps the lock for long.
        started = time.monotonic()
        while True:
            try:
                self.connection.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if _code(error) not in _BUSY:
                    raise
                waited = time.monotonic() - started
                if waited >= patience:
                    raise DatabaseLockedError(self.shown, waited) from error
                if self._given_up.wait(random.random() * min(0.001 + waited / 50, 0.05)):
                    raise DatabaseLockedError(self.shown, waited) from error

    def _connect(self, mode: str) -> sqlite3.Connection:
        if mode == "create" and not self.path.exists():
            self._create()
        # Never mode=rwc: a file that vanishes between two copies' starts must not come back empty under one of them. And not
        # mode=ro for reading: a reader that may write cleans up behind itself.
        uri = f"file:{quote(str(self.path))}?mode=rw"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=0, check_same_thread=False)
        # What a stranger's triggers and views may call: nothing that reaches outside of the database.
        connection.execute("PRAGMA trusted_schema = OFF")
        if mode != "read" or not _is_unreadable(connection):
            return connection
        connection.close()
        # In a folder we may not write to, a WAL database opens only as one that nobody changes; with no -wal, nobody does.
        if self._log_path.exists():
            raise DatabaseError(self.shown, "its folder can't be written to and its -wal file has to be merged; copy both")
        return sqlite3.connect(f"{uri}&immutable=1", uri=True, isolation_level=None, check_same_thread=False)

    def _check_mount(self) -> None:
        """See that there are locks, where that is not to be taken for granted."""
        with suppress(OSError):  # no folder yet, so a local one, or none that can be made
            if is_network(kind := filesystem(self.path.parent)):
                check_locks(self.path, self.shown, str(kind))

    def _create(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Closing a descriptor drops this process's locks on the file, so only ever on one that was not there before.
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except FileExistsError:
            if not self.path.parent.is_dir():
                raise DatabaseError(self.shown, f"can't be created in {self.path.parent}: it is a file") from None
        except OSError as error:
            folder = next(f for f in self.path.absolute().parents if f.exists())
            raise DatabaseError(self.shown, f"can't be created in {folder}: {error.strerror}") from error

    def _recognise(self, mode: str) -> None:
        """Tell what the file is, writing nothing."""
        application_id, version, tables, columns = self.read(_describe)
        if application_id == APPLICATION_ID:
            if version > SCHEMA:
                release = self.read(lambda c: c.execute("SELECT value FROM meta WHERE key = 'release'").fetchone())
                raise NewerSchemaError(self.shown, version, SCHEMA, release[0] if release else f"{version}.0")
            if version < SCHEMA:
                problem = f"was made by a development version of speval (schema {version}), which no release reads"
                raise DatabaseError(self.shown, f"{problem}; use another name for a new one")
            self._is_current = True
        elif application_id == 0 and tables == {"evals"} and columns == COLUMNS_0_1:
            self.is_0_1 = True
        elif application_id == 0 and version == 0 and not tables:
            # A copy that is just starting makes the file before it fills it, so for a reader there is nothing in it yet.
            self.is_empty = mode == "read"
            if mode == "write":
                raise ForeignDatabaseError(self.shown, "an empty file")
        else:
            shown = ", ".join(sorted(tables)[:5]) or "none"
            raise ForeignDatabaseError(self.shown, f"an SQLite database of something else (its tables: {shown})")

    def _prepare(self, durability: str) -> None:
        connection = self.connection
        kind = filesystem(self.path)
        self.network = kind if is_network(kind) else None
        if self.network is not None and self.network.startswith("fuse."):
            self._freshness = Freshness(self.path)
        # All have to agree, also those for whom the disk is a local one: the file server's own programs.
        stored = self.read(_stored_journal_mode) if self._is_current else None
        mode = self._journal_mode("delete" if self.network or stored == "delete" else "wal")
        if self.network and mode == "wal":
            raise DatabaseError(self.shown, "others use its write-ahead log, which a network filesystem loses; stop them first")
        if mode == "wal":
            self.read(_describe)  # makes the -wal
            self._log, _ = _identity(self._log_path)
        # Without a WAL, only a commit that is on the disk leaves a file that every power cut and every server forgives.
        full = durability == "power" or mode != "wal"
        connection.execute(f"PRAGMA synchronous = {'FULL' if full else 'NORMAL'}")
        connection.execute("PRAGMA journal_size_limit = 67108864")
        if not self._is_current:
            if self.write(_migrate):
                logger.warning("migrated a database of speval 0.1.1; copies of the old release can't use it any more")
            self.is_0_1 = False
        if mode != stored:
            self.write(lambda c: c.execute("INSERT OR REPLACE INTO meta VALUES ('journal_mode', ?)", (mode,)).rowcount)

    def _journal_mode(self, wanted: str) -> str:
        """Set the journal mode and return the one in force."""
        started = time.monotonic()
        while True:
            try:
                (mode,) = self.connection.execute(f"PRAGMA journal_mode = {wanted}").fetchone()
                return str(mode)
            except sqlite3.OperationalError as error:
                # Somebody has the file open in the other mode, or is changing the mode right now.
                waited = time.monotonic() - started
                if _code(error) not in _BUSY:
                    raise
                if waited > self.patience:
                    raise DatabaseLockedError(self.shown, waited) from error
                if self._given_up.wait(random.random() * 0.02):
                    raise DatabaseLockedError(self.shown, waited) from error

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except UnicodeDecodeError as error:
            raise DatabaseError(self.shown, f"damaged: what should be text in it is none ({error})") from error
        except sqlite3.Error as error:
            db, code = self.shown, _code(error)
            if self._closed:
                raise StoreClosedError(db) from error
            if code == sqlite3.SQLITE_NOTADB:
                raise ForeignDatabaseError(db, "some other kind of file") from error
            if code == sqlite3.SQLITE_CORRUPT:
                fix = f"`sqlite3 {db} REINDEX` mends an index, `speval salvage {db} NEW` saves what can be saved"
                raise DatabaseError(db, f"damaged ({error}); {fix}") from error
            if not code and str(error).startswith("Could not decode to UTF-8"):  # and goes on with all of the text
                raise DatabaseError(db, "damaged: what should be text in it is none") from None
            if code == sqlite3.SQLITE_READONLY:
                raise DatabaseError(db, f"can't be written to ({error}); check the permissions of file and folder") from error
            if code in _BUSY:
                raise DatabaseLockedError(db, self.patience) from error
            if code == sqlite3.SQLITE_FULL:
                raise DatabaseUnavailableError(db, "the disk is full; nothing is lost, make room") from error
            if code in _TRANSIENT:
                raise DatabaseUnavailableError(db, f"can't be read or written just now ({error})") from error
            raise DatabaseError(db, str(error)) from error


def shown_path(path: Path) -> str:
    """Return a path as messages show it: from the folder we are in, if it lies below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def _identity(path: Path) -> tuple[tuple[int, int] | None, int]:
    """Return what tells a file from every other one, None if there is none of that name, and its size."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None, 0
    return (status.st_dev, status.st_ino), status.st_size


def _code(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code, 0 if it has none."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _is_unreadable(connection: sqlite3.Connection) -> bool:
    """Tell whether not even reading works, because the files beside a WAL database can't be made."""
    try:
        connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
    except sqlite3.Error as error:
        return _code(error) in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}
    except UnicodeDecodeError:  # damaged, which those who read more will say
        return False
    return False


def _check_path(path: Path, shown: str, mode: str) -> None:
    if path.is_dir():
        raise DatabaseError(shown, "is a folder; name a file in it")
    if path.is_symlink() and not path.exists():
        raise DatabaseError(
            str(path), f"is a symbolic link to {path.readlink()}, which is not there; make that or remove the link"
        )
    if mode != "create" and not path.exists():
        raise DatabaseMissingError(shown)


def _describe(connection: sqlite3.Connection) -> tuple[int, int, set[str], list[str]]:
    """Return (application id, schema version, tables, columns of the table evals)."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    columns = [row[1] for row in connection.execute("PRAGMA table_info(evals)")]
    return application_id, version, tables, columns


def _stored_journal_mode(connection: sqlite3.Connection) -> str | None:
    row = connection.execute("SELECT value FROM meta WHERE key = 'journal_mode'").fetchone()
    return None if row is None else str(row[0])


def _migrate(connection: sqlite3.Connection) -> bool:
    """Bring the file to SCHEMA; looked at again under the lock, because many copies start at once.

    Returns:
        Whether it was a file of speval 0.1.1.
    """
    application_id, version, _, columns = _describe(connection)
    if application_id == APPLICATION_ID and version == SCHEMA:
        return False
    from_0_1 = columns == COLUMNS_0_1
    if from_0_1:
        connection.execute("ALTER TABLE evals RENAME TO evals_0_1")
    _script(connection, "schema.sql")
    if from_0_1:
        connection.create_function("crc_of_evaluation", 3, of_evaluation, deterministic=True)
        connection.create_function("crc_of_attempt", 12, lambda *row: of_attempt(row), deterministic=True)
        _script(connection, "from_0_1.sql")
    connection.execute("INSERT INTO meta VALUES ('release', ?)", (RELEASE_FOR_SCHEMA,))
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {SCHEMA}")
    return from_0_1


def _script(connection: sqlite3.Connection, name: str) -> None:
    """Execute a script statement by statement; executescript() would commit the open transaction first."""
    statement = ""
    for line in resources.files(__package__).joinpath(name).read_text(encoding="utf-8").splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            connection.execute(statement)
            statement = ""
