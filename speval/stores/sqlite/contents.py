"""A connection to an untrusted SQLite file.

Owns the limits on what such a file can do. Invariant: before a row is read, each table that speval reads is known to be a
plain table of speval's schema, without triggers. A statement that a crafted file makes endless ends with an error, or with the
exception of a signal.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from importlib import resources
from pathlib import Path

from ...errors import DatabaseError, ForeignDatabaseError

__all__ = ["GuardedConnection", "check_contents", "guarded", "tables"]

_MIB = 2**20
_STEP = 50_000  # SQLite instructions between two checks of their number and of signals: about a millisecond
_LONG_STEP = 1_000_000  # the same for a worker
_LEAST = 20_000_000  # instructions that a transaction may use in any file: about a second
_A_BYTE = 20  # additional instructions per byte of the file; speval's statements need less than 1
_LONGEST_SQL = 20_000  # characters of a statement of the schema
_LONGEST = 1_000_000_000  # bytes of a value, SQLite's own limit

# Far above what the statements of speval need, and far below the limits of SQLite.
_LIMITS = {
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: _MIB,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 50,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 250_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 10_000,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    sqlite3.SQLITE_LIMIT_ATTACHED: 1,  # VACUUM INTO attaches the file that it makes
}
# From Python 3.12 on; before, only the check of the schema rejects hostile views and triggers.
_SWITCHES = {"SQLITE_DBCONFIG_DEFENSIVE": True, "SQLITE_DBCONFIG_ENABLE_TRIGGER": False}

_OBJECTS = "SELECT type, name, tbl_name, rootpage, substr(CAST(sql AS TEXT), 1, ?) FROM sqlite_master"
_COMMENT = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
_SPACE = re.compile(r"[ \t\n\f\r]+")
_TRIGGER = re.compile(r"CREATE (TEMP |TEMPORARY )?TRIGGER\b", re.IGNORECASE)
_VIRTUAL = re.compile(r"CREATE VIRTUAL\b", re.IGNORECASE)
_COMPUTES = re.compile(r"\b(AS|CHECK|GENERATED)\b", re.IGNORECASE)
_UNREADABLE = "\0"  # replaces a statement that is longer than any of ours, or contains a NUL
_PLAIN_INDEX = re.compile(r'CREATE INDEX ["\w ]+ ON ["\w]+ ?\([\w", ]+\)', re.IGNORECASE)  # columns only, no expressions
# Read at import: a process may drop its privileges before it opens a database.
_SCHEMA_SQL = resources.files(__package__).joinpath("schema.sql").read_text(encoding="utf-8")
_FIX = "the file is damaged or malicious; use a backup of the file, or start a new one"


class GuardedConnection(sqlite3.Connection):
    """A connection whose statements always end.

    SQLite calls a handler after a fixed number of instructions. There Python handles a Ctrl-C during a statement, and ends a
    transaction that uses more instructions than a file of this size needs. It counts instructions, not seconds, so a busy
    machine or a slow disk ends nothing.
    """

    path: Path
    shown: str
    allowance = 0  # bytes to process besides the file, such as those of an eval space

    def watch(self, path: Path, shown: str, step: int) -> None:
        """Start counting, with a check every ``step`` instructions."""
        self.path, self.shown, self._step = path, shown, step
        self._spent = 0
        self._most = 0  # bytes, the largest size of the file so far: it may be deleted or moved while it is open
        self._is_reader = False
        self._has_overspent = False
        self._caught: BaseException | None = None
        # A generator: the exception of a signal is raised where its frame continues, so inside of its try. At the start of a
        # function it would be raised before any try, and sqlite3 would ignore it.
        looks = self._looks()
        next(looks)
        self.set_progress_handler(looks.__next__, step)

    def _looks(self) -> Iterator[bool]:
        """Yield at each check whether the statement must end."""
        has_to_end = False
        while True:
            try:
                yield has_to_end
                self._spent += self._step
                has_to_end = self._spent > _LEAST and self._spent > self._allowed()
                self._has_overspent = has_to_end
            except GeneratorExit:
                raise
            except BaseException as error:  # KeyboardInterrupt, or an exception of another signal handler
                self._caught, has_to_end = error, True

    def _allowed(self) -> int:
        self._most = max(self._most, _size(self.path))
        return _LEAST + (self._most + self.allowance) * _A_BYTE

    def allow(self) -> None:
        """Start a transaction: it may use as many instructions as a file of this size needs."""
        self._spent = 0
        if self._is_reader:
            self.fit()  # it may have grown

    @contextmanager
    def unlimited(self) -> Iterator[None]:
        """Run our statements without a limit, in a file whose contents have been checked."""
        self.set_progress_handler(None, 0)
        try:
            yield
        finally:
            most, is_reader = self._most, self._is_reader
            self.watch(self.path, self.shown, self._step)
            self._most, self._is_reader = most, is_reader

    def fit(self) -> None:
        """Refuse values longer than the whole file, because a crafted file can claim values of a gigabyte. Only for readers."""
        self._is_reader = True
        self._most = max(self._most, _size(self.path))
        self.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, min(_LONGEST - 1, _MIB + self._most))

    def raise_caught(self) -> None:
        """Raise what a signal handler raised while a statement ran, such as the KeyboardInterrupt of a Ctrl-C, if it did."""
        caught, self._caught = self._caught, None
        if caught is not None:
            raise caught

    def reason(self) -> BaseException:
        """Return why a statement was ended: the exception of a signal, or an error."""
        caught, self._caught = self._caught, None
        if caught is not None:
            return caught
        if self._has_overspent:
            self._has_overspent = False
            return DatabaseError(self.shown, f"reading takes longer than any file of this size from speval needs; {_FIX}")
        return DatabaseError(self.shown, "a statement was interrupted")


def guarded(database: str, path: Path, shown: str, *, is_reader: bool) -> GuardedConnection:
    """Return a connection in autocommit mode, for one thread at a time, with all guards of SQLite.

    Args:
        database: The URI that SQLite opens.
        path: The file.
        shown: The display name for errors.
        is_reader: Whether to check pages and instructions more often, which slows down repeated reading.
    """
    connection = sqlite3.connect(
        database, uri=True, isolation_level=None, timeout=0, check_same_thread=False, factory=GuardedConnection
    )
    assert isinstance(connection, GuardedConnection)
    for limit, value in _LIMITS.items():
        connection.setlimit(limit, value)
    set_switch: Callable[[int, bool], None] | None = getattr(connection, "setconfig", None)
    for name, value in _SWITCHES.items() if set_switch is not None else ():
        with suppress(sqlite3.Error, AttributeError):  # this SQLite does not have the switch yet
            set_switch(getattr(sqlite3, name), value)  # type: ignore[misc]
    # Expressions in an untrusted file may not call functions with side effects.
    connection.execute("PRAGMA trusted_schema = OFF")
    if is_reader:
        connection.execute("PRAGMA cell_size_check = ON")
    connection.watch(path, shown, _STEP if is_reader else _LONG_STEP)
    if is_reader:
        connection.fit()
    return connection


def _size(path: Path) -> int:
    size = 0
    for name in (path, Path(f"{path}-wal")):
        with suppress(OSError):
            size += name.stat().st_size
    return size


def check_contents(c: sqlite3.Connection, application_id: int, schema: int) -> None:
    """Check that the objects with the names of our tables are our tables, before reading from them.

    Args:
        c: A connection in a transaction.
        application_id: The application id of speval.
        schema: The schema version that ``schema.sql`` creates.

    Raises:
        DatabaseError: the database has our application id and other objects.
        ForeignDatabaseError: the database belongs to another program, and its ``evals`` is not the table of speval 0.1.1.
    """
    assert isinstance(c, GuardedConnection)
    ((found_id,), (version,)) = (c.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version"))
    if found_id == application_id:
        objects = _objects(c)
        if problem := _problem(objects, version, schema):
            raise DatabaseError(c.shown, f"{problem}; {_FIX}")
    elif found_id == 0 and (problem := _problem_0_1(c)):
        raise ForeignDatabaseError(c.shown, f"an SQLite database of another program ({problem})")


_Object = tuple[str, str, str, int, str]  # type, name, table, root page, statement without comments


def _objects(c: sqlite3.Connection) -> list[_Object]:
    # Closed at once: an error keeps this frame, and with it an open cursor, which would keep the file open.
    with closing(c.execute(_OBJECTS, (_LONGEST_SQL,))) as rows:
        return [(str(type_), str(name), str(table), root or 0, _plain(sql)) for type_, name, table, root, sql in rows]


def _is_plain(sql: str) -> bool:
    """Tell whether a statement creates a table without expressions; for tables of other releases."""
    return sql.upper().startswith("CREATE TABLE ") and not _COMPUTES.search(sql)


def _problem(objects: list[_Object], version: int, schema: int) -> str | None:
    """Return the problem of a database with our application id, or None."""
    if version < 1:
        return f"its schema version is {version}"
    expected = _expected()
    if version > schema:  # it will be refused, and the error needs only the table meta
        expected = {name: what for name, what in expected.items() if name == "meta"}
    found: set[str] = set()
    for type_, name, table, root, sql in objects:
        if type_ == "trigger" or _TRIGGER.match(sql) or sql == _UNREADABLE:
            return f"it has a trigger ({name[:60]!r}), and speval creates no triggers"
        if name.lower() in expected:
            kind, statement = expected[name.lower()]
            is_same = kind == "view" or sql == statement or (version != schema and (kind == "index" or _is_plain(sql)))
            if type_ != kind or (root == 0) != (kind == "view") or not is_same:
                return f"its {kind} {name!r} differs from the one that speval creates"
            found.add(name.lower())
        elif table.lower() in expected and type_ != "view" and sql and not _PLAIN_INDEX.fullmatch(sql):
            return f"it has an index {name!r} on {table!r} with an expression, and speval creates no such index"
    if version < schema:
        return None
    missing = [f"{kind} {name!r}" for name, (kind, _) in expected.items() if name not in found and kind != "view"]
    return f"its {missing[0]} is missing" if missing else None


def _problem_0_1(c: GuardedConnection) -> str | None:
    """Return why the table ``evals`` of a database without our application id is not that of speval 0.1.1, or None."""
    objects = [o for o in _objects(c) if "evals" in (o[1].lower(), o[2].lower()) or _TRIGGER.match(o[4])]
    for type_, name, _, root, sql in objects:
        if type_ == "trigger" or _TRIGGER.match(sql):
            return f"it has a trigger, {name!r}"
        if name.lower() == "evals" and (type_ != "table" or root == 0 or _VIRTUAL.match(sql)):
            return "its evals is not a plain table"
        if type_ == "index" and sql and not _PLAIN_INDEX.fullmatch(sql):
            return f"its index {name!r} has an expression"
    if objects and any(row[6] for row in c.execute("PRAGMA table_xinfo(evals)")):
        return "a column of its evals is computed"
    return None


def tables() -> list[str]:
    """Return the names of our tables."""
    return [name for name, (kind, _) in _expected().items() if kind == "table" and not name.startswith("sqlite_")]


@cache
def _expected() -> dict[str, tuple[str, str]]:
    """Return the objects that ``schema.sql`` creates, by lower-case name: the type (table, index, view) and the statement."""
    with sqlite3.connect(":memory:") as own:
        own.executescript(_SCHEMA_SQL)
        rows = own.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    own.close()
    return {name: (type_, _plain(sql)) for type_, name, sql in rows}


def _plain(sql: str | None) -> str:
    """Return a statement without comments and with single spaces.

    If the result has no quotes, as ours have none, only comments and white space were removed: a quote before them would still
    be there.
    """
    if sql is None:
        return ""
    # SQLite reads a statement only up to a NUL.
    is_readable = len(sql) < _LONGEST_SQL and "\0" not in sql
    return _SPACE.sub(" ", _COMMENT.sub(" ", sql)).strip() if is_readable else _UNREADABLE
