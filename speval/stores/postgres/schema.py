"""The PostgreSQL schema of one namespace.

Owns recognising, creating and migrating the schema, and the names in it. Invariant: of several workers that start at the same
time, one creates the schema, in one transaction. A schema that does not belong to speval is never written to.
"""

from __future__ import annotations

import re
from importlib import resources
from threading import Event
from typing import Any

from ...errors import DatabaseError, DatabaseMissingError, ForeignDatabaseError, NewerSchemaError
from ...url import PostgresUrl
from ..base import StoreMode
from .connection import Connection, PostgresConnection
from .errors import SCHEMA
from .trust import check_functions, check_owners

__all__ = ["READY", "SCHEMA", "Names", "opened", "prepare", "stored_name", "true_name"]

RELEASE_FOR_SCHEMA = "1.0"  # the first release that reads SCHEMA

_NAME = re.compile(r"\bspeval\.")
# PostgreSQL text can't contain NUL. NUL is stored as this character and "0"; this character is stored twice.
_ESCAPE = "\x10"

_LOOK = """
SELECT to_regnamespace(%(schema)s)::oid, to_regclass(%(meta)s)::oid, current_setting('server_encoding'),
    (SELECT count(*) FROM pg_class AS c
        WHERE c.relnamespace = to_regnamespace(%(schema)s) AND c.relkind IN ('r', 'p', 'v', 'm'))
"""
_META = "SELECT key, value FROM speval.meta WHERE key IN ('application', 'schema', 'release')"
# The lock key is a hash of the schema's name: before the schema exists, it has no oid.
_LOCK = "SELECT pg_advisory_xact_lock(1936745846, hashtext(%s))"
_SIGN = "INSERT INTO speval.meta VALUES ('application', 'speval'), ('schema', %s), ('release', %s)"


# Run in every transaction that writes, after it has taken the lock that a migration needs as well.
READY = "SELECT speval.ready_1()"


class Names:
    """SQL statements for one schema."""

    def __init__(self, schema: str) -> None:
        self.schema = schema
        self._known: dict[str, str] = {}

    def __call__(self, sql: str) -> str:
        """Return the statement with ``speval.`` replaced by the name of the schema."""
        known = self._known.get(sql)
        if known is None:
            known = self._known[sql] = _NAME.sub(f"{self.schema}.", sql)
        return known


def stored_name(name: str) -> str:
    """Return a text with NUL escaped, for storage."""
    if "\0" in name or _ESCAPE in name:
        return name.replace(_ESCAPE, _ESCAPE * 2).replace("\0", f"{_ESCAPE}0")
    return name


def true_name(stored: str) -> str:
    """Return the original of a stored text."""
    if _ESCAPE in stored:
        return re.sub(f"{_ESCAPE}(.)", lambda found: "\0" if found[1] == "0" else found[1], stored, flags=re.DOTALL)
    return stored


def prepare(connection: Connection, url: PostgresUrl, mode: StoreMode) -> None:
    """Check the schema, or create it if it is missing and ``mode`` is "create", in one transaction.

    Raises:
        DatabaseError: the schema can't be used; it was not changed.
    """
    if _recognise(connection, url, mode):
        return
    names = Names(url.schema)
    connection.execute(_LOCK, (url.schema,))
    if _recognise(connection, url, mode):
        return  # another worker has created it in the meantime
    (exists,) = _one(connection, "SELECT to_regnamespace(%s) IS NOT NULL", url.schema)
    if not exists:
        connection.execute(names("CREATE SCHEMA speval.").rstrip("."))
    script = resources.files(__package__).joinpath("schema.sql").read_text(encoding="utf-8")
    connection.execute(names(script))
    connection.execute(names(_SIGN), (str(SCHEMA), RELEASE_FOR_SCHEMA))


def opened(url: PostgresUrl, mode: StoreMode, given_up: Event | None = None) -> PostgresConnection:
    """Return an open connection to a namespace, once its schema is checked, or created for the mode "create".

    Args:
        url: The database and the namespace.
        mode: What it is opened for.
        given_up: Other threads set it to end all waiting for answers.

    Raises:
        DatabaseError: the server or the schema can't be used.
    """
    connection = PostgresConnection(url, writes=mode != "read", given_up=given_up)
    try:
        connection.open()
        connection.run(prepare, url, mode)
    except BaseException:
        connection.close()
        raise
    return connection


def _recognise(connection: Connection, url: PostgresUrl, mode: StoreMode) -> bool:
    """Tell whether the schema exists and belongs to speval; this only reads."""
    schema = url.schema
    values = {"schema": schema, "meta": f"{schema}.meta"}
    row = connection.execute(_LOOK, values).fetchone()
    assert row is not None
    namespace, meta, encoding, tables = row
    if encoding != "UTF8":
        raise DatabaseError(url.shown, f"its encoding {encoding} can't store every text; create a database with UTF8")
    if namespace is not None:
        check_owners(connection, url)
    if meta is None:
        if namespace is not None and tables:
            raise ForeignDatabaseError(url.shown, f"a schema {schema} of another program")
        if mode != "create":
            raise DatabaseMissingError(url.shown)
        return False
    stored: dict[str, Any] = dict(connection.execute(Names(schema)(_META)).fetchall())
    if stored.get("application") != "speval":
        raise ForeignDatabaseError(url.shown, f"a schema {schema} of another program")
    version = int(stored["schema"])
    if version > SCHEMA:
        raise NewerSchemaError(url.shown, version, SCHEMA, stored["release"])
    check_functions(connection, url, reads=mode == "read")
    return True


def _one(connection: Connection, sql: str, *values: object) -> tuple[Any, ...]:
    row = connection.execute(sql, values).fetchone()
    assert row is not None
    return row
