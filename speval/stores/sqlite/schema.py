"""The schema of a SQLite file.

Owns what tells a database of speval from other files, and making one, also out of one of speval 0.1.1. Invariant: a file is
brought to SCHEMA within the transaction that looked at it.
"""

from __future__ import annotations

import sqlite3
from importlib import resources

from .checksum import of_attempt, of_evaluation
from .states import CLAIMED, add_range, lift

__all__ = [
    "APPLICATION_ID",
    "COLUMNS_0_1",
    "SCHEMA",
    "describe",
    "migrate",
    "show_as_current",
    "stored_journal_mode",
    "stored_release",
]

APPLICATION_ID = 0x7370_6576  # "spev"
SCHEMA = 3
RELEASE_FOR_SCHEMA = "1.0"  # the first release that reads SCHEMA
COLUMNS_0_1 = ["name", "status", "updated", "result", "args"]
_IN_PROGRESS_0_1 = "SELECT rowid, coalesce(updated, 0) FROM evals WHERE status = 'in_progress' ORDER BY rowid"

# Read at import: a process may drop its privileges before it opens a database.
_SCRIPTS = {
    name: resources.files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("schema.sql", "from_0_1.sql")
}


def describe(connection: sqlite3.Connection) -> tuple[int, int, set[str], list[str]]:
    """Return (application id, schema version, tables, columns of the table evals)."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    columns = [row[1] for row in connection.execute("PRAGMA table_info(evals)")] if "evals" in tables else []
    return application_id, version, tables, columns


def stored_journal_mode(connection: sqlite3.Connection) -> str | None:
    """Return the journal mode that all copies have agreed on."""
    row = connection.execute("SELECT value FROM meta WHERE key = 'journal_mode'").fetchone()
    return None if row is None else str(row[0])


def stored_release(connection: sqlite3.Connection) -> str | None:
    """Return the first release that reads the schema of the file."""
    row = connection.execute("SELECT value FROM meta WHERE key = 'release'").fetchone()
    return None if row is None else str(row[0])


def migrate(connection: sqlite3.Connection) -> bool:
    """Bring the file to SCHEMA; looked at again under the lock, because many copies start at once.

    Returns:
        Whether it was a file of speval 0.1.1.
    """
    application_id, version, _, columns = describe(connection)
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


def show_as_current(copy: sqlite3.Connection) -> None:
    """Bring a copy to SCHEMA that only shows a file: what is in progress in one of speval 0.1.1 stays so, held by no worker."""
    is_0_1 = describe(copy)[3] == COLUMNS_0_1
    in_progress = copy.execute(_IN_PROGRESS_0_1).fetchall() if is_0_1 else []
    migrate(copy)
    lift(copy, [id for id, _ in in_progress])  # migrating the file itself makes these pending
    for id, updated_at in in_progress:
        add_range(copy, CLAIMED, id, id, None, 0, updated_at)


def _script(connection: sqlite3.Connection, name: str) -> None:
    """Execute a script statement by statement; executescript() would commit the open transaction first."""
    statement = ""
    for line in _SCRIPTS[name].splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            connection.execute(statement)
            statement = ""
