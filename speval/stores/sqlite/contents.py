"""A connection to a SQLite file that a stranger may have made.

Owns what such a file can do to the one who opens it. Invariant: before a row is read, each table that speval reads is known
to be a plain table of speval's own schema, without triggers; and a statement that a crafted file makes endless ends with an
error, or with the signal that was sent meanwhile.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import resources
from pathlib import Path

from ...errors import DatabaseError, ForeignDatabaseError

__all__ = ["GuardedConnection", "check_contents", "guarded", "tables"]

_MIB = 2**20
_STEP = 50_000  # instructions of SQLite's machine between two looks at those used up and at signals: about a millisecond
_LONG_STEP = 1_000_000  # the same for a copy that runs
_LEAST = 20_000_000  # instructions that a transaction may take in any file: a second or so
_A_BYTE = 20  # instructions that each byte of the file allows besides; speval's statements need less than 1
_LONGEST_SQL = 20_000  # characters of a statement of the schema
_LONGEST = 1_000_000_000  # bytes of a value, SQLite's own limit

# Far above what speval's own statements need, and far below SQLite's own limits.
_LIMITS = {
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: _MIB,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 50,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 250_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 10_000,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    sqlite3.SQLITE_LIMIT_ATTACHED: 1,  # VACUUM INTO attaches the file that it makes
}
# From Python 3.12 on; before, the look at the schema alone keeps hostile views and triggers out.
_SWITCHES = {"SQLITE_DBCONFIG_DEFENSIVE": True, "SQLITE_DBCONFIG_ENABLE_TRIGGER": False}

_OBJECTS = "SELECT type, name, tbl_name, rootpage, substr(CAST(sql AS TEXT), 1, ?) FROM sqlite_master"
_COMMENT = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
_SPACE = re.compile(r"[ \t\n\f\r]+")
_TRIGGER = re.compile(r"CREATE (TEMP |TEMPORARY )?TRIGGER\b", re.IGNORECASE)
_VIRTUAL = re.compile(r"CREATE VIRTUAL\b", re.IGNORECASE)
_COMPUTES = re.compile(r"\b(AS|CHECK|GENERATED)\b", re.IGNORECASE)
_UNREADABLE = "\0"  # stands for a statement that is longer than any of ours, or is cut by a NUL
_PLAIN_INDEX = re.compile(r'CREATE INDEX ["\w ]+ ON ["\w]+ ?\([\w", ]+\)', re.IGNORECASE)  # columns only: nothing to compute
# Read at once: a process may give up its rights before it opens a database.
_SCHEMA_SQL = resources.files(__package__).joinpath("schema.sql").read_text(encoding="utf-8")
_FIX = "it is damaged, or was made to do harm; go back to a copy of the file, or start a new one"


class GuardedConnection(sqlite3.Connection):
    """A connection whose statements end.

    SQLite calls back every so many instructions. There Python hears of a Ctrl-C while a statement runs, and a transaction that
    takes more instructions than any file of this size needs is ended. Instructions, not seconds: a busy machine or a slow disk
    ends nothing.
    """

    path: Path
    shown: str
    allowance = 0  # bytes that do not stand in the file and have to be gone through as well, such as those of an eval space

    def watch(self, path: Path, shown: str, step: int) -> None:
        """Begin to count, looking every so many instructions."""
        self.path, self.shown, self._step = path, shown, step
        self._spent = 0
        self._most = 0  # bytes, the largest the file has been: it may be deleted or moved away meanwhile
        self._is_reader = False
        self._has_overspent = False
        self._caught: BaseException | None = None
        # A generator: the exception of a signal is raised where the frame goes on, so inside its try. At the start of a
        # function it would be raised before any try, and sqlite3 would drop it.
        looks = self._looks()
        next(looks)
        self.set_progress_handler(looks.__next__, step)

    def _looks(self) -> Iterator[bool]:
        """Yield, at each look, whether the statement has to end."""
        has_to_end = False
        while True:
            try:
                yield has_to_end
                self._spent += self._step
                has_to_end = self._spent > _LEAST and self._spent > self._allowed()
                self._has_overspent = has_to_end
            except GeneratorExit:
                raise
            except BaseException as error:  # the KeyboardInterrupt of a Ctrl-C, or what another signal handler raises
                self._caught, has_to_end = error, True

    def _allowed(self) -> int:
        self._most = max(self._most, _size(self.path))
        return _LEAST + (self._most + self.allowance) * _A_BYTE

    def allow(self) -> None:
        """Begin a transaction, which may take as many instructions as a file of this size needs."""
        self._spent = 0
        if self._is_reader:
            self.fit()  # it may have grown

    @contextmanager
    def unlimited(self) -> Iterator[None]:
        """Let statements of ours take what they take, in a file whose contents have been looked at."""
        self.set_progress_handler(None, 0)
        try:
            yield
        finally:
            most, is_reader = self._most, self._is_reader
            self.watch(self.path, self.shown, self._step)
            self._most, self._is_reader = most, is_reader

    def fit(self) -> None:
        """Refuse values longer than the whole file: a crafted one claims a gigabyte where there is none. Only for readers."""
        self._is_reader = True
        self._most = max(self._most, _size(self.path))
        self.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, min(_LONGEST - 1, _MIB + self._most))

    def raise_caught(self) -> None:
        """Raise what a signal handler raised while a statement ran, such as the KeyboardInterrupt of a Ctrl-C, if it did."""
        caught, self._caught = self._caught, None
        if caught is not None:
            raise caught

    def reason(self) -> BaseException:
        """Return why a statement was ended from outside of it: the exception of a signal, or an error that says it."""
        caught, self._caught = self._caught, None
        if caught is not None:
            return caught
        if self._has_overspent:
            self._has_overspent = False
            return DatabaseError(self.shown, f"reading it takes longer than for any file of its size that speval wrote; {_FIX}")
        return DatabaseError(self.shown, "what was under way in it was interrupted")


def guarded(database: str, path: Path, shown: str, *, is_reader: bool) -> GuardedConnection:
    """Return a connection in autocommit mode, which one thread at a time may use, with all of SQLite's guards up.

    Args:
        database: What SQLite opens, a URI.
        path: The file that it stands for.
        shown: What errors call it.
        is_reader: Whether the pages and the time are looked at more closely, which costs those who read many again and again.
    """
    connection = sqlite3.connect(
        database, uri=True, isolation_level=None, timeout=0, check_same_thread=False, factory=GuardedConnection
    )
    assert isinstance(connection, GuardedConnection)
    for limit, value in _LIMITS.items():
        connection.setlimit(limit, value)
    set_switch: Callable[[int, bool], None] | None = getattr(connection, "setconfig", None)
    for name, value in _SWITCHES.items() if set_switch is not None else ():
        with suppress(sqlite3.Error, AttributeError):  # a SQLite that is older than the switch
            set_switch(getattr(sqlite3, name), value)  # type: ignore[misc]
    # What a stranger's expressions may call: nothing that reaches outside of the database.
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
    """See that what has the names of our tables is nothing but our tables, before anything in them is read.

    Args:
        c: A connection in a transaction.
        application_id: Ours.
        schema: The schema version that ``schema.sql`` makes.

    Raises:
        DatabaseError: the database says that it is ours, and holds something else.
        ForeignDatabaseError: it is none of ours, and what looks like the table of speval 0.1.1 is something else.
    """
    assert isinstance(c, GuardedConnection)
    ((found_id,), (version,)) = (c.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version"))
    if found_id == application_id:
        objects = _objects(c)
        if problem := _problem(objects, version, schema):
            raise DatabaseError(c.shown, f"{problem}; {_FIX}")
    elif found_id == 0 and (problem := _problem_0_1(c)):
        raise ForeignDatabaseError(c.shown, f"an SQLite database of something else ({problem})")


_Object = tuple[str, str, str, int, str]  # type, name, table, root page, statement without comments


def _objects(c: sqlite3.Connection) -> list[_Object]:
    rows = c.execute(_OBJECTS, (_LONGEST_SQL,))
    return [(str(type_), str(name), str(table), root or 0, _plain(sql)) for type_, name, table, root, sql in rows]


def _is_plain(sql: str) -> bool:
    """Tell whether a statement makes a table that computes nothing; for those of other releases."""
    return sql.upper().startswith("CREATE TABLE ") and not _COMPUTES.search(sql)


def _problem(objects: list[_Object], version: int, schema: int) -> str | None:
    """Return what is wrong with a database that says it is ours."""
    if version < 1:
        return f"its schema version is {version}"
    expected = _expected()
    if version > schema:  # it is refused, but for the release that its table meta names
        expected = {name: what for name, what in expected.items() if name == "meta"}
    found: set[str] = set()
    for type_, name, table, root, sql in objects:
        if type_ == "trigger" or _TRIGGER.match(sql) or sql == _UNREADABLE:
            return f"it has a trigger ({name[:60]!r}), which speval makes none of"
        if name.lower() in expected:
            kind, statement = expected[name.lower()]
            is_same = kind == "view" or sql == statement or (version != schema and (kind == "index" or _is_plain(sql)))
            if type_ != kind or (root == 0) != (kind == "view") or not is_same:
                return f"its {kind} {name!r} is not the one that speval makes"
            found.add(name.lower())
        elif table.lower() in expected and type_ != "view" and sql and not _PLAIN_INDEX.fullmatch(sql):
            return f"it has an index {name!r} on {table!r} that computes something, which speval makes none of"
    if version < schema:
        return None
    missing = [f"{kind} {name!r}" for name, (kind, _) in expected.items() if name not in found and kind != "view"]
    return f"its {missing[0]} is missing" if missing else None


def _problem_0_1(c: GuardedConnection) -> str | None:
    """Return what keeps the table ``evals`` of a database that does not say it is ours from being one of speval 0.1.1."""
    objects = [o for o in _objects(c) if "evals" in (o[1].lower(), o[2].lower()) or _TRIGGER.match(o[4])]
    for type_, name, _, root, sql in objects:
        if type_ == "trigger" or _TRIGGER.match(sql):
            return f"it has a trigger, {name!r}"
        if name.lower() == "evals" and (type_ != "table" or root == 0 or _VIRTUAL.match(sql)):
            return "its evals is no plain table"
        if type_ == "index" and sql and not _PLAIN_INDEX.fullmatch(sql):
            return f"its index {name!r} computes something"
    if objects and any(row[6] for row in c.execute("PRAGMA table_xinfo(evals)")):
        return "a column of its evals is computed"
    return None


def tables() -> list[str]:
    """Return the names of our tables."""
    return [name for name, (kind, _) in _expected().items() if kind == "table" and not name.startswith("sqlite_")]


@cache
def _expected() -> dict[str, tuple[str, str]]:
    """Return what ``schema.sql`` makes, by lower-case name: whether it is a table, an index or a view, and its statement."""
    with sqlite3.connect(":memory:") as own:
        own.executescript(_SCHEMA_SQL)
        rows = own.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    own.close()
    return {name: (type_, _plain(sql)) for type_, name, sql in rows}


def _plain(sql: str | None) -> str:
    """Return a statement without comments and with single spaces.

    Where the result has no quotes, as ours have none, nothing but comments and white space has been left out: a quote
    before them would still be there.
    """
    if sql is None:
        return ""
    # SQLite would read up to a NUL only.
    is_readable = len(sql) < _LONGEST_SQL and "\0" not in sql
    return _SPACE.sub(" ", _COMMENT.sub(" ", sql)).strip() if is_readable else _UNREADABLE
