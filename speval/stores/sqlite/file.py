"""One SQLite file and one connection to it.

Owns opening, recognising and preparing the file, waiting for its lock, and detecting that it was deleted or replaced.
Invariant: every transaction is one call on one thread, takes its lock at BEGIN, and has ended when the call returns; a file
of another program is never written to.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from ...errors import DatabaseError, DatabaseLockedError, ForeignDatabaseError, NewerSchemaError, SpevalError, StoreClosedError
from ...model import Durability
from ...pauses import pauses
from .connect import Stillness, connected, stillness
from .contents import GuardedConnection, check_contents, guarded
from .errors import BUSY, code_of, permission, shown_path, translated, understood
from .fork import Owner
from .guard import check_file, check_journal, check_library, check_path
from .mount import Freshness, check_locks, filesystem, is_network
from .pair import Marker, check_pair
from .schema import (
    APPLICATION_ID,
    COLUMNS_0_1,
    SCHEMA,
    describe,
    migrate,
    show_as_current,
    stored_journal_mode,
    stored_release,
)
from .watchman import Watchman, identity, lacks_log

__all__ = ["SqliteFile", "shown_path"]

logger = logging.getLogger("speval.store")

P = ParamSpec("P")
T = TypeVar("T")

_PATIENCE = 60.0  # seconds to wait for the lock of another program
_SHORT = 0.2  # seconds to wait for it with what the next commit can do as well
_SILENCE = 3.0  # seconds of waiting for it before that is said


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
        check_library(shown_path(path))
        real = check_path(path, shown_path(path), mode)
        self.path = real
        self._log_path = Path(f"{real}-wal")
        self.shown = shown_path(real if path.is_symlink() else path)
        self.patience = _PATIENCE if patience is None else patience
        self.is_0_1 = False  # an unmigrated database of speval 0.1.1, opened to read
        self.is_empty = False  # nothing in it yet, opened to read
        self.network: str | None = None  # the kind of filesystem it is on, if other machines may share that
        self._kind: str | None = None
        self._freshness: Freshness | None = None
        self._is_current = False
        self._is_linked = False  # whether it has a second name and this was logged
        self._is_waiting = False  # whether it waits for a lock and this was logged
        self._writes = mode != "read"
        self._rolls_back = False  # whether it uses a rollback journal, which each transaction checks first
        self._still: Stillness | None = None  # the state of the file when it was opened as immutable
        self._watchman = Watchman(real)
        self._marker: Marker | None = None  # only with a -wal
        self.lacks_log = lacks_log(real)
        self._given_up = given_up or threading.Event()
        self._closed = False
        if self._writes:
            self._check_mount()
        if mode == "create" and not real.exists():
            self._create()
        check_file(real, self.shown)
        self.owner = Owner(identity(real)[0] or (0, 0), self.shown)
        with self._errors():
            try:
                if self.owner.is_first:
                    check_pair(real, self.shown)
                self.connection = self._connect(mode)
                try:
                    self._recognise(mode)
                    if self._writes:
                        self._prepare(durability)
                except BaseException:
                    self.connection.close()
                    raise
            except BaseException:
                self.owner.leave()
                raise

    def __repr__(self) -> str:
        return f"<SqliteFile {self.shown!r}{' closed' if self._closed else ''}>"

    def write(self, work: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work(connection, ...)`` in one transaction that holds the write lock from its start."""
        result = self._transaction("BEGIN IMMEDIATE", self.patience, work, *args, **kwargs)
        if self._marker is not None:
            with suppress(SpevalError):  # what was written is written; the next commit looks again
                self._marker.look(partial(self._transaction, "BEGIN IMMEDIATE", min(self.patience, _SHORT)))
        return result

    def write_within(
        self, patience: float, work: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Do as ``write`` does, waiting so many seconds for the lock."""
        return self._transaction("BEGIN IMMEDIATE", patience, work, *args, **kwargs)

    def read(self, work: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work(connection, ...)`` on one snapshot; it may write to TEMP tables only."""
        while self._still is not None:
            # Read without locks, what others write meanwhile looks like damage, and would never be seen in what is cached.
            with suppress(DatabaseError):
                result = self._transaction("BEGIN", self.patience, work, *args, **kwargs)
                if self._still == stillness(self.path):
                    return result
            if self._still == stillness(self.path):
                break  # and raise the error
            self._open_again()
        return self._transaction("BEGIN", self.patience, work, *args, **kwargs)

    @property
    def is_immutable(self) -> bool:
        """Return whether the file is opened as immutable, which holds until another process changes it."""
        return self._still is not None and not (self.is_empty or self.is_0_1)

    def _open_again(self) -> None:
        """Open the file again, after others have changed it since it was opened as immutable or copied into memory."""
        self.connection.close()
        was_copied = self.is_empty or self.is_0_1
        self.is_empty = self.is_0_1 = False
        if was_copied:
            self.owner = Owner(identity(self.path)[0] or (0, 0), self.shown)
        with self._errors():
            self.connection = self._connect("read")
            if was_copied:
                self._recognise("read")
                self.show_as_current()

    def rows(self, sql: str, values: tuple[object, ...] = ()) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a query, in a transaction; errors are translated for this file."""
        with self._errors():
            cursor = self.connection.execute(sql, values)
            try:
                for row in cursor:  # noqa: UP028 - `yield from` would close the cursor later
                    yield row
            finally:
                # An open cursor would keep the file locked as long as the error object exists.
                with suppress(sqlite3.ProgrammingError):  # the connection is already closed
                    cursor.close()

    def show_as_current(self) -> None:
        """Replace an empty or an old file, opened for reading, by a copy in memory with the schema of this release."""
        if self.is_empty or self.is_0_1:
            still = self._still or stillness(self.path)
            copy = guarded(":memory:", self.path, self.shown, is_reader=False)
            with self._errors():
                self.connection.backup(copy)
                self.connection.close()
                self.owner.leave()
                self.connection, self._still = copy, still
                show_as_current(copy)

    def look_after(self) -> None:
        """Check that the name still belongs to the open file; for readers that read repeatedly.

        Raises:
            DatabaseError: it does not.
        """
        if how := self._watchman.taken_away():
            raise DatabaseError(self.shown, f"{how} while in use; start again to use the file that exists now")

    def rewrite(self) -> None:
        """Rewrite the whole file without unused space, and empty the -wal.

        Raises:
            DatabaseLockedError: another program reads or writes it.
        """
        self._look_after_the_file()
        with self._errors(), self.connection.unlimited():
            self._patiently(self.patience, "VACUUM")
            (is_busy, _, _) = self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if is_busy:
                raise DatabaseLockedError(self.shown, 0.0)

    def data_version(self) -> int:
        """Return a number that differs after another connection has written."""
        self.owner.check()
        self._look_after_the_file()  # a worker that only waits would not detect a deleted file for a long time
        self.connection.allow()
        with self._errors():
            (version,) = self.connection.execute("PRAGMA data_version").fetchone()
            return int(version)

    def checkpoint(self) -> None:
        """Move the -wal into the file, as far as that blocks no other worker."""
        try:
            self.connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.Error:
            self.connection.raise_caught()

    def close(self) -> None:
        """Close the connection; calling it again does nothing."""
        self._closed = True
        if self.owner.is_here:  # a fork would take away what its parent needs
            self.connection.close()
            self.owner.leave()

    def wait_as_usual(self) -> None:
        """Wait a minute for others' locks from now on."""
        self.patience = min(self.patience, _PATIENCE)

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
        self.owner.check()
        connection = self.connection
        if begin != "BEGIN":
            self._look_after_the_file()
        if self._rolls_back:
            check_journal(self.path, self.shown)
        connection.allow()
        with self._errors():
            self._patiently(patience, begin)
            try:
                # Reading takes its lock only with the first look at the file, which may be refused as well.
                (version,) = self._patiently(patience, "PRAGMA user_version").fetchone()
                if version > SCHEMA and self._is_current:
                    raise self._newer(connection, version)
                if self._freshness is not None and not self._freshness.is_fresh():
                    problem = f"its filesystem ({self.network}) shows old data on this machine, without the writes of others"
                    fix = "mount it without caches (direct_io, timeouts of 0), or use a PostgreSQL database"
                    raise DatabaseError(self.shown, f"{problem}; {fix}; nothing was written")
                with understood(self.shown):
                    result = work(connection, *args, **kwargs)
                self._patiently(patience, "COMMIT")
                return result
            finally:
                if connection.in_transaction:
                    connection.rollback()

    def _look_after_the_file(self) -> None:
        """Check that the names still belong to the open files: data written to a deleted file would be lost."""
        how = self._watchman.taken_away()
        if how is not None:
            raise DatabaseError(self.shown, f"{how} while in use; {self._watchman.rescue(self.connection)}")
        if self._watchman.is_linked and not self._is_linked:
            # Harmless for workers that have it open, because no new worker can open it by either name.
            self._is_linked = True
            if self.patience >= _PATIENCE:  # not from the lease thread as well
                logger.warning("%s has a second name (a hard link): remove it, no worker can start before", self.shown)

    def _patiently(self, patience: float, statement: str) -> sqlite3.Cursor:
        """Execute a statement that may find the database locked."""
        # With SQLite's busy handler, some wait for seconds while others proceed hundreds of times. Short random pauses are
        # fair and hardly slower; they grow when the lock is held for a long time.
        started, waits = time.monotonic(), pauses(0.001, 0.05, growth=1.01, spread=1.0)
        while True:
            try:
                return self.connection.execute(statement)
            except sqlite3.OperationalError as error:
                if code_of(error) not in BUSY:
                    raise
                waited = time.monotonic() - started
                if waited >= patience:
                    raise DatabaseLockedError(self.shown, waited) from error
                if waited >= _SILENCE and patience >= _PATIENCE and not self._is_waiting:
                    self._is_waiting = True
                    logger.warning("%s: waiting for a lock of another program; find it with `fuser %s`", self.shown, self.shown)
                if self._given_up.wait(next(waits)):
                    raise DatabaseLockedError(self.shown, waited) from error

    def _connect(self, mode: str) -> GuardedConnection:
        connection, self._still = connected(self.path, self.shown, reads=mode == "read")
        return connection

    def _check_mount(self) -> None:
        """Check that file locks work, on a filesystem that may be shared."""
        with suppress(OSError):  # the folder is missing
            self._kind = filesystem(self.path.parent)
            if is_network(self._kind):
                check_locks(self.path, self.shown, str(self._kind))

    def _create(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Closing a descriptor drops the locks of this process on the file, so do this only with a new file.
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except FileExistsError:
            if not self.path.parent.is_dir():
                raise DatabaseError(self.shown, f"can't be created in {self.path.parent}: it is a file") from None
        except OSError as error:
            folder = next(f for f in self.path.absolute().parents if f.exists())
            why = f"; {permission(folder, 'wx')}" if error.errno == errno.EACCES else ""
            raise DatabaseError(self.shown, f"can't be created in {folder}: {error.strerror}{why}") from error

    def _recognise(self, mode: str) -> None:
        """Recognise the file; this only reads."""
        self.read(check_contents, APPLICATION_ID, SCHEMA)
        application_id, version, tables, columns = self.read(describe)
        if application_id == APPLICATION_ID:
            if version > SCHEMA:
                raise self.read(self._newer, version)
            if version < SCHEMA:
                problem = f"a development version of speval wrote this file (schema {version}), and no release can read it"
                raise DatabaseError(self.shown, f"{problem}; use another name")
            self._is_current = True
        elif application_id == 0 and tables == {"evals"} and columns == COLUMNS_0_1:
            self.is_0_1 = True
        elif application_id == 0 and version == 0 and not tables:
            # A starting worker creates the file before it fills it, so for a reader it has no evaluations yet.
            self.is_empty = mode == "read"
            if mode == "write":
                raise ForeignDatabaseError(self.shown, "an empty file")
        else:
            names = ", ".join(sorted(tables)[:5]) or "none"
            raise ForeignDatabaseError(self.shown, f"an SQLite database of another program (its tables: {names})")

    def _newer(self, connection: sqlite3.Connection, version: int) -> NewerSchemaError:
        return NewerSchemaError(self.shown, version, SCHEMA, stored_release(connection) or f"{version}.0")

    def _prepare(self, durability: str) -> None:
        connection = self.connection
        kind = self._kind or filesystem(self.path)  # that of its folder: a file mounted without its folder is refused
        self.network = kind if is_network(kind) else None
        if self.network is not None and self.network.startswith("fuse"):
            self._freshness = Freshness(self.path)
        # All workers must use the same mode, also those on the file server, where the disk is local.
        stored = self.read(stored_journal_mode) if self._is_current else None
        mode = self._journal_mode("delete" if self.network or stored == "delete" else "wal")
        if self.network and mode == "wal":
            problem = f"other workers use its write-ahead log, which loses data on {self.network}; stop them first"
            raise DatabaseError(self.shown, problem)
        if mode == "wal":
            self.read(describe)  # creates the -wal
            self._watchman.note_log()
            self._marker = Marker(self.path)
        self._rolls_back = mode != "wal"
        # Without a WAL, only a synced commit keeps the file intact in a power failure or a crash of the file server.
        full = durability == "power" or mode != "wal"
        if not full:
            self._begin_log()
        connection.execute(f"PRAGMA synchronous = {'FULL' if full else 'NORMAL'}")
        connection.execute("PRAGMA journal_size_limit = 67108864")
        if not self._is_current:
            if self.write(migrate):
                logger.warning("migrated a database of speval 0.1.1; the old release can't use it any more")
            self.is_0_1, self._is_current = False, True
        if mode != stored:
            self.write(lambda c: c.execute("INSERT OR REPLACE INTO meta VALUES ('journal_mode', ?)", (mode,)).rowcount)
            self.checkpoint()  # so that the file is a speval database also without its -wal

    def _begin_log(self) -> None:
        """Write the first commit of an empty -wal without waiting for the disk, which would take longer than a short call.

        SQLite syncs the header of each -wal that begins, since one that begins anew overwrites frames that would count again
        under the old header. An empty -wal has no such frames: before its header is on the disk, it counts as empty, and a
        power cut takes from it what it may take from every commit of durability "process". Each checkpoint syncs it first.
        """

        def first_commit(connection: sqlite3.Connection) -> None:
            # Asked under the write lock, so it stays empty until this commit, whose pages are too few for a checkpoint.
            if not self._log_path.stat().st_size:
                connection.execute("INSERT OR REPLACE INTO meta VALUES ('journal_mode', 'wal')")

        if self._is_current and not self._log_path.stat().st_size:
            self.connection.execute("PRAGMA synchronous = OFF")
            with suppress(DatabaseLockedError):  # another copy writes the first commit
                self._transaction("BEGIN IMMEDIATE", 0, first_commit)

    def _journal_mode(self, wanted: str) -> str:
        """Set the journal mode and return the one in force."""
        # Another copy may be changing the mode right now. One that has the file open keeps its write-ahead log.
        patience = self.patience if wanted == "wal" else min(self.patience, _PATIENCE)
        try:
            (mode,) = self._patiently(patience, f"PRAGMA journal_mode = {wanted}").fetchone()
        except DatabaseLockedError:
            (mode,) = self.connection.execute("PRAGMA journal_mode").fetchone()
            if wanted == "wal" or mode != "wal" or self._given_up.is_set():
                raise
        return str(mode)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn SQLite's errors into ours."""
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if self._closed and not isinstance(error, UnicodeDecodeError):
                raise StoreClosedError(self.shown) from error
            if not isinstance(error, UnicodeDecodeError) and code_of(error) == sqlite3.SQLITE_INTERRUPT:
                raise self.connection.reason() from None
            raise translated(error, self.path, self.shown, writes=self._writes, waited=min(self.patience, _PATIENCE)) from error
